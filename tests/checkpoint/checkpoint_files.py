"""Small checkpoints for the tests of this folder."""

from pathlib import Path

from grpo_worker.checkpoint import CheckpointTransaction

FILES = {
    "actor/config.json": b'{"model_type": "qwen3"}',
    "actor/model.safetensors": bytes(range(256)) * 40,
    "state/__0_0.distcp": b"shard of rank 0" * 100,
    "state/.metadata": b"where each tensor lies",
    "coordinator.json": b'{"cursor": {"epoch": 0, "position": 64}}',
}


def fill(directory: Path, files: dict[str, bytes] = FILES) -> None:
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)


def save(root: Path, step: int, epoch: int = 0, files: dict[str, bytes] = FILES) -> Path:
    """A whole checkpoint of `step` under `root`."""
    with CheckpointTransaction(root, epoch, step) as transaction:
        fill(transaction.path, files)
        transaction.commit()
    return transaction.final_path
