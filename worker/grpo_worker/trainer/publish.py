"""The policy's weights, whole and in the rollout's dtype, into the snapshot that replicas pull, or to the group of their workers.

Invariant: every rank gathers every parameter in the same order, whatever rank 0 does with it; rank 0 asks the store for
room before the first gather, so a refusal is known to all ranks before any of them waits for another. A group that fails is no
failure of the trainer.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import torch

from grpo_worker.errors import GRPOError
from grpo_worker.protocol import codec
from grpo_worker.protocol.messages import ErrorReply, GroupPlace, PublishReply, PublishRequest
from grpo_worker.trainer.distributed import Ranks, broadcast_bytes
from grpo_worker.trainer.failures import OperationRefused, as_error
from grpo_worker.trainer.model import PolicyModel, gathered_parameters, tensor_specs
from grpo_worker.weightsync.broadcast import GroupMember, WeightGroupError, digest_of, open_meeting_point
from grpo_worker.weightsync.channels import physical
from grpo_worker.weightsync.manifest import VersionNotHeldError
from grpo_worker.weightsync.server import WeightServer
from grpo_worker.weightsync.snapshot import SnapshotStore, SnapshotWriter

log = logging.getLogger(__name__)


class Publisher:
    """`server` and `store` exist on rank 0 alone."""

    def __init__(
        self,
        ranks: Ranks,
        dtype: torch.dtype,
        store: SnapshotStore | None,
        server: WeightServer | None,
        advertised_host: str,
        meeting_host: str = "",
    ) -> None:
        """`meeting_host`: address that a group's members meet at, bound by rank 0; '' where everything goes by the store."""
        self.ranks = ranks
        self.dtype = dtype
        self.store = store
        self.server = server
        self.advertised_host = advertised_host
        self._published: tuple[int, int] | None = None  # version, and the optimizer's updates then
        self._meeting_point = open_meeting_point(meeting_host) if meeting_host and ranks.is_first else None
        self._member = GroupMember(ranks.device)

    def publish(self, model: PolicyModel, request: PublishRequest, updates: int) -> PublishReply:
        """Collective. What it says of places is rank 0's. Raises OperationRefused: the store has no room, or an older version is asked for.

        Args:
            updates: the optimizer's so far.
        """
        started = time.perf_counter()
        if self._published is not None:
            newest, then = self._published
            if request.version < newest or (request.version == newest and updates != then):
                raise OperationRefused(
                    VersionNotHeldError(f"version {request.version} is gone: the trainer's weights have changed since")
                )
        writer = self._begin(model, request.version) if request.store else None
        tensors = gathered_parameters(model, self.dtype, self.ranks.device)
        store, digest, error = None, "", ""
        try:
            if writer is not None:
                tensors = _written(tensors, writer)
            specs = tensor_specs(model, self.dtype)
            if (place := self._place(request)) is not None:
                try:
                    with self._member.at(place) as group:
                        digest = group.send(tensors, specs)
                except WeightGroupError as failure:
                    log.warning("version %d: %s", request.version, failure)
                    error = str(failure)
            elif request.group is not None and self.ranks.is_first:
                digest = digest_of(tensors, specs, request.group.bucket_bytes, self.ranks.device)
            deque(tensors, maxlen=0)  # what is left: every rank gathers every parameter
            if writer is not None:
                assert self.server is not None
                store = self.server.source(writer.commit(), self.advertised_host)
        finally:
            if writer is not None:
                writer.abandon()
        self._published = (request.version, updates)
        return PublishReply(
            store=store, digest=digest, group_error=error, seconds=time.perf_counter() - started,
            meeting_port=self._meeting_point.port if self._meeting_point else 0, device=physical(self.ranks.device),
        )  # fmt: skip

    def _place(self, request: PublishRequest) -> GroupPlace | None:
        """This rank's: of a group for all rank 0 is the only sender, of pairs each rank may be one."""
        place = request.group
        if place is None or place.pair is None:
            return place if self.ranks.is_first else None
        return msgspec.structs.replace(place, pair=self.ranks.rank) if self.ranks.rank in place.pairs else None

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


def _written(tensors: Iterator[tuple[str, torch.Tensor]], writer: SnapshotWriter) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        writer.write(name, tensor)
        yield name, tensor
