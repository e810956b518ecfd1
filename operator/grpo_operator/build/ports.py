"""Ports of a job's pods.

Invariant: no two servers of one pod share a port; a port that the document leaves at 0 gets its usual number, or the next free one.
"""

from dataclasses import dataclass

from grpo_operator.build.errors import spec_of
from grpo_operator.facts import Job
from grpo_operator.labels import Role


@dataclass(frozen=True)
class Ports:
    """Resolved port numbers."""

    coordinator: int = 7600
    trainer: int = 7601
    weight_sync: int = 7602
    rendezvous: int = 7603
    rollout: int = 7604
    engines_of_a_node: int = 0  # in a trainer's pod: the next ports are theirs

    @property
    def engines(self) -> list[int]:
        """Of the engines of one pod."""
        return [self.rollout + index for index in range(self.engines_of_a_node or 1)]

    def of_role(self, role: Role) -> dict[str, int]:
        """Port numbers of one role's pods by name (at most 15 characters, RFC 6335)."""
        if role is Role.COORDINATOR:
            return {"coordinator": self.coordinator}
        if role is Role.ROLLOUT:
            return {"rollout": self.rollout}
        own = self.engines[: self.engines_of_a_node]
        engines = {f"rollout-{index}" if index else "rollout": port for index, port in enumerate(own)}
        return {"trainer": self.trainer, "weight-sync": self.weight_sync, "rendezvous": self.rendezvous, **engines}

    def of_pod(self, role: Role, index: int) -> dict[str, int]:
        """Those that the pod listens on: the trainer's servers, and where ranks meet, are on its first node."""
        return {
            name: port
            for name, port in self.of_role(role).items()
            if role is not Role.TRAINER or index == 0 or name.startswith("rollout")
        }


def ports_of(job: Job) -> Ports:
    spec, usual = spec_of(job), Ports()
    network, engines = spec.network, spec.engines_of_a_node
    given = (network.trainer_port, network.weight_sync_port, network.rendezvous_port)
    taken = set(given)
    numbers = []
    for port, default in zip(given, (usual.trainer, usual.weight_sync, usual.rendezvous), strict=True):
        number = port or next(free for free in range(default, 65536) if free not in taken)
        taken.add(number)
        numbers.append(number)
    trainer, weight_sync, rendezvous = numbers
    return Ports(
        coordinator=network.coordinator_port or usual.coordinator,
        trainer=trainer,
        weight_sync=weight_sync,
        rendezvous=rendezvous,
        rollout=network.rollout_port or _free_range(usual.rollout, engines, taken),
        engines_of_a_node=engines,
    )


def _free_range(first: int, count: int, taken: set[int]) -> int:
    """The first port from `first` on from which `count` are free; engines in pods of their own share a pod with nobody."""
    return next(port for port in range(first, 65536) if not taken.intersection(range(port, port + count)))
