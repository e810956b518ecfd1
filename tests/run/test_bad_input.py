"""`grpo run` with input that cannot work: one readable message, the right exit code, soon, and nothing lost."""

import json
import socket
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_helpers import Run, Workspace

Spoil = Callable[[Workspace], dict[str, dict[str, object]]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace.make(tmp_path_factory.mktemp("bad"))


def data(files: list[str], **fields: object) -> dict[str, dict[str, object]]:
    return {"data": {"trainFiles": files, **fields}}


def renamed_column(workspace: Workspace) -> dict[str, dict[str, object]]:
    pq.write_table(pa.table({"prompt": ["1+1="], "Reward": ["2"]}), workspace.root / "renamed.parquet")
    return data(["renamed.parquet"])


def empty_file(workspace: Workspace) -> dict[str, dict[str, object]]:
    (workspace.root / "empty.parquet").write_bytes(b"")
    return data(["empty.parquet"])


def mixed_types(workspace: Workspace) -> dict[str, dict[str, object]]:
    pq.write_table(pa.table({"prompt": [1, 2], "reward": ["2", "3"]}), workspace.root / "numbers.parquet")
    return data(["train.parquet", "numbers.parquet"])


def long_prompt(workspace: Workspace) -> dict[str, dict[str, object]]:
    rows = pa.table({"prompt": ["1+1=", "1" * 40], "reward": ["2", "3"]})
    pq.write_table(rows, workspace.root / "long.parquet")
    return data(["long.parquet"], filterOverlongPrompts=False, truncation="error", trainBatchSize=2) | {
        "actor": {"ppoMiniBatchSize": 2}
    }


def no_eos(workspace: Workspace) -> dict[str, dict[str, object]]:
    model = workspace.root / "no-eos"
    if not model.exists():
        model.mkdir()
        for file in (workspace.root / "model").iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        config = json.loads((model / "tokenizer_config.json").read_text())
        config.pop("eos_token")
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    return {"model": {"path": "no-eos"}}


def no_model(workspace: Workspace) -> dict[str, dict[str, object]]:
    return {"model": {"path": "./modle"}}


def no_reward_function(workspace: Workspace) -> dict[str, dict[str, object]]:
    return {"reward": {"function": "rewards.py:digit"}}


def checkpoint_path_is_a_file(workspace: Workspace) -> dict[str, dict[str, object]]:
    (workspace.root / "file").write_text("")
    return {"checkpoint": {"path": str(workspace.root / "file")}}


def damaged_checkpoint(workspace: Workspace) -> dict[str, dict[str, object]]:
    checkpoint = workspace.root / "damaged" / "epoch_0_step_4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{")
    return {"checkpoint": {"path": str(checkpoint.parent)}}


CASES: list[tuple[Spoil, int, list[str]]] = [
    (renamed_column, 65, ["data.trainFiles[0]", "renamed.parquet", "'reward'", "Reward"]),
    (empty_file, 65, ["empty.parquet", "empty"]),
    (mixed_types, 65, ["numbers.parquet", "prompt"]),
    (long_prompt, 65, ["long.parquet", "row 1", "16"]),
    (no_eos, 65, ["no-eos", "eos"]),
    (no_model, 65, ["model.path", "modle", "model"]),
    (no_reward_function, 65, ["reward.function", "no function 'digit'", "digits"]),
    (checkpoint_path_is_a_file, 78, ["checkpoint.path", "file"]),
]


@pytest.mark.parametrize(("spoil", "code", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_it_is_refused_with_what_where_and_what_to_do(
    workspace: Workspace, spoil: Spoil, code: int, words: list[str]
) -> None:
    with Run(workspace, workspace.job(**spoil(workspace)), f"run-{spoil.__name__}") as run:
        assert run.finish() == code, run.output()
        message = run.output().split("grpo: ")[-1]
        assert "Traceback (most recent call last)" not in message
        assert "Its log: " in message
        for word in words:
            assert word in message, message


def test_all_checkpoints_damaged_is_told_once_the_trainer_is_there(workspace: Workspace) -> None:
    with Run(workspace, workspace.job(**damaged_checkpoint(workspace)), "run-damaged") as run:
        assert run.finish() == 81, run.output()
        assert "epoch_0_step_4" in run.output() and "checkpoint.resume: never" in run.output()
    assert (workspace.root / "damaged" / "epoch_0_step_4").exists(), "evidence is kept"


def test_a_port_in_use_is_named(workspace: Workspace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Run(workspace, workspace.job(network={"coordinatorPort": port}), "run-port") as run:
            assert run.finish() == 78
            assert f"network.coordinatorPort: port {port} is in use" in run.output()


REWARDS = """
import time


def raises(sample):
    raise KeyError("no such answer")


def hangs(sample):
    time.sleep(1e6)


def not_a_number(sample):
    return float("nan")
"""


@pytest.mark.parametrize(
    ("function", "word"), [("raises", "no such answer"), ("hangs", "timeout"), ("not_a_number", "nan")]
)
def test_a_reward_function_that_never_scores_ends_the_run_and_is_never_a_zero(
    workspace: Workspace, function: str, word: str
) -> None:
    (workspace.root / "bad_rewards.py").write_text(REWARDS)
    job = workspace.job(
        reward={"function": f"bad_rewards.py:{function}", "timeoutSeconds": 0.2, "workers": 2},
        data={"trainFiles": ["train.parquet"], "trainBatchSize": 4, "maxPromptLength": 16, "maxResponseLength": 4},
        rollout={"n": 2},
    )
    with Run(workspace, job, f"run-{function}") as run:
        assert run.finish() == 65, run.output()
        assert "reward.function: " in run.output() and word in run.output()
        assert not run.lines("metrics.jsonl"), "no step was made of samples without a score"
