"""`grpo submit`, `status`, `logs`, `stop`, `resume`: commands for people whose jobs run on a cluster.

Invariant: nothing here imports the operator's loop or the worker's processes, and the Kubernetes client is imported by the command that
runs, so that `grpo --help` and `grpo validate` neither need it nor wait for it. The installed package offers `add_commands` by the
entry point group `grpo.commands`.
"""

from grpo_operator.cli.commands import add_commands

__all__ = ["add_commands"]
