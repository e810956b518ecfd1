"""An API server, a kubelet and a job's processes in memory, as little of each as a plan can see."""

import itertools
import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from grpo_operator.build import config_map_name
from grpo_operator.control.read_job import read_job
from grpo_operator.facts import Ended, Job, LastWord, Observation, Pod, Refusal, Report, Waiting
from grpo_operator.labels import Role, pod_name
from grpo_operator.planning.actions import DeletePod, Plan
from grpo_operator.planning.plan import plan
from grpo_operator.settings import Settings
from grpo_worker.config.status import Condition, GRPOJobStatus

START = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
SETTINGS = Settings(worker_image="worker:1")
JOB = "demo"


class OperatorDied(Exception):
    """Between two actions of a plan."""


def document(**spec: Any) -> dict[str, Any]:
    """A GRPOJob; keyword arguments are merged into spec, section by section."""
    base: dict[str, Any] = {
        "model": {"path": "demo/model"},
        "data": {"trainFiles": ["demo/train.parquet"], "trainBatchSize": 4},
        "reward": {"function": "gsm8k"},
        "rollout": {"replicas": 2},
        "trainer": {"nodes": 1, "totalSteps": 20},
        "checkpoint": {"saveFreq": 2},
        "actor": {"ppoMiniBatchSize": 4},
        "runtime": {"device": "cpu", "workspace": {"claimName": "work"}, "terminationGracePeriodSeconds": 60},
        "failurePolicy": {"backoffSeconds": 2.0},
    }
    for key, value in spec.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {
            "name": JOB,
            "namespace": "rl",
            "uid": "job-uid",
            "generation": 1,
            "creationTimestamp": "2026-11-22T11:59:59Z",
        },
        "spec": base,
    }


@dataclass
class World:
    """What the API server holds, and a clock. Tests do the kubelet's part by `run`, `end`, `evict`, ..."""

    job: dict[str, Any]
    now: datetime = START
    pods: dict[str, Pod] = field(default_factory=dict)
    config_maps: set[str] = field(default_factory=set)
    report: Report | None = None
    refuse: str | None = None  # the API server's words to new pods beyond `quota`
    quota: int = 0
    refusals: tuple[Refusal, ...] = ()
    deleted: bool = False
    asked_to_stop: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    statuses: list[GRPOJobStatus] = field(default_factory=list)
    _config_maps: dict[int, str] = field(default_factory=dict)
    uids: Any = field(default_factory=lambda: itertools.count(1))

    # the operator's side

    def observe(self) -> Observation:
        return Observation(
            self.read(), tuple(self.pods.values()), tuple(sorted(self.config_maps)), self.refusals, self.report
        )

    def read(self) -> Job:
        return read_job(self.job)

    @property
    def status(self) -> GRPOJobStatus:
        return GRPOJobStatus.model_validate(self.job.get("status") or {})

    def plan(self) -> Plan:
        return plan(self.observe(), SETTINGS, self.now)

    def reconcile(self) -> Plan:
        made = self.plan()
        self.execute(made)
        return made

    def settle(self, visits: int = 10) -> None:
        """Reconcile until nothing is done any more."""
        for _ in range(visits):
            made = self.reconcile()
            if not acts(made):
                return
        raise AssertionError(f"the plan does not come to rest: {made}")

    def execute(self, made: Plan, actions_until_death: int | None = None) -> None:
        left = itertools.count() if actions_until_death is None else iter(range(actions_until_death))

        def live() -> None:
            if next(left, None) is None:
                raise OperatorDied

        if made.status is not None:
            live()
            self.job["status"] = json.loads(json.dumps(made.status.document()))
            self.statuses.append(self.status)
        self.events += [f"{event.type} {event.reason}: {event.message}" for event in made.events]
        if made.stop_coordinator:
            live()
            self.asked_to_stop.append(made.stop_coordinator)
        for deletion in made.delete_pods:
            live()
            self._delete(deletion)
        if made.apply_shared:
            live()
            self.config_maps.add(self.config_map)
        self.refusals = ()
        for creation in made.create_pods:
            live()
            if self.refuse is not None and len(self.pods) >= self.quota:
                invalid = "is invalid" in self.refuse
                member = (creation.role, creation.index)
                self.refusals += (Refusal(f"Pod {pod_name(JOB, *member)}", self.refuse, member, invalid),)
                continue
            self._create(creation.role, creation.index)
        for name in made.delete_config_maps:
            live()
            self.config_maps.discard(name)
        if made.delete_job:
            live()
            self.deleted = True

    def _delete(self, deletion: DeletePod) -> None:
        pod = self.pods.get(deletion.name)
        if pod is None or pod.uid != deletion.uid:
            return
        if pod.ended is not None or deletion.grace_seconds == 0 or not pod.scheduled:
            del self.pods[deletion.name]
            return
        grace = 60 if deletion.grace_seconds is None else deletion.grace_seconds
        self.pods[pod.name] = replace(pod, deletion_deadline=self.now + timedelta(seconds=grace))

    def _create(self, role: Role, index: int) -> None:
        name, attempt = pod_name(JOB, role, index), self.status.attempt or 0
        assert name not in self.pods, f"{name} exists"
        if role is not Role.ROLLOUT:
            others = {pod.attempt for pod in self.pods.values() if pod.role is not Role.ROLLOUT and pod.ended is None}
            assert others <= {attempt}, f"set pods of attempts {others} run beside those of {attempt}"
        self.pods[name] = Pod(
            name, f"uid-{next(self.uids)}", role, index, attempt, self.now, "Pending", config=self.config_map
        )

    @property
    def config_map(self) -> str:
        """Of the document as it is."""
        generation = self.job["metadata"]["generation"]
        if generation not in self._config_maps:
            self._config_maps[generation] = config_map_name(self.read())
        return self._config_maps[generation]

    # the world's side

    def edit(self, **spec: Any) -> None:
        for key, value in spec.items():
            old = self.job["spec"].get(key, {})
            self.job["spec"][key] = {**old, **value} if isinstance(value, dict) else value
        self.job["metadata"]["generation"] += 1

    def tick(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def change(self, member: str, **changes: Any) -> Pod:
        name = f"{JOB}-{member}"
        self.pods[name] = replace(self.pods[name], **changes)
        return self.pods[name]

    def run(self, *members: str) -> None:
        """Pods run and are ready; without arguments, all of them."""
        for pod in list(self.pods.values()):
            if (not members or pod.name.removeprefix(f"{JOB}-") in members) and pod.ended is None and not pod.deleting:
                self.pods[pod.name] = replace(
                    pod,
                    phase="Running",
                    scheduled=True,
                    started=True,
                    ready=True,
                    node="node-a",
                    ip="10.0.0.1",
                    waiting=None,
                )

    def end(
        self, member: str, code: int | None, *, reason: str = "Error", word: LastWord | None = None, **changes: Any
    ) -> Pod:
        ended = Ended(code, "Completed" if code == 0 else reason, self.now, word, changes.pop("message", ""))
        return self.change(member, phase="Failed", ended=ended, ready=False, **changes)

    def evict(self, member: str, code: int = 137) -> Pod:
        return self.end(
            member, code, disruption="EvictionByEvictionAPI", conditions=("DisruptionTarget",), reason="Error"
        )

    def wait(self, member: str, reason: str, message: str = "") -> None:
        self.change(member, scheduled=True, waiting=Waiting(reason, message))

    def reap(self) -> None:
        """Pods that are being deleted have ended in time."""
        self.pods = {name: pod for name, pod in self.pods.items() if not pod.deleting}

    def vanish(self, member: str) -> None:
        del self.pods[f"{JOB}-{member}"]

    def train(self, step: int, state: str = "Training", checkpoint: int | None = None, **more: Any) -> None:
        """The coordinator says so."""
        self.report = Report(
            self.pods[f"{JOB}-coordinator"].uid,
            self.now,
            {
                "state": state,
                "message": f"step {step}",
                "step": step,
                "total_steps": 20,
                "epoch": step / 10,
                "accuracy": 0.5,
                "last_progress_time": self.now.timestamp(),
                "checkpoint": None
                if checkpoint is None
                else {"step": checkpoint, "path": f"checkpoints/{checkpoint}", "time": self.now.timestamp()},
                **more,
            },
        )

    def condition(self, kind: str) -> Condition:
        return next(condition for condition in self.status.conditions or [] if condition.type == kind)

    def truth(self, kind: str) -> str:
        return self.condition(kind).status

    @property
    def members(self) -> list[str]:
        return sorted(name.removeprefix(f"{JOB}-") for name in self.pods)


def acts(made: Plan) -> bool:
    """Whether a plan changes anything but to ask a coordinator again."""
    return bool(
        made.status
        or made.events
        or made.delete_pods
        or made.apply_shared
        or made.create_pods
        or made.delete_config_maps
        or made.delete_job
    )


def running_world(**spec: Any) -> World:
    """A job that has trained three steps and saved after the second."""
    world = World(document(**spec))
    world.settle()
    world.tick(5)
    world.run()
    world.settle()
    world.tick(20)
    world.train(3, checkpoint=2)
    world.settle()
    return world
