"""`GRPOJob`: the whole document, `grpo.dev/v1alpha1`."""

from typing import Literal

from pydantic import ConfigDict

from grpo_worker.config.actor import Actor, Model, Ref
from grpo_worker.config.algorithm import Algorithm
from grpo_worker.config.base import Section, field
from grpo_worker.config.data import Data, Reward
from grpo_worker.config.rollout import Rollout
from grpo_worker.config.run import Checkpoint, FailurePolicy, Network, Trainer, Transport
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
    placement: Literal["Disaggregated", "Colocated"] = field(
        "Disaggregated",
        "Disaggregated: trainer ranks and engines have devices of their own (under `grpo run` they share when there are too few, each with its "
        "memory). Colocated: they have the same devices in turn, tensorParallelSize ranks an engine; engines give their memory back while the "
        "trainer works.",
    )
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
    def colocated(self) -> bool:
        return self.placement == "Colocated"

    @property
    def ranks(self) -> int:
        """Of the trainer."""
        return self.trainer.nodes * self.trainer.gpus_per_node

    @property
    def engines(self) -> int:
        """Rollout servers; colocated ones are as many as the trainer's devices hold."""
        return self.ranks // self.rollout.tensor_parallel_size if self.colocated else self.rollout.replicas

    @property
    def rollout_pods(self) -> int:
        """On a cluster. Colocated engines are in the trainers' pods."""
        return 0 if self.colocated else self.rollout.replicas

    @property
    def engines_of_a_node(self) -> int:
        """In the pod of a trainer node."""
        return self.trainer.gpus_per_node // self.rollout.tensor_parallel_size if self.colocated else 0

    @property
    def devices(self) -> int:
        """Devices that trainer ranks and engines ask for, shared or not."""
        return self.ranks if self.colocated else self.ranks + self.engines * self.rollout.tensor_parallel_size

    @property
    def weight_transport(self) -> Transport:
        """What `network.weightSync` means for this job, as far as its document can tell."""
        return "ipc" if self.colocated and self.network.weight_sync == "auto" else self.network.weight_sync


class GRPOJob(Section):
    """One training run as one object."""

    api_version: Literal["grpo.dev/v1alpha1"] = field(..., "Version of this document.")
    kind: Literal["GRPOJob"] = field(..., "Kind of this document.")
    metadata: Metadata = field(..., "Name and labels.")
    spec: Spec = field(..., "The run.")

    @property
    def name(self) -> str:
        return self.metadata.name
