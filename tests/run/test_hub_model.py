"""A whole run of a model that is named by its Hugging Face id and lies in the local cache, with files as real models have them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_cache import add_snapshot
from run_helpers import Run, Workspace
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_worker.generate import generate

COMMIT = "5" * 40
BESIDE = {
    # Transformers reads this, and refuses to write it: temperature without do_sample.
    "generation_config.json": json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}),
    "chat_template.jinja": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "LICENSE": "Apache 2.0",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of two steps."""
    root = tmp_path_factory.mktemp("hub")
    workspace = Workspace.make(root)
    for name, text in BESIDE.items():
        (root / "model" / name).write_text(text)
    add_snapshot(root / "cache", "owner/tiny", root / "model", COMMIT)
    shutil.rmtree(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(root / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        job = workspace.job(
            model={"path": "owner/tiny"}, trainer={"totalSteps": 2, "testFreq": 0}, checkpoint={"saveFreq": 0}
        )
        with Run(workspace, job, "run") as run:
            assert run.finish() == 0, run.output()
    assert [path.read_text() for path in (run.directory / "models").iterdir()] == [COMMIT]
    return run.directory / "checkpoints" / "epoch_0_step_2"


def test_the_checkpoint_is_what_the_model_was(saved: Path) -> None:
    actor = saved / "actor"
    assert {name: (actor / name).read_text() for name in BESIDE} == BESIDE
    assert not any(path.is_symlink() for path in actor.rglob("*"))
    tokenizer = AutoTokenizer.from_pretrained(actor)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False) == "1+1="


def test_transformers_and_vllm_load_it_and_give_the_same_greedy_answer(saved: Path) -> None:
    prompts = ["12+3=", "7-5="]
    lm, tokenizer = (kind.from_pretrained(saved / "actor") for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            output = lm.generate(ids, max_new_tokens=12, do_sample=False, temperature=1.0, top_p=1.0)
        expected.append([tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)])
    assert generate(saved, prompts, temperature=0.0, max_tokens=12) == expected
