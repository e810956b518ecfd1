"""A child process ends when its parent is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from grpo_worker.rollout import orphan

PROGRAM = """
import multiprocessing, time
from grpo_worker.rollout.orphan import end_with_parent

def child(pipe):
    end_with_parent()
    pipe.send("watching")
    time.sleep(600)

if __name__ == "__main__":
    end_with_parent()  # without effect here
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(theirs,))
    process.start()
    ours.recv()
    print(process.pid, flush=True)
    process.join()
"""


def test_a_child_whose_parent_was_killed_is_gone(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PROGRAM)
    search = os.pathsep.join([str(Path(orphan.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search}
    )
    assert parent.stdout is not None
    assert int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(30)
    # The pipe to us is also the child's: its end of file is the child's end.
    assert parent.stdout.read() == ""
