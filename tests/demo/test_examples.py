import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from grpo_worker.config import Spec, load_job
from grpo_worker.config.base import camel

EXAMPLES = Path(__file__).parents[2] / "examples"
FULL_SIZE = EXAMPLES / "qwen3-8b-gsm8k.yaml"
# One of a pair that excludes the other, or a thing of the user's own.
LEFT_OUT = {
    "data.dataset",
    "data.chatTemplate.text",
    "actor.ppoMicroBatchSizePerGPU",
    "ref.logProbMicroBatchSizePerGPU",
    "rollout.logProbMicroBatchSizePerGPU",
    "rollout.agent",
    "algorithm.rolloutCorrection.rolloutIsLowerThreshold",
    "algorithm.rolloutCorrection.rolloutRsLowerThreshold",
    "network.rendezvousPort",
}


def _fields(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, str | None]]:
    """Path and verl name of each field of the document."""
    for info in model.model_fields.values():
        path, annotation = f"{above}{info.alias}", info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _fields(annotation, f"{path}.")
        else:
            extra: Any = info.json_schema_extra
            yield path, (extra or {}).get("x-verl")


def _lines(text: str) -> dict[str, str]:
    """The line that sets each path below `spec`."""
    found, stack = {}, []
    for line in text.splitlines():
        if not (match := re.match(r'( *)"?(\w+)"?:', line)):
            continue
        depth = len(match[1]) // 2
        stack = [*stack[:depth], match[2]]
        found[".".join(stack[1:])] = line
    return found


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_valid_job_named_as_its_file(example: Path) -> None:
    assert load_job(example).name == example.stem


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-drgrpo", "arithmetic-dapo"])
def test_the_demo_jobs_read_what_the_demo_makes_and_leave_room_for_the_answers(name: str) -> None:
    from grpo_worker.cli.demo import DIRECTORY
    from grpo_worker.demo.prepare import TRAIN_PROBLEMS
    from grpo_worker.demo.tasks import RESPONSE_TOKENS, Problem

    text, spec = (EXAMPLES / f"{name}.yaml").read_text(), load_job(EXAMPLES / f"{name}.yaml").spec
    assert "grpo demo prepare demo" in text and f"grpo run examples/{name}.yaml" in text
    assert spec.model.path == f"{DIRECTORY}/model"
    assert spec.data.train_files == [f"{DIRECTORY}/train.parquet"]
    assert spec.data.validation_files == [f"{DIRECTORY}/test.parquet"]
    assert len(Problem(100, 899).prompt) <= spec.data.max_prompt_length
    assert spec.data.max_response_length >= RESPONSE_TOKENS
    assert TRAIN_PROBLEMS % spec.data.train_batch_size == 0
    if spec.algorithm.overlong_buffer.enable:
        length = spec.algorithm.overlong_buffer.length
        assert length is not None and spec.data.max_response_length - length >= RESPONSE_TOKENS


def test_the_presets_set_what_the_comments_say() -> None:
    drgrpo, dapo = (load_job(EXAMPLES / f"arithmetic-{name}.yaml").spec for name in ("drgrpo", "dapo"))
    assert not drgrpo.algorithm.norm_adv_by_std and drgrpo.actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert dapo.actor.clip_ratio_high == 0.28 and dapo.algorithm.filter_groups.enable


def test_the_full_size_job_sets_every_parameter_that_verl_names() -> None:
    written = _lines(FULL_SIZE.read_text())
    missing = [path for path, verl in _fields(Spec) if verl and path not in written and path not in LEFT_OUT]
    assert missing == []


def test_its_comments_name_verls_flag_where_the_name_differs() -> None:
    written = _lines(FULL_SIZE.read_text())
    for path, verl in _fields(Spec):
        if verl is None or path not in written or camel(verl.rpartition(".")[2]) == path.rpartition(".")[2]:
            continue
        flag = verl.split(" ")[0].split("/")[0]
        assert f"# {flag}" in written[path], f"{path}: {flag} is not in {written[path]!r}"


def test_its_gpus_add_up() -> None:
    spec = load_job(FULL_SIZE).spec
    assert (spec.trainer.nodes, spec.trainer.gpus_per_node) == (2, 8)
    assert spec.data.train_batch_size * spec.rollout.n % (spec.trainer.nodes * spec.trainer.gpus_per_node) == 0
    document = yaml.safe_load(FULL_SIZE.read_text())
    assert document["spec"]["data"]["trainBatchSize"] == 1024 and document["spec"]["rollout"]["n"] == 5
