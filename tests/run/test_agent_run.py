"""A whole run with `rollout.agent`: two turns with an observation between them, through a real engine and a real trainer."""

import urllib.request

import pytest
from metric_names import unlisted
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from run_helpers import Run, Workspace

AGENT = '''
from grpo_worker.coordinator.agents import Episode


async def two_turns(episode: Episode, *, hint: str) -> None:
    """A few characters, then something that the policy did not say, then the rest."""
    await episode.generate(max_tokens=4)
    episode.observe(hint)
    await episode.generate()
'''
HINT = "<##>"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace.make(tmp_path_factory.mktemp("agent"))
    (workspace.root / "agents.py").write_text(AGENT)
    return workspace


def scrape(run: Run) -> list[Metric]:
    """The page of `--metrics`, whose address is told in an event."""
    (event,) = (event for event in run.lines("events.jsonl") if event["reason"] == "Metrics")
    with urllib.request.urlopen(event["message"].rpartition(" ")[2], timeout=30) as response:
        return list(text_string_to_metric_families(response.read().decode()))


def test_an_agents_observations_are_context_and_not_trained_on(workspace: Workspace) -> None:
    job = workspace.job(
        data={
            "trainFiles": ["train.parquet"], "validationFiles": ["test.parquet"], "trainBatchSize": 8, "maxPromptLength": 16,
            "maxResponseLength": 16,
        },
        rollout={"n": 4, "agent": "agents.py:two_turns", "agentOptions": {"hint": HINT}},
        trainer={"totalSteps": 3, "totalEpochs": 8, "testFreq": 3},
    )  # fmt: skip
    with Run(workspace, job, "run", "--metrics=0") as run:
        run.wait_until(lambda: run.steps() >= 1)
        page = scrape(run)
        assert run.finish() == 0, run.output()
    series = {(sample.name, sample.labels["role"]): sample for family in page for sample in family.samples}
    for name, role in (
        ("grpo_coordinator_reward_mean", "coordinator"),
        ("grpo_trainer_step", "trainer"),
        ("vllm:generation_tokens_total", "rollout"),
    ):
        assert series[name, role].labels["grpojob"] == "test", sorted(series)
    metrics = [line for line in run.lines("metrics.jsonl") if line["step"] > 0]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert unlisted(run.lines("metrics.jsonl")) == set()
    for line in metrics:
        assert line["agent/turns/min"] == line["agent/turns/max"] == 2
        assert line["agent/observed_tokens/min"] == line["agent/observed_tokens/max"] == len(HINT)
        assert line["response_length/mean"] == pytest.approx(line["agent/sampled_tokens/mean"] + len(HINT))
        assert line["response_length/max"] <= 16
        # Engine and trainer give each sampled token the same probability in the same context. An observed token that counted would
        # stand out: the engine's log-prob of it is 0, the trainer's is not.
        assert line["training/rollout_logprobs_abs_diff_max"] < 1e-4
        assert line["rollout_corr/rollout_is_min"] == pytest.approx(1.0, abs=1e-3)
    assert any(line["actor/grad_norm"] > 0 for line in metrics)
    samples = run.lines("samples.jsonl")
    assert {line["kind"] for line in samples} == {"train", "validation"}
    assert all(HINT in line["response"] for line in samples)
