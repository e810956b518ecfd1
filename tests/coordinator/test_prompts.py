"""What the coordinator says of the data it has read: how much there is, and how much is not used."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from grpo_worker.config import Spec
from grpo_worker.coordinator.build import _open_data
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
