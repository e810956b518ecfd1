"""What the tests of a replica share: tiny models, a trainer that publishes them, and a client of the replica."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from grpo_worker.config.actor import Model
from grpo_worker.config.rollout import Rollout
from grpo_worker.protocol import auth, codec
from grpo_worker.protocol.messages import (
    ApplyWeightsReply,
    ApplyWeightsRequest,
    Array,
    ErrorReply,
    GenerateEnd,
    GenerateRequest,
    GroupResult,
    PromptRequest,
    Sampling,
    StoreSource,
)  # fmt: skip
from grpo_worker.rollout.engine import RolloutEngine
from grpo_worker.rollout.options import EngineOptions
from grpo_worker.weightsync.manifest import SnapshotManifest, TensorSpec
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore, dtype_name

T = TypeVar("T")
TOKEN = "the-job-token"
VOCABULARY = 64
CONTEXT = 256


def tiny_model(seed: int) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with tied embeddings, different for each seed, in fp32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=1, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float().eval()


def engine_options(model: str, max_model_len: int, **rollout: Any) -> EngineOptions:
    """Of an engine with these fields of `spec.rollout`, by their Python names."""
    return EngineOptions(Model(path=model), Rollout().model_copy(update=rollout), max_model_len, token=TOKEN)


class Trainer:
    """The trainer's side: models by seed, and their publication."""

    def __init__(self) -> None:
        self.store = SnapshotStore(timeout_seconds=10)
        self.server = WeightServer(self.store, "127.0.0.1", 0, TOKEN, timeout_seconds=20)

    def publish(self, version: int, tensors: dict[str, torch.Tensor]) -> StoreSource:
        return self.server.source(self.publish_manifest(version, tensors))

    def publish_manifest(self, version: int, tensors: dict[str, torch.Tensor]) -> SnapshotManifest:
        specs = [TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()]
        with self.store.begin(version, specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            return writer.commit()

    def close(self) -> None:
        self.server.close()
        self.store.close()


def weights(seed: int) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of its checkpoint (a tied head is not in it)."""
    return {name: tensor for name, tensor in tiny_model(seed).state_dict().items() if name != "lm_head.weight"}


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float = 120) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_seconds)


async def until(condition: Callable[[], bool], what: str, timeout_seconds: float = 30) -> None:
    """Wait, and fail with `what` after the limit."""
    try:
        async with asyncio.timeout(timeout_seconds):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_seconds} s: {what}") from None


def client(token: str = TOKEN) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers=auth.authorization(token))


@dataclass
class Replica:
    """The replica under test, as its clients see it."""

    loop: Loop
    engine: RolloutEngine
    url: str

    async def post(self, path: str, body: bytes, token: str = TOKEN, kind: type[T] | Any = None) -> tuple[int, Any]:
        """Status and the decoded body (an ErrorReply from 400 on)."""
        async with client(token) as session, session.post(self.url + path, data=body) as response:
            data = await response.read()
            if response.status >= 400:
                return response.status, msgspec.json.decode(data, type=ErrorReply)
            return response.status, codec.decode(data, kind)

    async def generate_async(self, request: GenerateRequest, into: dict[str, GroupResult]) -> GenerateEnd:
        """Fill `into` as results arrive."""
        async with client() as session, session.post(f"{self.url}/v1/generate", data=codec.encode(request)) as response:
            assert response.status == 200, await response.read()
            while True:
                frame = await codec.read_frame(response.content, GroupResult | GenerateEnd, 60)
                if isinstance(frame, GenerateEnd):
                    return frame
                assert frame.id not in into
                into[frame.id] = frame

    def generate(self, request: GenerateRequest) -> dict[str, GroupResult]:
        results: dict[str, GroupResult] = {}
        self.loop.run(self.generate_async(request, results))
        return results

    def apply(
        self, source: StoreSource, timeout_seconds: float = 60, *, clear_cache: bool = True
    ) -> tuple[int, ApplyWeightsReply | ErrorReply]:
        request = ApplyWeightsRequest(
            version=source.version, store=source, timeout_seconds=timeout_seconds, clear_cache=clear_cache
        )
        return self.loop.run(self.post("/v1/weights", codec.encode(request), kind=ApplyWeightsReply))

    def get(self, path: str) -> tuple[int, str]:
        async def ask() -> tuple[int, str]:
            async with aiohttp.ClientSession() as session, session.get(self.url + path) as response:
                return response.status, await response.text()

        return self.loop.run(ask())


def request_of(prompts: dict[str, list[int]], **changes: Any) -> GenerateRequest:
    """Greedy, one sample of 16 tokens, unless told otherwise."""
    sampling = {"n": 1, "max_tokens": 16, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "ignore_eos": True}
    request = {name: changes.pop(name) for name in list(changes) if name in GenerateRequest.__struct_fields__}
    seed = changes.pop("seed", 0)
    listed = [
        PromptRequest(id=name, token_ids=Array.of(ids, "int32"), seed=seed + i)
        for i, (name, ids) in enumerate(prompts.items())
    ]
    return GenerateRequest(
        **{
            "request_id": "r",
            "prompts": listed,
            "sampling": Sampling(**{**sampling, **changes}),
            "deadline_seconds": 60.0,
            **request,
        }
    )
