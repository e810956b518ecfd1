"""Where a run keeps its files.

Invariant: every path of a run directory is named here, once; the directory comes from `GRPO_RUN_DIR`, set by whoever starts the process.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from grpo_worker.environment import RUN_DIRECTORY


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    root: Path

    @classmethod
    def of_environment(cls, job_name: str) -> "RunDirectory":
        """`$GRPO_RUN_DIR`, or runs/<job name>; made if missing."""
        root = Path(os.environ.get(RUN_DIRECTORY) or Path("runs") / job_name)
        root.mkdir(parents=True, exist_ok=True)
        return cls(root)

    @property
    def job(self) -> Path:
        """The resolved document."""
        return self.root / "job.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def ledger(self) -> Path:
        """Which prompts each step trained on."""
        return self.root / "ledger.jsonl"

    @property
    def spans(self) -> Path:
        """Who did what from when to when, by step."""
        return self.root / "spans.jsonl"

    @property
    def rollouts(self) -> Path:
        """Every trajectory, a Parquet file a step, where the document asks for it."""
        return self.root / "rollouts"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run_file(self) -> Path:
        """Who runs here: URL of the coordinator, process ids."""
        return self.root / "run.json"

    def model_commit(self, model_id: str, revision: str | None) -> Path:
        """Which commit of a model from the hub this run trains."""
        return self.root / "models" / f"{model_id}@{revision or 'main'}".replace("/", "--")

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    def checkpoints(self, path: str) -> Path:
        """`checkpoint.path`: a relative one is below the run directory."""
        return self.root / Path(path).expanduser()
