"""Inside vLLM's workers: the weight-transfer engine `grpo_store`, and the read-back of what a worker runs.

Invariant: the model is touched only inside `update_weights`, with bytes that were verified before, or over a group, whose digest is
compared afterwards. Layerwise reload is finalised even when loading fails, so that a repeated update can succeed. A parameter that the update did not
load is an error (vLLM only logs it).

Loaded by vLLM as a general plug-in (entry point `grpo_store`) in every process, and as the worker extension class of
our engine, which works without installed distribution metadata. Run with vLLM 0.32.0; written against the sources of
0.26, 0.28 and 0.33.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from grpo_worker.protocol.messages import ApplyWeightsRequest
from grpo_worker.rollout.options import BACKEND
from grpo_worker.rollout.orphan import end_with_parent
from grpo_worker.weightsync.broadcast import GroupMember, WeightDigest
from grpo_worker.weightsync.channels import physical
from grpo_worker.weightsync.manifest import SnapshotManifest, TensorSpec


def register() -> None:
    """Make the backend known to this process. May be called more than once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "StoreTransferEngine")
        end_with_parent()


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first update."""


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    """Of staged weights, or of those that come over a group."""

    path: str = ""  # of the staging memory
    manifest: bytes = b""  # msgpack of `SnapshotManifest`; every checksum has been compared with the staged bytes
    group: bytes = b""  # msgpack of the `ApplyWeightsRequest`, whose place is the engine's first worker's
    tensors: bytes = b""  # msgpack of `list[TensorSpec]`


class StoreTransferEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """Applies a staged snapshot to the worker's model."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._staged: tuple[str, mmap.mmap] | None = None
        self._member = GroupMember(self.device)
        self._pending: tuple[int, str] | None = None
        self.applied: tuple[int, str] | None = None  # version and digest of the weights that the model has

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._pending = None

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        if update_info.group:
            self._receive(update_info)
            return
        manifest = msgspec.msgpack.decode(update_info.manifest, type=SnapshotManifest)
        data = self._map(update_info.path, manifest.total_bytes)
        self._load(self._tensors(manifest, data))
        self._pending = (manifest.version, manifest.digest)

    def _receive(self, update_info: StoreUpdateInfo) -> None:
        """Over a group."""
        request = msgspec.msgpack.decode(update_info.group, type=ApplyWeightsRequest)
        assert request.group is not None
        worker = self.parallel_config.rank
        if request.group.pair is None:
            place = msgspec.structs.replace(request.group, rank=request.group.rank + worker)
        else:
            place = msgspec.structs.replace(request.group, pair=request.group.pair + worker)
        digest = WeightDigest()
        with self._member.at(place) as group:
            self._load(group.receive(msgspec.msgpack.decode(update_info.tensors, type=list[TensorSpec]), digest))
        self._pending = (request.version, digest.hexdigest())

    def _load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        parameters = {name for name, _ in self.model.named_parameters()}
        self.applied = None
        with nullcontext() if self._in_place else self._layerwise():
            loaded = cast(Any, self.model).load_weights(tensors)
        self._process_tied_layers()
        if loaded is not None and (left := sorted(parameters - loaded)):
            raise RuntimeError(f"the update did not load {len(left)} parameters of the model: {', '.join(left[:5])}")

    @property
    def _in_place(self) -> bool:
        """Whether the parameters are used as they are loaded: nothing packs, quantizes or absorbs them afterwards."""
        config = self.model_config
        return self.device.type == "cuda" and not (config.quantization or config.use_mla or config.is_moe)

    @contextmanager
    def _layerwise(self) -> Iterator[None]:
        """vLLM's way for all others: a layer is loaded beside its parameters, processed, and copied over them."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        try:
            yield
        finally:
            finalize_layerwise_reload(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        # vLLM's own session flag survives an error raised here, so everything that can fail was done before. Nothing is pending where
        # only the session of an update that failed is closed.
        self.applied = self._pending or self.applied

    def shutdown(self) -> None:
        self._staged = None
        self._member.leave()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: dict[str, Any] | Any) -> None:
        """Abstract in vLLM up to 0.27. Our trainer does not import vLLM."""
        raise RuntimeError("weights are published by grpo_worker.weightsync, not through vLLM")

    def _process_tied_layers(self) -> None:
        """Layerwise reload processes a shared parameter for its first layer only. On CPU every layer has its own packed
        copy, so a tied output head would go on with the old embedding, without a word."""
        if self.device.type != "cpu":
            return
        seen: set[int] = set()
        for layer in self.model.modules():
            own = [id(parameter) for parameter in layer.parameters(recurse=False)]
            if (method := getattr(layer, "quant_method", None)) is not None and seen.intersection(own):
                method.process_weights_after_loading(layer)
            seen.update(own)

    def _map(self, path: str, total_bytes: int) -> mmap.mmap:
        if self._staged is None or self._staged[0] != path or len(self._staged[1]) < total_bytes:
            with open(path, "r+b") as file:
                self._staged = (path, mmap.mmap(file.fileno(), total_bytes))
        return self._staged[1]

    def _tensors(self, manifest: SnapshotManifest, data: mmap.mmap) -> Iterator[tuple[str, torch.Tensor]]:
        for entry in manifest.tensors:
            dtype = getattr(torch, entry.dtype)
            if entry.size_bytes == 0:
                yield entry.name, torch.empty(entry.shape, dtype=dtype, device=self.device)
                continue
            count = entry.size_bytes // dtype.itemsize
            yield (
                entry.name,
                torch.frombuffer(data, dtype=dtype, count=count, offset=entry.offset).view(entry.shape).to(self.device),
            )


class WorkerExtension:
    """Methods added to vLLM's worker, called by `collective_rpc`. Importing this module registers the backend in the
    worker."""

    weight_transfer_engine: StoreTransferEngine

    def grpo_applied_weights(self) -> tuple[int, str] | None:
        """Version and digest of the weights that this worker's model has."""
        return self.weight_transfer_engine.applied

    def grpo_device(self) -> str:
        """Of this worker."""
        return physical(self.weight_transfer_engine.device)

    def grpo_forget_weights(self) -> int:
        """They are about to go. Returns the bytes that are in use on the device, by whomever."""
        self.weight_transfer_engine.applied = None
        if self.weight_transfer_engine.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.weight_transfer_engine.device)
        return total - free


register()
