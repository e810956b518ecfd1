"""All containers of the node live under one control group, so its end finds each of their processes."""

from pathlib import Path

NAME = "grpo-e2e"
_ROOT = Path("/sys/fs/cgroup")


def _directories() -> list[Path]:
    """The group in each hierarchy (version 1) or in the one there is (version 2)."""
    if (_ROOT / "cgroup.controllers").exists():
        return [_ROOT / NAME]
    return [path / NAME for path in sorted(_ROOT.iterdir()) if path.is_dir() and not path.is_symlink()]


def make() -> None:
    """The kubelet asks for its root group to exist."""
    for directory in _directories():
        directory.mkdir(exist_ok=True)
    if (_ROOT / "cgroup.controllers").exists():
        controllers = (_ROOT / "cgroup.controllers").read_text().split()
        wanted = [each for each in controllers if each in ("cpu", "cpuset", "memory", "pids", "io", "hugetlb")]
        (_ROOT / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in wanted))


def members() -> list[int]:
    """Processes of the node's containers."""
    found: set[int] = set()
    for directory in _directories():
        for file in directory.rglob("cgroup.procs"):
            try:
                found.update(int(line) for line in file.read_text().split())
            except OSError:
                continue  # the group went while we looked
    return sorted(found)


def remove() -> None:
    """Remove the group and those below it; they must be empty."""
    for directory in _directories():
        if directory.exists():
            for child in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
                child.rmdir()
            directory.rmdir()
