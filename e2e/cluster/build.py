"""Builds the binaries of the recipe from Go modules. A binary appears in the cache whole or not at all."""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from .errors import ClusterError
from .host import cache_directory, need
from .recipe import BINARIES, MODULES, Binary, recipe_hash

BUILD_TIMEOUT_SECONDS = 1800


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def binaries_directory() -> Path:
    """The folder of this recipe's binaries."""
    return cache_directory() / f"kubernetes-{recipe_hash()}"


def build(names: Iterable[str] | None = None) -> Path:
    """Build those of the named binaries (all by default) that the cache lacks; return their folder.

    Another process that builds at the same time is waited for: it saves this one the work.
    """
    wanted = None if names is None else set(names)
    unknown = (wanted or set()) - {binary.name for binary in BINARIES}
    if unknown:
        raise ClusterError(f"The recipe has no {', '.join(sorted(unknown))}.")
    directory = binaries_directory()
    asked = [binary for binary in BINARIES if wanted is None or binary.name in wanted]
    if not _missing(directory, asked):
        return directory
    need("go")
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (directory / ".lock").open("w") as lock:
        _lock(lock.fileno(), f"the build in {directory}")
        for binary in _missing(directory, asked):
            _build_one(binary, directory)
    say(f"Built into {directory} in {time.monotonic() - started:.0f} s.")
    return directory


def _missing(directory: Path, binaries: list[Binary]) -> list[Binary]:
    return [binary for binary in binaries if not (directory / binary.name).exists()]


def _lock(descriptor: int, what: str) -> None:
    deadline = time.monotonic() + BUILD_TIMEOUT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ClusterError(f"Another process holds {what} for {BUILD_TIMEOUT_SECONDS} s.") from None
            time.sleep(0.5)


def _build_one(binary: Binary, directory: Path) -> None:
    started = time.monotonic()
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath -buildvcs=false", "GOWORK": "off"}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch:
        target = Path(scratch) / binary.name
        flags = f"-s -w {binary.linker_flags}".strip()
        command = ["go", "build", "-ldflags", flags, "-o", str(target), binary.package]
        try:
            done = subprocess.run(
                command,
                cwd=MODULES / binary.module,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"go build {binary.package}: no end after {BUILD_TIMEOUT_SECONDS} s") from error
        if done.returncode != 0:
            raise ClusterError(f"go build {binary.package} in {MODULES / binary.module} failed:\n{done.stderr[-4000:]}")
        target.rename(directory / binary.name)
    say(f"  {binary.name}: {time.monotonic() - started:.1f} s")
