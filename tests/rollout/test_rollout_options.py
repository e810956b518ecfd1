"""What a replica takes from the job and from its environment."""

import dataclasses
from pathlib import Path

import pytest
from replica_helpers import engine_options
from vllm.engine.arg_utils import AsyncEngineArgs

from grpo_worker.config.load import job_from_document
from grpo_worker.config.rollout import OWN_ENGINE_ARGS
from grpo_worker.rollout.main import options_of
from grpo_worker.rollout.options import engine_arguments

DOCUMENT = {
    "apiVersion": "grpo.dev/v1alpha1",
    "kind": "GRPOJob",
    "metadata": {"name": "job"},
    "spec": {
        "model": {"path": "models/tiny"},
        "data": {"trainFiles": ["train.parquet"], "maxPromptLength": 100, "maxResponseLength": 28},
        "reward": {"function": "gsm8k"},
        "network": {"rolloutPort": 9000, "weightSyncStreams": 7, "heartbeatSeconds": 0.5},
    },
}


def test_options_come_from_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_COORDINATOR_URL", "http://10.0.0.1:8000")
    monkeypatch.setenv("GRPO_ADVERTISED_HOST", "10.0.0.2")
    monkeypatch.setenv("GRPO_JOB_TOKEN", "secret")
    engine, replica = options_of(job_from_document(DOCUMENT), 2)
    arguments = engine_arguments(engine, Path("resolved"), on_gpu=False)
    assert (arguments["model"], arguments["max_model_len"], arguments["dtype"]) == ("resolved", 128, "float32")
    assert (engine.network.weight_sync_streams, engine.token) == (7, "secret")
    assert (replica.name, replica.port, replica.advertised_host) == ("rollout-2", 9002, "10.0.0.2")
    assert (replica.coordinator_url, replica.token) == ("http://10.0.0.1:8000", "secret")


def test_the_context_and_further_arguments_reach_the_engine() -> None:
    spec = {**DOCUMENT["spec"], "rollout": {"maxModelLen": 512, "engineArgs": {"swap_space": 1}}}  # type: ignore[dict-item]
    engine, _ = options_of(job_from_document({**DOCUMENT, "spec": spec}), 0)
    arguments = engine_arguments(engine, Path("resolved"), on_gpu=True)
    assert (arguments["max_model_len"], arguments["swap_space"]) == (512, 1)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_document_refuses_exactly_the_engine_arguments_that_the_run_sets(on_gpu: bool) -> None:
    def arguments(**engine_args: object) -> dict[str, object]:
        options = engine_options("m", 64, max_num_batched_tokens=512, engine_args=engine_args)
        return engine_arguments(options, Path("m"), on_gpu)

    ours = arguments()
    assert {name for name in ours if arguments(**{name: "theirs"})[name] != "theirs"} == OWN_ENGINE_ARGS.keys()
    assert OWN_ENGINE_ARGS.keys() <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_in_a_pod_the_port_is_the_same_for_every_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_ROLLOUT_PORT", "7604")
    monkeypatch.setenv("GRPO_LISTEN_HOST", "0.0.0.0")
    for index in (0, 3):
        _, replica = options_of(job_from_document(DOCUMENT), index)
        assert (replica.host, replica.port) == ("0.0.0.0", 7604)
