"""`grpo watch JOB`: the page of a run whose files are on a cluster's volume.

Invariant: what is shown are copies of the run's files, fetched through the coordinator's pod as they grow; the job itself is only read.
When the pod is gone, the page keeps what was seen.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from grpo_operator import labels
from grpo_operator.cli.api_errors import NotThere
from grpo_operator.cli.cluster import Cluster, connect
from grpo_operator.cli.logs import Wanted, has_ended, has_started, no_pods
from grpo_operator.cli.reading import ended
from grpo_operator.cli.tools import Tools
from grpo_worker.errors import GRPOError

FILES = ("job.yaml", "metrics.jsonl", "events.jsonl", "samples.jsonl")
PIECE_BYTES = 8 << 20  # of one file at a time, so that an answer comes within a request's limit


def watch(options: argparse.Namespace, tools: Tools) -> None:
    """Until interrupted. Raises GRPOError."""
    cluster = connect(options)
    with tempfile.TemporaryDirectory(prefix="grpo-watch-") as folder:
        copy = RunCopy(cluster, str(options.run), Path(folder))
        copy.pull()
        if not any(copy.directory.iterdir()):
            wanted = Wanted(str(options.run), "coordinator", None, None)
            raise NotThere(no_pods(cluster.job(cluster.namespace, wanted.job), wanted))
        tools.watch_run(copy.directory, options.port, copy.goes_on)


class RunCopy:
    """The run's files on this machine."""

    def __init__(self, cluster: Cluster, job: str, folder: Path) -> None:
        self.directory = folder / job
        self._cluster, self._job = cluster, job
        self._problem = ""
        self.directory.mkdir()

    def goes_on(self) -> bool:
        """Fetch what is new; whether there may be more. What goes wrong is said once on stderr, and tried again."""
        try:
            going = self.pull()
        except GRPOError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                print(f"grpo: {error}", file=sys.stderr)
            return True
        self._problem = ""
        return going

    def pull(self) -> bool:
        """Fetch what has been written since; whether the job goes on. Raises GRPOError."""
        namespace = self._cluster.namespace
        job = self._cluster.job(namespace, self._job)
        selector = f"{labels.JOB}={self._job},{labels.ROLE}={labels.Role.COORDINATOR}"
        for pod in self._cluster.pods(namespace, selector):
            if has_started(pod) and not has_ended(pod):
                for name in FILES:
                    self._fetch(str(pod["metadata"]["name"]), name)
        return ended(job) is None

    def _fetch(self, pod: str, name: str) -> None:
        """What the copy of a file has not. A file that is shorter than its copy was made anew, and is read from its beginning."""
        file, source = self.directory / name, f"runs/{self._job}/{name}"
        while True:
            have = file.stat().st_size if file.exists() and name != "job.yaml" else 0
            script = f"stat -c %s {source} 2>/dev/null || echo 0; tail -c +{have + 1} {source} 2>/dev/null | head -c {PIECE_BYTES}"
            size, _, piece = self._cluster.execute(self._cluster.namespace, pod, ["sh", "-c", script]).partition(b"\n")
            if int(size) < have:
                file.unlink()
                continue
            if piece:
                with file.open("wb" if have == 0 else "ab") as copy:
                    copy.write(piece)
            if name == "job.yaml" or have + len(piece) >= int(size):
                return
