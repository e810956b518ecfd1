"""What the coordinator says of the data it has read: how much there is, and how much is not used."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from grpo_worker.config import Spec
from grpo_worker.coordinator.build import _open_data, dispatch_options
from grpo_worker.data.tokenize import PromptEncoder
from grpo_worker.data.tokenizer import load_tokenizer
from grpo_worker.errors import DataError
from grpo_worker.metric_loggers.events import EventLog, read_events


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "3 prompts, the longest of 4 tokens; 1 over data.maxPromptLength left out"),
        (
            {"filterOverlongPrompts": False, "truncation": "left"},
            "4 prompts, the longest of 4 tokens; 1 cut to data.maxPromptLength",
        ),
        ({"maxPromptLength": 16}, "4 prompts, the longest of 12 tokens"),
    ],
)
def test_prompts_that_are_left_out_or_cut_are_told_for_training_and_validation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, fields: dict[str, object], told: str
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"prompt": ["1+1=", "2+2=", "3+3=", "1+2+3+4+5+6="], "reward": ["2", "4", "6", "21"]}), file
    )
    data = {
        "trainFiles": [str(file)],
        "validationFiles": [str(file)],
        "trainBatchSize": 2,
        "maxPromptLength": 4,
    } | fields
    spec = Spec.model_validate(
        {"model": {"path": str(tmp_path / "model")}, "data": data, "actor": {"ppoMiniBatchSize": 2}}
    )
    events = EventLog(tmp_path / "events.jsonl", "coordinator", echo=False)
    _, _, validation = _open_data(spec, tmp_path / "model", events)
    messages = [event["message"] for event in read_events(events.path)[0] if event["reason"] == "DataLoaded"]
    assert messages == [f"Data: {told}", f"Validation data: {told}"]
    assert len(validation) == int(told[0])


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}{{ messages[-1].content }}{{ '' if thinking else '!' }}"
)


@pytest.mark.parametrize(
    ("chat_template", "text"),
    [
        ({}, "1+1="),
        ({"text": TEMPLATE}, "1+1=!"),
        ({"text": TEMPLATE, "kwargs": {"thinking": True}}, "1+1="),
        ({"text": TEMPLATE, "tools": [{"name": "2"}, {"name": "3"}]}, "2;3;1+1=!"),
        ({"text": TEMPLATE, "apply": "never"}, "1+1="),
    ],
)
def test_the_template_its_variables_and_its_tools_make_the_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, chat_template: dict[str, object], text: str
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1=", "reward": 2}\n')
    data = {
        "trainFiles": [str(file)],
        "validationFiles": [str(file)],
        "trainBatchSize": 1,
        "chatTemplate": chat_template,
    }
    spec = Spec.model_validate({
        "model": {"path": str(tmp_path / "model")}, "data": data, "actor": {"ppoMiniBatchSize": 1}, "reward": {"function": "math"},
    })  # fmt: skip
    _, dataset, validation = _open_data(
        spec, tmp_path / "model", EventLog(tmp_path / "events.jsonl", "coordinator", echo=False)
    )
    assert [next(dataset.iterate()).text, validation[0].text] == [text, text]


def test_a_template_that_is_no_jinja_names_the_row_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in %}")
    encoder = PromptEncoder(tokenizer, 16)
    with pytest.raises(
        DataError, match=r"row 3: the chat template refuses the prompt .* or set data.chatTemplate.apply: never"
    ):
        encoder.encode("1+1=", "row 3")


def test_what_is_sampled_and_where_it_stops_goes_to_the_engines(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path)
    info = load_tokenizer(tmp_path)
    rollout = {"topP": 0.9, "topK": 20, "minP": 0.1, "stop": ["="], "stopTokenIds": [1]}
    spec = Spec.model_validate({"model": {"path": "m"}, "rollout": rollout})
    sampling = dispatch_options(spec, info).sampling
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 20, 0.1)
    assert sampling.stop_token_ids == list(dict.fromkeys([*info.eos_ids, tokenizer.convert_tokens_to_ids("="), 1]))
