"""`manifest.json`: what a whole checkpoint consists of.

Invariant: the manifest is written after every file that it lists is on disk, and it carries a checksum of itself; so a directory
whose files match its manifest holds exactly what was saved.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from grpo_worker.checkpoint.files import (
    CHECKSUM_PREFIX,
    DIRECTORY_MODE,
    FILE_MODE,
    checksum_file,
    fsync_directory,
    seal,
    share,
)
from grpo_worker.checkpoint.layout import MANIFEST_FILE
from grpo_worker.errors import CheckpointDamagedError, ConfigError

FORMAT_VERSION = 1
# Most problems that one message lists; a checkpoint of many shards can lose all of them at once.
MAX_LISTED = 20
_THREADS = 8


@dataclass(frozen=True)
class FileEntry:
    """Size and xxh3_64 checksum of one file."""

    size_bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    `sequence` grows by one with each save into a root, so the order of saves does not hang on clocks or on step numbers (a run that
    started anew in the same root has lower ones). `time` is in unix seconds. `files` is keyed by relative POSIX path.
    """

    epoch: int
    step: int
    sequence: int
    incarnation: int
    time: float
    files: Mapping[str, FileEntry]
    format_version: int = FORMAT_VERSION

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())


def write_manifest(
    directory: Path,
    files: Mapping[str, str],
    *,
    epoch: int,
    step: int,
    sequence: int = 1,
    incarnation: int = 0,
    now: float | None = None,
) -> Manifest:
    """Write the manifest of everything in `directory`, and make directories and manifest durable and readable by the group.

    Args:
        files: checksums of the files that their writers have sealed, by relative path; those not named here are sealed now.

    Raises:
        CheckpointDamagedError: a file named in `files` is not there.
    """
    present = list(_relative_files(directory))
    missing = sorted(set(files) - set(present))
    if missing:
        raise CheckpointDamagedError(
            f"{directory}: {_listing([f'{path}: was reported as written and is missing' for path in missing])}. "
            "Do all processes of the job see the same checkpoint.path?"
        )

    def entry(path: str) -> FileEntry:
        file = directory / path
        checksum = files.get(path) or seal(file)
        return FileEntry(file.stat().st_size, checksum)

    with ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(present, pool.map(entry, present), strict=True))
    manifest = Manifest(epoch, step, sequence, incarnation, time.time() if now is None else now, entries)
    target = directory / MANIFEST_FILE
    with open(target, "w", encoding="utf-8") as file:
        file.write(_encode(manifest))
        file.flush()
        os.fsync(file.fileno())
    share(target, FILE_MODE)
    for parent in sorted({(directory / path).parent for path in present} | {directory}, reverse=True):
        share(parent, DIRECTORY_MODE)
        fsync_directory(parent)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointDamagedError when it is missing, cut off or changed; ConfigError when a newer program wrote it."""
    path = directory / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointDamagedError(
            f"{directory}: {MANIFEST_FILE} is missing, so the checkpoint is not whole"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointDamagedError(f"{directory}: {MANIFEST_FILE} cannot be read: {error}") from error
    try:
        document = json.loads(text)
        version = document["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}. "
                "Use the program that saved it, or a newer one."
            )
        manifest = Manifest(
            epoch=int(document["epoch"]),
            step=int(document["step"]),
            sequence=int(document["sequence"]),
            incarnation=int(document["incarnation"]),
            time=float(document["time"]),
            files={str(p): FileEntry(int(e["size_bytes"]), str(e["checksum"])) for p, e in document["files"].items()},
            format_version=int(version),
        )
        intact = document["checksum"] == _own_checksum(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamagedError(f"{directory}: {MANIFEST_FILE} is cut off or changed ({error!r})") from error
    if not intact:
        raise CheckpointDamagedError(f"{directory}: {MANIFEST_FILE} does not match its own checksum")
    return manifest


def verify(directory: Path, deep: bool = True, below: str = "") -> Manifest:
    """Compare the files with the manifest: sizes, and with `deep` the checksums too. Files it does not list are not looked at.

    Args:
        below: only this file, or the files below this directory, such as `actor`.

    Raises:
        CheckpointDamagedError: names each file that is missing, of another size, unreadable or changed.
    """
    manifest = read_manifest(directory)
    chosen = {
        path: entry
        for path, entry in manifest.files.items()
        if not below or path == below or path.startswith(f"{below.rstrip('/')}/")
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: file_problem(directory, item[0], item[1], deep), sorted(chosen.items()))
        problems = [problem for problem in found if problem]
    if below and not chosen:
        problems = [f"{below}: the manifest lists no such file, and none below it"]
    if problems:
        raise CheckpointDamagedError(f"{directory}: {_listing(problems)}")
    return manifest


def file_problem(directory: Path, path: str, entry: FileEntry, deep: bool = True) -> str | None:
    """What is wrong with one file of the manifest; None when nothing is."""
    file = directory / path
    try:
        size_bytes = file.stat().st_size
        if size_bytes != entry.size_bytes:
            return f"{path}: {size_bytes} bytes, {entry.size_bytes} were saved"
        if deep and checksum_file(file) != entry.checksum:
            return content_changed(path, entry)
    except (FileNotFoundError, NotADirectoryError):
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def content_changed(path: str, entry: FileEntry) -> str:
    return f"{path}: its content changed (checksum {entry.checksum} was saved)"


def _listing(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return "; ".join(problems[:MAX_LISTED]) + more


def _relative_files(directory: Path) -> Iterator[str]:
    for parent, directories, names in os.walk(directory):
        directories.sort()
        for name in sorted(names):
            path = (Path(parent) / name).relative_to(directory).as_posix()
            if path != MANIFEST_FILE:
                yield path


def _content(manifest: Manifest) -> dict[str, Any]:
    return {
        "format_version": manifest.format_version,
        "epoch": manifest.epoch,
        "step": manifest.step,
        "sequence": manifest.sequence,
        "incarnation": manifest.incarnation,
        "time": manifest.time,
        "files": {
            path: {"size_bytes": entry.size_bytes, "checksum": entry.checksum}
            for path, entry in sorted(manifest.files.items())
        },
    }


def _own_checksum(manifest: Manifest) -> str:
    canonical = json.dumps(_content(manifest), sort_keys=True, separators=(",", ":"))
    return CHECKSUM_PREFIX + xxhash.xxh3_64_hexdigest(canonical.encode())


def _encode(manifest: Manifest) -> str:
    return json.dumps({**_content(manifest), "checksum": _own_checksum(manifest)}, indent=1) + "\n"
