"""A Hugging Face cache on disk, laid out as huggingface_hub does: blobs, snapshots of links to them, refs."""

import hashlib
from pathlib import Path


def add_snapshot(cache: Path, model_id: str, source: Path, commit: str, branch: str = "main") -> Path:
    """Put the files of `source` into the cache as `commit`, where `branch` is from now on; the snapshot's directory."""
    root = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = snapshot / file.relative_to(source)
        for folder in (blob.parent, link.parent, root / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(Path(*[".."] * (len(link.relative_to(root).parts) - 1)) / "blobs" / blob.name)
    (root / "refs" / branch).write_text(commit)
    return snapshot
