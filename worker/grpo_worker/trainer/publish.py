"""The policy's weights, whole and in the rollout's dtype, into the snapshot that replicas pull.

Invariant: every rank gathers every parameter in the same order, whatever rank 0 does with it; rank 0 asks the store for
room before the first gather, so a refusal is known to all ranks before any of them waits for another.
"""

from contextlib import nullcontext

import torch

from grpo_worker.errors import GRPOError
from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import ErrorReply, StoreSource
from grpo_worker.trainer.distributed import Ranks, broadcast_bytes
from grpo_worker.trainer.failures import OperationRefused, as_error
from grpo_worker.trainer.model import PolicyModel, gathered_parameters, named_parameters
from grpo_worker.weightsync.manifest import TensorSpec
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore, SnapshotWriter, dtype_name


class Publisher:
    """`server` and `store` exist on rank 0 alone."""

    def __init__(
        self,
        ranks: Ranks,
        dtype: torch.dtype,
        store: SnapshotStore | None,
        server: WeightServer | None,
        advertised_host: str,
    ) -> None:
        self.ranks = ranks
        self.dtype = dtype
        self.store = store
        self.server = server
        self.advertised_host = advertised_host

    def publish(self, model: PolicyModel, version: int) -> StoreSource | None:
        """The source on rank 0, None elsewhere. Collective. Raises OperationRefused when the store has no room."""
        with self._begin(model, version) or nullcontext() as writer:
            for name, tensor in gathered_parameters(model, self.dtype, self.ranks.device):
                if writer is not None:
                    writer.write(name, tensor)
            if writer is None:
                return None
            assert self.server is not None
            return self.server.source(writer.commit(), self.advertised_host)

    def _begin(self, model: PolicyModel, version: int) -> SnapshotWriter | None:
        writer, refusal = None, b""
        if self.store is not None:
            try:
                writer = self.store.begin(version, tensor_specs(model, self.dtype))
            except GRPOError as error:
                refusal = codec.encode(
                    ErrorReply(
                        reason=error.reason, message=str(error), exit_code=int(error.exit_code), recoverable=True
                    )
                )
        refusal = broadcast_bytes(refusal if self.ranks.is_first else None, self.ranks)
        if refusal:
            raise OperationRefused(as_error(codec.decode(refusal, ErrorReply)))
        return writer


def tensor_specs(model: PolicyModel, dtype: torch.dtype) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(p.shape), dtype_name(dtype)) for name, p in named_parameters(model)]
