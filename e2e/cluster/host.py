"""What the machine offers: commands, free ports, waiting. Nothing here waits without a limit."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .errors import ClusterError

# The Debian package that brings each command.
PACKAGES = {
    "buildah": "buildah",
    "conntrack": "conntrack",
    "go": "golang-go (Go 1.25 or newer; https://go.dev/dl where Debian's is older)",
    "ip": "iproute2",
    "iptables": "iptables",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "openssl": "openssl",
    "runc": "runc",
    "setpriv": "util-linux",
}


def need(*commands: str) -> None:
    """Raise ClusterError naming each command that is missing, and how Debian installs them."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    missing = [command for command in commands if shutil.which(command, path=path) is None]
    if not missing:
        return
    lines = [f"This machine lacks {', '.join(missing)}."]
    debian = [PACKAGES[command] for command in missing if command != "go"]
    if debian:
        lines.append(f"Install: apt-get install --yes --no-install-recommends {' '.join(debian)}")
    if "go" in missing:
        lines.append(f"Install: {PACKAGES['go']}")
    raise ClusterError("\n".join(lines))


def need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise ClusterError(f"{what} needs root: it makes a bridge, mounts and containers.")


def cache_directory() -> Path:
    """Where built binaries, images and the node's data lie (environment variable CACHE)."""
    return Path(os.environ.get("CACHE") or Path.home() / ".cache" / "grpo-operator")


def run(
    command: Sequence[object],
    *,
    input_text: str | None = None,
    timeout_seconds: float = 60,
    check: bool = True,
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; raise ClusterError with its words when it fails or takes too long."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=input_text,
            stdin=subprocess.DEVNULL if input_text is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            env=environment,
            cwd=directory,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        words_so_far = (error.stderr or b"")[-2000:].decode(errors="replace") if isinstance(error.stderr, bytes) else ""
        raise ClusterError(f"{' '.join(words)}: no end after {timeout_seconds:.0f} s\n{words_so_far}") from error
    if check and done.returncode != 0:
        raise ClusterError(f"{' '.join(words)}: exit code {done.returncode}\n{(done.stderr or done.stdout)[-4000:]}")
    return done


def wait_until(
    condition: Callable[[], bool],
    what: str,
    *,
    timeout_seconds: float,
    every_seconds: float = 0.1,
    explain: Callable[[], str] | None = None,
) -> None:
    """Ask until the condition holds; raise ClusterError with `explain()` when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            detail = f"\n{explain()}" if explain else ""
            raise ClusterError(f"{what}: not after {timeout_seconds:.0f} s{detail}")
        time.sleep(every_seconds)


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on now (all held at once, so they differ)."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def write_json(path: Path, document: Any) -> Path:
    """Write a document that others read as YAML or JSON; private, as it may carry a key."""
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
