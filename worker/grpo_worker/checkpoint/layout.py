"""Names under the checkpoint root.

    <root>/epoch_{E}_step_{S}/actor/            the model in Hugging Face format
                              state/            shards of model, optimizer, scheduler, RNG
                              coordinator.json  data cursor, groups in flight, versions
                              manifest.json     sizes and checksums, written last
    <root>/latest                               relative link to the checkpoint saved last
    <root>/.tmp-*                               saves and removals under way, or cut off

Invariant: `latest` is replaced in one rename, after the checkpoint that it names is whole.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from grpo_worker.checkpoint.files import fsync_directory

ACTOR_DIRECTORY = "actor"
STATE_DIRECTORY = "state"
COORDINATOR_FILE = "coordinator.json"
MANIFEST_FILE = "manifest.json"
LATEST = "latest"
TEMPORARY_PREFIX = ".tmp-"

_NAME = re.compile(r"epoch_(0|[1-9]\d*)_step_(0|[1-9]\d*)")


@dataclass(frozen=True)
class CheckpointName:
    """`epoch_{epoch}_step_{step}`."""

    epoch: int
    step: int

    @classmethod
    def parse(cls, text: str) -> "CheckpointName | None":
        """None when `text` is no checkpoint's name."""
        found = _NAME.fullmatch(text)
        return cls(int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        return f"epoch_{self.epoch}_step_{self.step}"


def list_checkpoints(root: Path) -> list[Path]:
    """Directories under `root` with a checkpoint's name, the highest step first; none when there is no such directory."""
    try:
        entries = list(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = [
        (name, entry) for entry in entries if (name := CheckpointName.parse(entry.name)) and _is_real_directory(entry)
    ]
    return [entry for _, entry in sorted(named, key=lambda pair: (pair[0].step, pair[0].epoch), reverse=True)]


def latest(root: Path) -> Path | None:
    """The checkpoint that `latest` names; None when there is no `latest` or it names nothing that exists."""
    link = root / LATEST
    try:
        target = os.readlink(link) if link.is_symlink() else link.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if CheckpointName.parse(target) is None or not _is_real_directory(root / target):
        return None
    return root / target


def set_latest(root: Path, name: CheckpointName) -> None:
    """Point `latest` to `name`: a relative link, so the root can be moved or mounted elsewhere."""
    staged = root / f"{TEMPORARY_PREFIX}{LATEST}"
    staged.unlink(missing_ok=True)
    try:
        os.symlink(str(name), staged)
    except PermissionError:  # EPERM: what a file system without links answers (object-store mounts, some SMB shares)
        staged.write_text(f"{name}\n", encoding="utf-8")
    os.replace(staged, root / LATEST)
    fsync_directory(root)


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
