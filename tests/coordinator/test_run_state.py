"""Which starting model a checkpoint belongs to."""

from pathlib import Path

import pytest

from grpo_worker.coordinator.run_state import check_same_model, describe_model
from grpo_worker.errors import DataError


def test_the_model_is_compared_by_contents_wherever_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    before = describe_model("Qwen/Qwen3-0.6B", "main", tmp_path)
    check_same_model(before, describe_model("/models/copied", None, tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(
        DataError,
        match=r"began with Qwen/Qwen3-0\.6B@main, this document says Qwen/Qwen3-0\.6B@v2, .* the weights \(4 bytes then, 5 now\)",
    ):
        check_same_model(before, describe_model("Qwen/Qwen3-0.6B", "v2", tmp_path))
