"""2N steps are N steps, kill -9 of every process, resume, N steps: bit for bit (maxStaleness 0, CPU, float32), whether weights go by the
store, over a group, or through memory that trainer and engine share."""

from pathlib import Path

import torch
from metric_names import unlisted
from run_helpers import Run, Workspace, repeatable
from safetensors.torch import load_file


def optimizer_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of the DCP shards, read without the trainer."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint._traverse import traverse_state_dict
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, object] = {}
    _load_state_dict(
        state, storage_reader=FileSystemReader(checkpoint / "state"), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    flat: dict[str, torch.Tensor] = {}
    traverse_state_dict(state, lambda path, value: flat.__setitem__(".".join(map(str, path)), value))
    return flat


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    workspace = Workspace.make(tmp_path)
    with Run(workspace, workspace.job(), "whole") as whole:
        assert whole.finish() == 0, whole.output()
    with Run(workspace, workspace.job(network={"weightSync": "nccl"}), "cut") as cut:
        cut.wait_until(lambda: len(cut.checkpoints()) >= 2 and cut.steps() >= 2)
        cut.kill_everything()
        assert cut.steps() < 4, "killed too late to show anything"
    with Run(workspace, workspace.job(placement="Colocated"), "cut") as resumed:
        assert resumed.finish() == 0, resumed.output()
    assert "Resuming from" in resumed.output()
    assert [line["weight_sync/pull_seconds"] > 0 for line in whole.lines("metrics.jsonl")] == [True] * 4
    assert [line["weight_sync/pull_seconds"] for line in resumed.lines("metrics.jsonl")[-2:]] == [0.0] * 2
    assert all(("timing_s/sleep" in line) == (line["step"] > 2) for line in resumed.lines("metrics.jsonl")[-2:])
    assert not [event for event in resumed.lines("events.jsonl") if event["reason"].startswith("Weight")]

    assert resumed.lines("ledger.jsonl") == whole.lines("ledger.jsonl")
    metrics = repeatable(whole.lines("metrics.jsonl"))
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert unlisted(whole.lines("metrics.jsonl") + resumed.lines("metrics.jsonl")) == set()
    assert any(line["actor/grad_norm"] > 0 for line in metrics), "nothing was learnt, so nothing was compared"
    assert repeatable(resumed.lines("metrics.jsonl")) == metrics
    last = whole.checkpoints()[-1]
    assert resumed.checkpoints()[-1] == last
    ours, theirs = (
        load_file(run.directory / "checkpoints" / last / "actor" / "model.safetensors") for run in (whole, resumed)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before, after = (optimizer_state(run.directory / "checkpoints" / last) for run in (whole, resumed))
    assert before.keys() == after.keys()
    tensors = [name for name, value in before.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 50
    assert all(torch.equal(before[name], after[name]) for name in tensors)


def test_rollout_and_trainer_agree_on_log_probs_to_1e_4(tmp_path: Path) -> None:
    workspace = Workspace.make(tmp_path)
    with Run(workspace, workspace.job(rollout={"n": 4, "temperature": 0.7}), "run") as run:
        assert run.finish() == 0, run.output()
    lines = run.lines("metrics.jsonl")
    assert len(lines) == 4
    assert all(line["training/rollout_logprobs_abs_diff_max"] < 1e-4 for line in lines)
