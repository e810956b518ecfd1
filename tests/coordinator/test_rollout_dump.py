"""`trainer.rolloutDump`: what was generated and what was trained on, read back by `datasets`."""

from collections import Counter

import datasets
import numpy as np
import pytest
from coordinator_helpers import Engine
from coordinator_stage import BATCH, EPOCHS, PROMPTS, Stage

pytestmark = pytest.mark.asyncio


async def test_every_trajectory_is_kept_where_the_document_asks_for_it(stage: Stage) -> None:
    train = str(stage.root / "train.parquet")
    job = stage.job(
        trainer={"rolloutDump": True, "testFreq": 2},
        data={"trainFiles": [train], "validationFiles": [train], "trainBatchSize": BATCH, "maxPromptLength": 16},
    )
    async with stage.members(Engine("rollout-0")):
        batches = stage.keep_batches()
        await stage.train(job)
    files = sorted(path.name for path in (stage.root / "run" / "rollouts").iterdir())
    steps = PROMPTS * EPOCHS // BATCH
    assert [name for name in files if name.startswith("train")] == [
        f"train-{step:06d}.parquet" for step in range(1, steps + 1)
    ]
    assert "validation-000000.parquet" in files and f"validation-{steps:06d}.parquet" in files
    kept = datasets.load_dataset("parquet", data_files=str(stage.root / "run/rollouts/train-*.parquet"), split="train")
    assert Counter(kept["uid"]) == Counter(dict.fromkeys(stage.trained(), 2))
    for step, batch in enumerate(batches, 1):
        rows = [row for row in kept if row["step"] == step]
        tokens = [token for row in rows for token in (*row["prompt_token_ids"], *row["token_ids"])]
        assert tokens == batch.token_ids.numpy().tolist()
        lengths = batch.response_lengths.numpy()
        advantages = np.split(batch.advantages.numpy(), np.cumsum(lengths)[:-1])
        assert [row["advantage"] for row in rows] == pytest.approx(
            [float(each.mean()) for each in advantages], abs=1e-6
        )
    first = kept[0]
    assert first["outcome"] == "trained" and first["versions"] == [
        {"version": 0, "start": 0, "end": len(first["token_ids"])}
    ]
    assert len(first["log_probs"]) == len(first["token_ids"]) and first["sampled"] is None
    assert first["score"] is not None and first["ground_truth"]
