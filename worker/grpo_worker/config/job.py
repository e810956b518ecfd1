"""`GRPOJob`: the whole document, `grpo.dev/v1alpha1`."""

from typing import Literal

from pydantic import ConfigDict

from grpo_worker.config.actor import Actor, Model, Ref
from grpo_worker.config.algorithm import Algorithm
from grpo_worker.config.base import Section, field
from grpo_worker.config.data import Data, Reward
from grpo_worker.config.rollout import Rollout
from grpo_worker.config.run import Checkpoint, FailurePolicy, Network, Trainer
from grpo_worker.config.runtime import Runtime
from grpo_worker.config.scheduling import Scheduling

GROUP = "grpo.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "GRPOJob"
NAME = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"  # RFC 1035: it is the name of a Service
NAME_LIMIT = 40  # leaves room for -coordinator, -rollout-123 and a hash within the 63 of a label


class Metadata(Section):
    """Kubernetes object metadata; what we do not use is left as it is."""

    model_config = ConfigDict(**{**Section.model_config, "extra": "allow"})

    name: str = field(
        ...,
        "Name of the job, also of its Service and the start of its pods' names.",
        pattern=NAME,
        max_length=NAME_LIMIT,
    )
    namespace: str | None = field(None, "Namespace of the job.")
    labels: dict[str, str] = field(dict, "Labels.")
    annotations: dict[str, str] = field(dict, "Annotations.")


class Spec(Section):
    """A GRPO training run."""

    model: Model = field(..., "The model that is trained.")
    data: Data = field(Data, "Prompts.")
    reward: Reward = field(Reward, "Who judges the responses.")
    algorithm: Algorithm = field(Algorithm, "From rewards to advantages.")
    actor: Actor = field(Actor, "The update.")
    ref: Ref = field(Ref, "The reference model.")
    rollout: Rollout = field(Rollout, "Generation.")
    trainer: Trainer = field(Trainer, "Ranks, length and logging.")
    checkpoint: Checkpoint = field(Checkpoint, "Saving and resuming.")
    failure_policy: FailurePolicy = field(FailurePolicy, "Restarts.")
    runtime: Runtime = field(Runtime, "The machine.")
    network: Network = field(Network, "Ports and limits.")
    scheduling: Scheduling = field(Scheduling, "Where pods may run.")
    suspend: bool = field(
        False,
        "Save, stop and free the devices; false again goes on from the checkpoint.",
        immutable=False,
        cluster=True,
    )
    active_deadline_seconds: int | None = field(
        None, "The job fails when it runs longer.", unit="seconds", ge=1, immutable=False
    )
    ttl_seconds_after_finished: int | None = field(
        None,
        "Delete the job so long after its end, with its pods and their logs; checkpoints stay. Default never.",
        unit="seconds",
        ge=0,
        immutable=False,
        cluster=True,
    )

    @property
    def devices(self) -> int:
        """Devices that trainer ranks and engines ask for, one each, shared or not."""
        return (
            self.trainer.nodes * self.trainer.gpus_per_node + self.rollout.replicas * self.rollout.tensor_parallel_size
        )


class GRPOJob(Section):
    """One training run as one object."""

    api_version: Literal["grpo.dev/v1alpha1"] = field(..., "Version of this document.")
    kind: Literal["GRPOJob"] = field(..., "Kind of this document.")
    metadata: Metadata = field(..., "Name and labels.")
    spec: Spec = field(..., "The run.")

    @property
    def name(self) -> str:
        return self.metadata.name
