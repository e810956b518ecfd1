"""`grpo-worker trainer` on one node: a process for each of its ranks, all of which live or all of which end.

Invariant: the exit code is that of the first rank that failed; when one rank ends badly the others are ended, first
asked, then killed. torch is not imported here: a supervisor should cost nothing.
"""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_worker.environment import PARENT_PID
from grpo_worker.errors import ConfigError
from grpo_worker.ports import free_port

RANK_PROCESS = "GRPO_TRAINER_RANK_PROCESS"  # set for our own children alone
POLL_SECONDS = 0.1
REPORT_GRACE_SECONDS = 5.0  # for rank 0 to tell the coordinator what another rank died of
TERMINATE_GRACE_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Which ranks this node runs. `master_port` 0 on a single node takes a free one."""

    nodes: int
    ranks_per_node: int
    node_rank: int = 0
    master_address: str = "127.0.0.1"
    master_port: int = 0

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def placement(nodes: int, ranks_per_node: int, rendezvous_port: int, environment: Mapping[str, str]) -> Placement:
    """From the job and this pod's NODE_RANK (or JOB_COMPLETION_INDEX) and MASTER_ADDR. Raises ConfigError."""
    node_rank = int(environment.get("NODE_RANK", environment.get("JOB_COMPLETION_INDEX", "0")))
    address = environment.get("MASTER_ADDR", "127.0.0.1")
    port = int(environment.get("MASTER_PORT", rendezvous_port))
    if nodes > 1 and ("MASTER_ADDR" not in environment or not port):
        raise ConfigError(
            f"trainer.nodes: {nodes} nodes need MASTER_ADDR (node 0's address) in the environment and a fixed port. "
            "Set network.rendezvousPort, and MASTER_ADDR and NODE_RANK on each node."
        )
    if not 0 <= node_rank < nodes:
        raise ConfigError(f"NODE_RANK: {node_rank} is not below trainer.nodes = {nodes}")
    return Placement(nodes, ranks_per_node, node_rank, address, port)


def is_rank_process(environment: Mapping[str, str]) -> bool:
    """True inside a process that `run_ranks` started."""
    return RANK_PROCESS in environment


def run_ranks(command: Sequence[str], place: Placement, stop: threading.Event | None = None) -> int:
    """Run `command` once for each rank of this node. Returns the exit code for the node."""
    port = place.master_port or free_port()
    processes = []
    for local_rank in range(place.ranks_per_node):
        environment = {
            **os.environ,
            RANK_PROCESS: "1",
            PARENT_PID: str(os.getpid()),
            "RANK": str(place.node_rank * place.ranks_per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(place.world_size),
            "MASTER_ADDR": place.master_address,
            "MASTER_PORT": str(port),
        }
        processes.append(subprocess.Popen(list(command), env=environment))
    stop = stop or _stop_on_sigterm()
    try:
        return _supervise(processes, stop)
    finally:
        _end(processes)


def _supervise(processes: list["subprocess.Popen[bytes]"], stop: threading.Event) -> int:
    forwarded = False
    while True:
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            rank, code = failed[0]
            assert code is not None
            log.error("local rank %d ended with %d: ending the others", rank, code)
            _wait_all(processes, REPORT_GRACE_SECONDS)
            return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        if stop.is_set() and not forwarded:
            forwarded = True
            for process in processes:
                process.send_signal(signal.SIGTERM)
        time.sleep(POLL_SECONDS)


def _wait_all(processes: list["subprocess.Popen[bytes]"], limit_seconds: float) -> bool:
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        if all(process.poll() is not None for process in processes):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _end(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    if not _wait_all(processes, TERMINATE_GRACE_SECONDS):
        for process in processes:
            if process.poll() is None:
                process.kill()
    for process in processes:
        process.wait(TERMINATE_GRACE_SECONDS)


def _stop_on_sigterm() -> threading.Event:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    return stop
