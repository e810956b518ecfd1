"""What a trainer process knows: the job's spec as it was written, and its own place.

Invariant: frozen; `spec` and `device` are equal on all ranks of a run, and everything that changes during a run arrives
in messages. Only what follows from both (a default that depends on the device) is worked out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from grpo_worker.config.job import Spec
from grpo_worker.environment import ADVERTISED_HOST, COORDINATOR_URL, LISTEN_HOST, MEMBER_NAME
from grpo_worker.model_files import resolve_model

LOOPBACK = "127.0.0.1"
DEFAULT_CHUNK_TOKENS = {"cuda": 4096, "cpu": 1024}


@dataclass(frozen=True)
class TrainerOptions:
    """One trainer process group: `trainer.nodes` x `trainer.gpusPerNode` ranks."""

    spec: Spec
    device: Literal["cuda", "cpu"]
    host: str = LOOPBACK  # address that the RPC server and the weight server listen on
    advertised_host: str = LOOPBACK  # address that the others reach this process by
    coordinator_url: str = ""
    name: str = "trainer-0"

    @classmethod
    def of(cls, spec: Spec, environment: Mapping[str, str]) -> "TrainerOptions":
        """The options of this process, on the device that the machine has when the document leaves it open."""
        device = spec.runtime.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            spec,
            device,
            host=environment.get(LISTEN_HOST, LOOPBACK),
            advertised_host=environment.get(ADVERTISED_HOST, LOOPBACK),
            coordinator_url=environment.get(COORDINATOR_URL, ""),
            name=environment.get(MEMBER_NAME, "trainer-0"),
        )

    @cached_property
    def model_directory(self) -> Path:
        """Of `model.path`; a model from the hub may be downloaded at the first look. Raises DataError."""
        return resolve_model(self.spec.model.path, self.spec.model.revision)

    @property
    def compute_dtype(self) -> torch.dtype:
        match self.spec.model.dtype:
            case "auto":
                return torch.bfloat16 if self.device == "cuda" else torch.float32
            case "bfloat16":
                return torch.bfloat16
            case "float32" | "tf32":
                return torch.float32

    @property
    def rollout_dtype(self) -> torch.dtype:
        """Of the weights that engines pull."""
        name = self.spec.rollout.dtype
        return self.compute_dtype if name == "auto" else getattr(torch, name)

    @property
    def compile(self) -> bool:
        chosen = self.spec.model.compile
        return self.device == "cuda" if chosen is None else chosen

    @property
    def may_group(self) -> bool:
        """Whether weights may go to engines over a group, not by the store alone."""
        transport = self.spec.weight_transport
        return self.device == "cuda" if transport == "auto" else transport != "store"

    @property
    def chunk_tokens(self) -> int:
        """Tokens whose logits exist at a time."""
        return self.spec.model.head_chunk_size or DEFAULT_CHUNK_TOKENS[self.device]

    @property
    def reference(self) -> bool:
        """Whether a KL term, in the loss or in the reward, asks for the reference model."""
        return self.spec.actor.use_kl_loss or self.spec.algorithm.use_kl_in_reward

    @property
    def max_sequence_tokens(self) -> int:
        return self.spec.data.max_prompt_length + self.spec.data.max_response_length
