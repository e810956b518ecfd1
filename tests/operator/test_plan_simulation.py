"""Jobs on a cluster where everything that may go wrong does, the operator included; seeded, so each walk can be repeated.

What has to hold on every walk, and not how the plan gets there:
- one pod a role and index; never set pods of two attempts at once; no pod of a terminal or suspended job is made
- a failure is charged once, wherever the operator dies; each attempt has one cause
- a suspended job has no pods; a job left in peace ends
- a plan that was carried out comes to rest
"""

import random
from dataclasses import replace
from datetime import timedelta

import pytest
from plan_world import JOB, OperatorDied, World, document

from grpo_operator.facts import Pod
from grpo_operator.labels import Role
from grpo_operator.planning import conditions
from grpo_worker.config.status import GRPOJobStatus

TOTAL_STEPS = 20
CODES = (1, 70, 75, 80, 82, 83, 85, 137, 139, 143, 0)


class Cluster(World):
    """A world that moves by itself."""

    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.step = self.saved = 0
        self.stuck: set[str] = set()  # uids of pods on a node that does not answer
        self.causes: dict[int, list[str]] = {}  # what happened to the set, by attempt
        self.resumes = 0
        self.recorded: dict[str, str] = {}  # pod uid -> action
        self.fatal = False
        self.last: GRPOJobStatus | None = None

    # invariants

    def _create(self, role: Role, index: int) -> None:
        assert not conditions.holds(self.status, "Succeeded") and not conditions.holds(self.status, "Failed")
        assert not self.job["spec"].get("suspend"), "a pod of a suspended job"
        super()._create(role, index)

    def check_write(self) -> None:
        """The status that was just written against the one before."""
        before, now = self.last or GRPOJobStatus(attempt=0), self.status
        self.last = now
        for kind in ("Succeeded", "Failed"):
            assert not conditions.holds(before, kind) or conditions.holds(now, kind), f"{kind} is not sticky"  # type: ignore[arg-type]
        bump = (now.attempt or 0) - (before.attempt or 0)
        assert bump in (0, 1)
        if bump:
            resumed = conditions.holds(before, "Suspended")
            self.resumes += resumed
            assert resumed or self.causes.get(before.attempt or 0), f"attempt {before.attempt} ended for no reason"
        assert (now.restarts or 0) + (now.uncounted_restarts or 0) + self.resumes == (now.attempt or 0)
        if conditions.holds(now, "Suspended"):
            assert not self.pods
        known = {failure.pod_uid for failure in before.failures or []}
        for failure in now.failures or []:
            if failure.pod_uid and failure.pod_uid not in known:
                assert failure.pod_uid not in self.recorded, f"{failure.pod} is charged twice"
                self.recorded[failure.pod_uid] = failure.action or ""
        assert len(now.failures or []) <= 10
        replaced = sum(action == "RestartPod" for action in self.recorded.values())
        rollout = next((role for role in now.roles or [] if role.name == "rollout"), None)
        whole = sum(action == "RestartJob" for action in self.recorded.values())
        assert rollout is None or rollout.restarts == replaced + whole

    # the operator

    def operate(self, *, dies: bool) -> None:
        made = self.plan()
        try:
            self.execute(made, self.random.randrange(6) if dies else None)
        except OperatorDied:
            pass
        if self.last is None or self.status != self.last:
            self.check_write()

    # the cluster

    def move(self) -> None:
        """The kubelets and the job's processes, for a few seconds."""
        self.tick(self.random.choice((1, 2, 5, 10)))
        for pod in list(self.pods.values()):
            member = pod.name.removeprefix(f"{JOB}-")
            if pod.deletion_deadline is not None:
                late = self.now >= pod.deletion_deadline
                if pod.uid not in self.stuck and (late or self.random.random() < 0.3):
                    self.vanish(member)
            elif not pod.started and pod.ended is None and self.random.random() < 0.6:
                self.run(member)
        self.train_or_end()

    def alive(self, role: Role) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.role is role and pod.started and pod.ended is None]

    def train_or_end(self) -> None:
        coordinator, trainers, engines = (self.alive(role) for role in Role)
        if coordinator and coordinator[0].name in self.asked_to_stop:
            self.asked_to_stop.clear()
            self.saved = self.step
            return self.all_end(80)
        if coordinator and trainers and coordinator[0].attempt == trainers[0].attempt and not coordinator[0].deleting:
            if self.report is None or self.report.pod_uid != coordinator[0].uid:
                self.step = self.saved
            if engines and self.random.random() < 0.5:
                self.step += 1
                self.saved = self.step if self.step % 2 == 0 else self.saved
                self.train(self.step, checkpoint=self.saved or None)
            if self.step >= TOTAL_STEPS:
                self.all_end(0)
        elif (coordinator or trainers) and self.random.random() < 0.5:  # who is left loses the other
            pod = (coordinator or trainers)[0]
            if pod.ended is None and any(other.ended for other in self.pods.values() if other.role is not Role.ROLLOUT):
                self.kill(pod, 75)
        return None

    def all_end(self, code: int) -> None:
        for pod in self.alive(Role.COORDINATOR):
            self.kill(pod, code)
        for pod in (*self.alive(Role.TRAINER), *self.alive(Role.ROLLOUT)):
            if self.random.random() < 0.8:
                self.kill(pod, 0)

    def kill(self, pod: Pod, code: int) -> None:
        self.blame(pod, f"exit {code}")
        self.end(pod.name.removeprefix(f"{JOB}-"), code)

    def blame(self, pod: Pod, what: str) -> None:
        if pod.role is not Role.ROLLOUT:
            self.causes.setdefault(pod.attempt, []).append(f"{pod.name} {what}")

    def harm(self) -> None:
        """One accident, or one change of mind."""
        kind = self.random.choice(("kill", "kill", "evict", "delete", "vanish", "lose", "suspend", "scale", "fatal"))
        pod = self.random.choice(list(self.pods.values())) if self.pods else None
        if kind == "suspend":
            return self.edit(suspend=not self.job["spec"].get("suspend", False))
        if kind == "scale":
            return self.edit(rollout={"replicas": self.random.randint(1, 4)})
        if pod is None or pod.ended is not None:
            return None
        member = pod.name.removeprefix(f"{JOB}-")
        if kind == "kill" and pod.started and not pod.deleting:
            code = self.random.choice(CODES)
            if not (code == 0 and pod.role is Role.COORDINATOR):  # a lie that nobody could tell
                self.kill(pod, code)
        elif kind == "evict" and pod.started:
            self.blame(pod, "evicted")
            self.evict(member)
        elif kind == "vanish":
            self.blame(pod, "gone")
            self.vanish(member)
        elif kind in ("delete", "lose") and not pod.deleting and pod.scheduled:
            self.blame(pod, kind)
            self.pods[pod.name] = replace(pod, deletion_deadline=self.now + timedelta(seconds=60))
            if kind == "lose":
                self.stuck.add(pod.uid)
        elif kind == "fatal" and self.fatal and pod.started and self.random.random() < 0.2:
            self.kill(pod, 65)
        return None


def walk(seed: int, max_restarts: int, *, fatal: bool) -> Cluster:
    world = Cluster(document(trainer={"nodes": 1 + seed % 2}, failurePolicy={"maxRestarts": max_restarts}))
    world.begin(seed)
    world.fatal = fatal
    for _ in range(120):
        world.move()
        if world.random.random() < 0.25:
            world.harm()
        if world.random.random() < 0.8:
            world.operate(dies=world.random.random() < 0.4)
    return world


@pytest.mark.parametrize("seed", range(24))
def test_every_job_ends_and_every_failure_is_charged_once(seed: int) -> None:
    world = walk(seed, max_restarts=1000 if seed % 4 else 3, fatal=seed % 5 == 0)
    if world.job["spec"].get("suspend"):
        world.edit(suspend=False)
    for _ in range(600):
        if conditions.holds(world.status, "Succeeded") or conditions.holds(world.status, "Failed"):
            break
        world.move()
        world.operate(dies=False)
    else:
        raise AssertionError(f"the job neither ends nor fails: {world.status.message}")
    if seed % 4 and seed % 5:
        assert conditions.holds(world.status, "Succeeded") or _used_up(world), world.status.message
    world.tick(60)
    world.settle()
    assert all(pod.ended is not None or pod.deleting for pod in world.pods.values())


def _used_up(world: Cluster) -> bool:
    """Failed for more uncounted restarts than the limit: only chaos at its worst does that."""
    return "again and again" in (world.status.message or "")


@pytest.mark.parametrize("seed", range(6))
def test_a_suspended_job_always_ends_with_no_pods(seed: int) -> None:
    world = walk(1000 + seed, max_restarts=1000, fatal=False)
    if not world.job["spec"].get("suspend"):
        world.edit(suspend=True)
    for _ in range(100):
        world.move()
        world.operate(dies=False)
        if conditions.holds(world.status, "Suspended") or world.status.completion_time:
            break
    else:
        raise AssertionError(f"not suspended: {world.status.message} {world.members}")
    assert world.status.completion_time or not world.pods


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_that_was_carried_out_comes_to_rest(seed: int) -> None:
    world = Cluster(document())
    world.begin(2000 + seed)
    for _ in range(60):
        world.move()
        if world.random.random() < 0.25:
            world.harm()
        world.settle(visits=5)
