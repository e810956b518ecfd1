"""Which checkpoint a run goes on from.

Invariant: what is returned is whole by its manifest: every file has its size, and what the coordinator itself reads its checksum. The
trainer compares the checksums of the shards while it loads them, so each byte is read once; what it refuses is passed over by asking
again. A damaged checkpoint is never used and never hidden: it is in `skipped`, with what is wrong with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from grpo_worker.checkpoint.layout import (
    ACTOR_DIRECTORY,
    COORDINATOR_FILE,
    STATE_DIRECTORY,
    CheckpointName,
    list_checkpoints,
)
from grpo_worker.checkpoint.manifest import Manifest, read_manifest, verify
from grpo_worker.errors import CheckpointDamagedError, ConfigError

AUTO, NEVER = "auto", "never"


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def epoch(self) -> int:
        return self.manifest.epoch

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def actor(self) -> Path:
        return self.path / ACTOR_DIRECTORY

    @property
    def state(self) -> Path:
        return self.path / STATE_DIRECTORY

    @property
    def coordinator_file(self) -> Path:
        return self.path / COORDINATOR_FILE


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint that is damaged, and how."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ResumeDecision:
    """Where to go on (None: start at step 0), and the damaged checkpoints that were passed over, the newest first."""

    point: ResumePoint | None
    skipped: tuple[SkippedCheckpoint, ...] = ()


def find_resume(root: Path, mode: str = AUTO, refused: Mapping[Path, str] = MappingProxyType({})) -> ResumeDecision:
    """Decide by `checkpoint.resume`.

    Args:
        mode: `auto` is the checkpoint saved last, or the one before when that is damaged; `never` is none; anything else is the
            directory of one checkpoint, absolute, relative to the current directory, or a name in `root`.
        refused: checkpoints that turned out to be damaged when they were loaded, and how.

    Raises:
        CheckpointDamagedError: auto, and all checkpoints are damaged; or the one named is.
        ConfigError: the one named does not exist, or a newer program wrote it.
    """
    if mode == NEVER:
        return ResumeDecision(None)
    if mode != AUTO:
        return ResumeDecision(_named(root, mode, refused))
    skipped: list[SkippedCheckpoint] = []
    for directory in newest_first(root):
        try:
            return ResumeDecision(_whole(directory, refused), tuple(skipped))
        except CheckpointDamagedError as error:
            skipped.append(SkippedCheckpoint(directory, str(error)))
    if skipped:
        reasons = "\n".join(f"  {damaged.reason}" for damaged in skipped)
        raise CheckpointDamagedError(
            f"checkpoint.resume: no checkpoint in {root} can be used ({len(skipped)} damaged):\n{reasons}\n"
            "Restore one of them, or set checkpoint.resume: never to start anew."
        )
    return ResumeDecision(None)


def newest_first(root: Path) -> list[Path]:
    """Checkpoints by the order in which they were saved, the last first. One without a readable manifest counts as newest: it has
    to be looked at, and reported."""

    def key(directory: Path) -> tuple[int, int]:
        name = CheckpointName.parse(directory.name)
        step = name.step if name else 0
        try:
            return (-read_manifest(directory).sequence, -step)
        except (CheckpointDamagedError, ConfigError):
            return (-(2**63), -step)

    return sorted(list_checkpoints(root), key=key)


def named_checkpoint(root: Path, mode: str) -> Path | None:
    """The directory that `checkpoint.resume` names; None for auto and never, and when there is no such directory."""
    if mode in (AUTO, NEVER):
        return None
    candidates = [root / mode, Path(mode).expanduser()]
    return next((path.resolve() for path in candidates if path.is_dir()), None)


def _named(root: Path, mode: str, refused: Mapping[Path, str]) -> ResumePoint:
    directory = named_checkpoint(root, mode)
    if directory is None:
        held = ", ".join(path.name for path in newest_first(root)[:5]) or "none"
        raise ConfigError(
            f"checkpoint.resume: there is no checkpoint {mode} (checkpoints in {root}: {held}). "
            "Name one of them, or set auto or never."
        )
    return _whole(directory, refused)


def _whole(directory: Path, refused: Mapping[Path, str]) -> ResumePoint:
    if directory in refused:
        raise CheckpointDamagedError(refused[directory])
    verify(directory, deep=False)
    manifest = verify(directory, below=COORDINATOR_FILE)
    name = CheckpointName.parse(directory.name)
    if name is not None and name != CheckpointName(manifest.epoch, manifest.step):
        raise CheckpointDamagedError(
            f"{directory}: its manifest is of epoch {manifest.epoch}, step {manifest.step}. Was the directory renamed?"
        )
    return ResumePoint(directory, manifest)
