"""A whole coordinator in a test: real data, rewards, checkpoints and HTTP; trainer and engines are stand-ins that speak the protocol."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from coordinator_helpers import TOKEN, Engine, Trainer

from grpo_worker.config import GRPOJob, job_from_document
from grpo_worker.coordinator.main import Coordinator
from grpo_worker.protocol.heartbeat import HeartbeatClient
from grpo_worker.protocol.messages import (
    Array,
    LoadReply,
    LoadRequest,
    LogProbsReply,
    LogProbsRequest,
    SaveReply,
    SaveRequest,
    SaveStatusReply,
    SaveStatusRequest,
    TrainBatch,
    UpdateReply,
    UpdateRequest,
)

PROMPTS, BATCH, EPOCHS = 24, 4, 2


class Learner(Trainer):
    """A trainer whose state is the number of its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.answers |= {
            LogProbsRequest: self.log_probs,
            UpdateRequest: self.update,
            SaveRequest: self.save,
            SaveStatusRequest: lambda request: SaveStatusReply(done=True),
            LoadRequest: lambda request: LoadReply(step=int(request.directory.rpartition("_")[2])),
        }

    def log_probs(self, request: LogProbsRequest) -> LogProbsReply:
        tokens = int(request.batch.response_lengths.numpy().sum())
        values = Array.of([-0.5] * tokens, "float32")
        reference = values if request.reference else None
        return LogProbsReply(log_probs=values, entropy=None, ref_log_probs=reference, metrics={})

    def update(self, request: UpdateRequest) -> Any:
        self.steps.append(request.step)
        return UpdateReply(metrics={"actor/grad_norm": 1.0})

    def save(self, request: SaveRequest) -> Any:
        for name in ("actor/model.safetensors", "state/shard"):
            path = Path(request.directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(request.step))
        return SaveReply(stall_seconds=0.0)


class Stage:
    """A run directory with data and a tokenizer, and the members of a job."""

    def __init__(self, root: Path, url: str, rewards: Path) -> None:
        self.root = root
        self.url = url
        self.rewards = rewards
        self.trainer = Learner()
        self.engines: list[Engine] = []

    def job(self, **sections: dict[str, Any]) -> GRPOJob:
        spec: dict[str, Any] = {
            "model": {"path": str(self.root / "model")},
            "data": {"trainFiles": [str(self.root / "train.parquet")], "trainBatchSize": BATCH, "maxPromptLength": 16},
            "actor": {"ppoMiniBatchSize": 2},
            "rollout": {"n": 2, "maxAttempts": 50},
            "reward": {"function": f"{self.rewards}:last_digit", "workers": 1},
            "trainer": {"totalEpochs": EPOCHS, "testFreq": 0, "loggers": ["jsonl"]},
            "checkpoint": {"saveFreq": 5},
            "network": {"heartbeatSeconds": 0.02, "memberTimeoutSeconds": 5.0},
            "failurePolicy": {"startupTimeoutSeconds": 20.0, "stallTimeoutSeconds": 20.0},
        }
        for name, section in sections.items():
            spec[name] = spec.get(name, {}) | section
        document = {"apiVersion": "grpo.dev/v1alpha1", "kind": "GRPOJob", "metadata": {"name": "job"}, "spec": spec}
        return job_from_document(document)

    @asynccontextmanager
    async def members(self, *engines: Engine) -> AsyncIterator[None]:
        """A trainer and these engines, sending heartbeats."""
        self.trainer, self.engines = Learner(), list(engines)
        everybody = [self.trainer, *self.engines]
        for one in everybody:
            await one.start()
        clients = [HeartbeatClient(self.url, TOKEN, 0.02, one.beat) for one in everybody]
        beats = [asyncio.create_task(client.run()) for client in clients]
        self._beats = dict(zip([one.url for one in everybody], beats, strict=True))
        try:
            yield
        finally:
            for beat in beats:
                beat.cancel()
            await asyncio.gather(*beats, return_exceptions=True)
            for one in everybody:
                await one.stop()

    def keep_batches(self) -> list[TrainBatch]:
        """Of the updates that the trainer is asked for from now on."""
        batches: list[TrainBatch] = []
        update = self.trainer.update

        def keep(request: UpdateRequest) -> Any:
            batches.append(request.batch)
            return update(request)

        self.trainer.answers[UpdateRequest] = keep
        return batches

    async def leave(self, one: Trainer | Engine) -> None:
        """It is gone: neither heartbeats nor a server any more."""
        self._beats[one.url].cancel()
        await one.stop()

    async def train(self, job: GRPOJob) -> None:
        async with asyncio.timeout(60):
            await Coordinator(job).run()

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "run" / name).read_text().splitlines()]

    def trained(self) -> Counter[str]:
        return Counter(uid for record in self.records("ledger.jsonl") for uid in record["trained"])


def once_an_epoch(trained: Counter[str]) -> bool:
    return len(trained) == PROMPTS * EPOCHS and set(trained.values()) == {1}
