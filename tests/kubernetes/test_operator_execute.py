"""Plans carried out against a real API server: what another plan, operator or person did in between."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from e2e.cluster import ControlPlane
from operator_process import KEY, Cluster, install

from grpo_operator import build
from grpo_operator.api import GRPOJOBS, PODS, Api, ApiError, NotLeader
from grpo_operator.control import kubernetes_events
from grpo_operator.control.execute import Blocked, Executor, MovedOn
from grpo_operator.control.kubernetes_events import EventRecorder
from grpo_operator.control.read_job import read_job
from grpo_operator.control.read_pod import read_pod
from grpo_operator.control.reports import Reports
from grpo_operator.control.store import Key, Store
from grpo_operator.control.watches import Watches
from grpo_operator.facts import Job, Observation, Pod
from grpo_operator.labels import Role
from grpo_operator.planning.actions import CreatePod, DeletePod, Event, Plan
from grpo_operator.settings import Settings
from grpo_worker.config.status import GRPOJobStatus

pytestmark = pytest.mark.asyncio

COORDINATOR = CreatePod(Role.COORDINATOR, 0)


@dataclass
class Bench:
    """An executor and what it works on."""

    cluster: Cluster
    api: Api
    store: Store
    executor: Executor
    requests: list[tuple[str, str, str]]

    def look(self) -> Observation:
        """The job as it is now."""
        self.store.update_job(self.cluster.control_plane.get("grpojob", "demo", "-n", self.cluster.namespace))
        job = self.job
        return Observation(job, self.store.pods(job))

    @property
    def job(self) -> Job:
        job = self.store.job(Key(self.cluster.namespace, "demo"))
        assert job is not None
        return job

    @property
    def pods(self) -> tuple[Pod, ...]:
        return self.store.pods(self.job)


@pytest_asyncio.fixture
async def bench(control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    install(control_plane)
    cluster = Cluster(control_plane, namespace)
    cluster.submit()
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    requests: list[tuple[str, str, str]] = []
    async with (
        Api(lambda *request: requests.append(request)) as api,
        Reports(KEY, list, lambda job: None) as reports,
    ):
        store = Store(read_job, read_pod)
        events = EventRecorder(api, "test")
        executor = Executor(api, store, Watches(), events, reports, Settings(worker_image="image:1"), KEY)
        yield Bench(cluster, api, store, executor, requests)


async def test_a_job_that_changed_since_it_was_seen_is_not_touched(bench: Bench):
    seen = bench.look()
    bench.cluster.patch("demo", {"suspend": True})
    plan = Plan(status=GRPOJobStatus(attempt=1), create_pods=(COORDINATOR,))
    with pytest.raises(MovedOn, match="has changed"):
        await bench.executor.execute(seen, plan)
    assert bench.cluster.pods() == {} and "attempt" not in bench.cluster.status()
    assert bench.job.spec is not None and bench.job.spec.suspend, (
        "the next plan sees the change without waiting for the watch"
    )


async def test_a_job_made_again_under_its_name_does_not_inherit_a_status(bench: Bench):
    seen = bench.look()
    bench.cluster.kubectl("delete", "grpojob", "demo")
    bench.cluster.submit()
    with pytest.raises(MovedOn):
        await bench.executor.execute(seen, Plan(status=GRPOJobStatus(attempt=7)))
    assert "attempt" not in bench.cluster.status()


async def test_the_plan_after_a_write_sees_it_without_the_watch(bench: Bench):
    await bench.executor.execute(
        bench.look(), Plan(status=GRPOJobStatus(attempt=2), apply_shared=True, create_pods=(COORDINATOR,))
    )
    assert bench.job.status.attempt == 2
    assert [(pod.role, pod.attempt) for pod in bench.pods] == [(Role.COORDINATOR, 2)]


async def test_a_pod_that_is_there_already_is_taken_into_the_picture(bench: Bench):
    seen = bench.look()
    await bench.executor.execute(seen, Plan(apply_shared=True, create_pods=(COORDINATOR,)))
    (pod,) = bench.pods
    bench.store.remove_pod(pod.uid)
    bench.store._gone.clear()
    with pytest.raises(MovedOn, match="exists already"):
        await bench.executor.execute(seen, Plan(create_pods=(COORDINATOR,)))
    assert bench.pods == (pod,)


async def test_a_pod_of_the_same_name_but_another_uid_is_not_deleted(bench: Bench):
    seen = bench.look()
    await bench.executor.execute(seen, Plan(apply_shared=True, create_pods=(COORDINATOR,)))
    await bench.executor.execute(seen, Plan(delete_pods=(DeletePod("demo-coordinator", "another-uid"),)))
    assert set(bench.cluster.pods()) == {"coordinator"}
    await bench.executor.execute(seen, Plan(delete_pods=(DeletePod("demo-coordinator", bench.pods[0].uid),)))
    assert bench.cluster.pods() == {}


async def test_shared_objects_that_were_changed_or_deleted_come_back(bench: Bench):
    seen = bench.look()
    await bench.executor.execute(seen, Plan(apply_shared=True))
    bench.cluster.kubectl("delete", "service", "demo")
    bench.cluster.kubectl("delete", "configmap", build.config_map_name(bench.job))
    bench.cluster.kubectl("label", "networkpolicy", "--all", "grpo.dev/job-uid=x", "--overwrite")
    await bench.executor.execute(seen, Plan(apply_shared=True))
    assert len([child for child in bench.cluster.children() if child == "Service/demo"]) == 1
    assert f"ConfigMap/{build.config_map_name(bench.job)}" in bench.cluster.children()
    (policy,) = bench.cluster.control_plane.get("networkpolicies", "-n", bench.cluster.namespace)["items"]
    assert policy["metadata"]["labels"]["grpo.dev/job-uid"] == bench.job.uid


async def test_a_config_map_that_a_pod_template_named_is_not_deleted(bench: Bench):
    seen = bench.look()
    await bench.executor.execute(seen, Plan(apply_shared=True))
    bench.cluster.kubectl("create", "configmap", "theirs", "--from-literal=a=b")
    ours = build.config_map_name(bench.job)
    await bench.executor.execute(seen, Plan(delete_config_maps=("theirs", ours, "absent")))
    assert bench.cluster.control_plane.get("configmap", "theirs", "-n", bench.cluster.namespace)["data"] == {"a": "b"}
    assert f"ConfigMap/{ours}" not in bench.cluster.children()


async def test_a_coordinator_that_does_not_answer_holds_up_nothing(bench: Bench):
    seen = bench.look()
    await bench.executor.execute(seen, Plan(apply_shared=True, create_pods=(COORDINATOR,)))
    (pod,) = bench.pods
    stop = Plan(stop_coordinator=pod.name, delete_pods=(DeletePod(pod.name, pod.uid),))
    await bench.executor.execute(bench.look(), stop)
    assert bench.cluster.pods() == {}


async def test_a_pod_whose_labels_somebody_took_away_is_in_the_way(bench: Bench):
    seen = bench.look()
    await bench.executor.execute(seen, Plan(apply_shared=True, create_pods=(COORDINATOR,)))
    (pod,) = bench.pods
    bench.cluster.kubectl("label", "pod", pod.name, "grpo.dev/job-uid-")
    with pytest.raises(Blocked, match="is not this job's"):
        await bench.executor.execute(seen, Plan(create_pods=(COORDINATOR,)))
    assert bench.pods == ()


async def test_a_job_made_again_waits_for_the_pods_of_the_one_before(bench: Bench):
    seen = bench.look()
    await bench.executor.execute(seen, Plan(apply_shared=True, create_pods=(COORDINATOR,)))
    (pod,) = bench.pods
    hold = '{"metadata": {"finalizers": ["example.com/hold"]}}'
    bench.cluster.kubectl("patch", "pod", pod.name, "--type=merge", "-p", hold)
    bench.cluster.kubectl("delete", "pod", pod.name, "--wait=false")
    bench.cluster.kubectl("delete", "grpojob", "demo")
    bench.cluster.submit()
    again = bench.look()
    for _ in range(2):
        with pytest.raises(Blocked, match="is not gone yet"):
            await bench.executor.execute(again, Plan(create_pods=(COORDINATOR,)))
    events = bench.cluster.control_plane.get("events", "-n", bench.cluster.namespace)["items"]
    assert not [event for event in events if event["reason"] == "NameTaken"]
    bench.cluster.kubectl("patch", "pod", pod.name, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    await bench.executor.execute(again, Plan(create_pods=(COORDINATOR,)))
    assert [pod.role for pod in bench.pods] == [Role.COORDINATOR]


async def test_an_event_said_again_and_again_is_one_event_with_a_count(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kubernetes_events, "REPEAT_SECONDS", 0.0)
    event = Event("Warning", "Trouble", "The same words. " * 200)
    for _ in range(3):
        await bench.executor.execute(bench.look(), Plan(events=(event,)))
    (found,) = [
        item
        for item in bench.cluster.control_plane.get("events", "-n", bench.cluster.namespace)["items"]
        if item["reason"] == "Trouble"
    ]
    assert found["series"]["count"] == 3
    assert found["involvedObject"]["uid"] == bench.job.uid
    assert len(found["message"]) == 1024


async def test_nothing_is_written_without_the_lease(bench: Bench):
    seen = bench.look()
    bench.api.may_write = lambda: False
    with pytest.raises(NotLeader):
        await bench.executor.execute(seen, Plan(status=GRPOJobStatus(attempt=1)))
    assert await bench.api.get(GRPOJOBS, bench.cluster.namespace, "demo")


async def test_an_error_says_verb_object_and_the_server_s_words(bench: Bench):
    with pytest.raises(ApiError, match=r"get pods test-\w+/absent: 404 NotFound: pods \"absent\" not found"):
        await bench.api.get(PODS, bench.cluster.namespace, "absent")
    assert bench.requests[-1] == ("get", "pods", "404")
