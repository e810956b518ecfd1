"""Memory of a run's processes, by role, as the kernel counts it.

Invariant: every process below the supervisor is in exactly one role: its own, or the nearest ancestor's that has one
(the engine's helper processes are the rollout's). RSS counts shared pages once for each process; PSS shares them out,
so that sums over processes are real memory.
"""

from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")
# What the command line of a role's first process holds.
ROLES = {
    "coordinator": ("grpo_worker.entrypoint", "coordinator"),
    "trainer": ("grpo_worker.entrypoint", "trainer"),
    "rollout": ("grpo_worker.entrypoint", "rollout"),
    "reward_workers": ("grpo_worker.rewards.worker",),
}
SUPERVISOR = "supervisor"


def process_tree(root: int) -> dict[int, int]:
    """Process id -> parent's, of `root` and everything below it, parents first."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it ended meanwhile
            continue
        children[parent].append(int(entry.name))
    tree, queue = {root: 0}, [root]
    while queue:
        parent = queue.pop(0)
        for child in children[parent]:
            tree[child] = parent
            queue.append(child)
    return tree


def role_of(command: list[str]) -> str | None:
    """The role that a command line names; None for a helper process."""
    return next((role for role, words in ROLES.items() if all(word in command for word in words)), None)


def memory_by_role(root: int) -> dict[str, dict[str, float]]:
    """MiB of PSS and RSS and the number of processes, by role."""
    roles: dict[int, str] = {}
    result: dict[str, dict[str, float]] = {}
    for pid, parent in process_tree(root).items():
        try:
            command = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            rollup = (PROC / str(pid) / "smaps_rollup").read_text()
        except OSError:  # it ended meanwhile
            continue
        roles[pid] = role_of(command) or roles.get(parent, SUPERVISOR)
        figures = result.setdefault(roles[pid], {"pss_mib": 0.0, "rss_mib": 0.0, "processes": 0.0})
        figures["pss_mib"] += _kib(rollup, "Pss") / 1024
        figures["rss_mib"] += _kib(rollup, "Rss") / 1024
        figures["processes"] += 1
    return {role: {key: round(value, 1) for key, value in figures.items()} for role, figures in result.items()}


def _kib(rollup: str, field: str) -> int:
    return next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith(f"{field}:")), 0)
