"""Which starting model a checkpoint belongs to."""

from pathlib import Path

import pytest

from grpo_worker.coordinator.run_state import check_same_model, describe_model
from grpo_worker.errors import DataError


def test_the_model_is_compared_by_contents(tmp_path: Path) -> None:
    """A hub id has no directory here: its name and revision count."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"1234")
    before = describe_model(str(model), None)
    (model / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"the weights \(4 bytes then, 5 now\)"):
        check_same_model(before, describe_model(str(model), None))
    hub = describe_model("Qwen/Qwen3-0.6B", "main")
    check_same_model(hub, dict(hub))
    with pytest.raises(DataError, match=r"began with Qwen/Qwen3-0\.6B@main, this document says Qwen/Qwen3-0\.6B@v2"):
        check_same_model(hub, describe_model("Qwen/Qwen3-0.6B", "v2"))
