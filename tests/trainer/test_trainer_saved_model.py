"""What stands in `actor/` after a save: the model's own files, and a config.json that differs where the weights do."""

import json
from pathlib import Path

import pytest
import torch
from trainer_helpers import options_for, save_tiny_model, single_rank, whole_parameters
from transformers import AutoModelForCausalLM

from grpo_worker.protocol.messages import SaveRequest
from grpo_worker.trainer.engine import TrainerEngine

# Real models have such a file; Transformers reads it with a warning, and refuses to write it.
SAMPLING_WITHOUT_DO_SAMPLE = '{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}\n'
BESIDE = {
    "generation_config.json": SAMPLING_WITHOUT_DO_SAMPLE,
    "tokenizer.json": "{}",
    "tokenizer.model.v3": "sentences",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "modeling_own.py": "x = 1\n",
    "LICENSE.txt": "Apache 2.0",
    "README.md": "# A model\n",
}
NOT_OF_THE_MODEL = ("pytorch_model.bin.index.json", "optimizer.pt", "rows.parquet")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with what real ones have beside it; its config.json has a key of a later release, and the dtype's old name."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["of_a_later_release"] = {"kept": ["as", "it", "is"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "additional_chat_templates").mkdir()
    for name, text in {**BESIDE, **dict.fromkeys(NOT_OF_THE_MODEL, "")}.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainerEngine]:
    engine = TrainerEngine(options_for(source, model={"dtype": "bfloat16"}), single_rank())
    directory = tmp_path_factory.mktemp("checkpoint")
    engine.run(SaveRequest(directory=str(directory), step=1))
    status = engine.save_status(60.0)
    assert (status.done, status.error) == (True, "")
    return directory / "actor", engine


def test_files_beside_the_weights_are_copied_as_they_are(saved: tuple[Path, TrainerEngine]) -> None:
    actor, _ = saved
    held = {path.relative_to(actor).as_posix() for path in actor.rglob("*") if path.is_file()}
    assert held == {*BESIDE, "config.json", "model.safetensors"}
    assert {name: (actor / name).read_text() for name in BESIDE} == BESIDE


def test_config_changes_where_the_weights_do(source: Path, saved: tuple[Path, TrainerEngine]) -> None:
    original, config = (json.loads((folder / "config.json").read_text()) for folder in (source, saved[0]))
    assert original["torch_dtype"] == "float32"
    assert config == original | {"torch_dtype": "bfloat16"}


def test_it_loads_in_transformers_with_the_weights_that_were_trained(saved: tuple[Path, TrainerEngine]) -> None:
    actor, engine = saved
    loaded = AutoModelForCausalLM.from_pretrained(actor)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.temperature == 0.6
    for name, value in whole_parameters(engine.model).items():
        assert torch.equal(loaded.get_parameter(name), value.bfloat16()), name
