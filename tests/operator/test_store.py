from typing import Any

import pytest

from grpo_operator import labels
from grpo_operator.control.read_job import read_job
from grpo_operator.control.read_pod import read_pod
from grpo_operator.control.store import Key, Store
from grpo_operator.facts import Pod

KEY = Key("team", "demo")


@pytest.fixture
def store() -> Store:
    return Store(read_job, read_pod)


def job(uid: str = "j1", version: int = 1, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "demo", "namespace": "team", "uid": uid, "resourceVersion": str(version), "managedFields": [{}]}
    return {"apiVersion": "grpo.dev/v1alpha1", "kind": "GRPOJob", "metadata": metadata, "spec": spec}


def pod(
    name: str = "demo-rollout-0", uid: str = "p1", version: int = 1, phase: str = "Pending", job_uid: str = "j1"
) -> dict[str, Any]:
    tags = labels.job_labels("demo", job_uid) | {
        labels.ROLE: "rollout",
        labels.INDEX: name.rsplit("-", 1)[-1],
        labels.ATTEMPT: "0",
    }
    return {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": tags,
            "ownerReferences": [{"kind": "GRPOJob", "name": "demo", "uid": job_uid, "controller": True}],
        },
        "spec": {"volumes": [{"name": "config", "configMap": {"name": "demo-abc"}}]},
        "status": {"phase": phase},
    }


def phases(store: Store) -> list[str]:
    return [item.phase for item in pods(store)]


def pods(store: Store) -> tuple[Pod, ...]:
    return store.pods(read_job(job()))


def test_only_a_newer_version_is_news(store: Store):
    assert store.update_pod(pod(version=5, phase="Running")) == KEY
    assert store.update_pod(pod(version=5, phase="Running")) is None
    assert store.update_pod(pod(version=4, phase="Pending")) is None, "a stale watch event after the answer to a write"
    assert phases(store) == ["Running"]
    assert store.update_pod(pod(version=10, phase="Failed")) == KEY, "versions are numbers: 10 is newer than 5"
    assert phases(store) == ["Failed"]


def test_what_is_gone_does_not_come_back(store: Store):
    store.update_pod(pod(version=5))
    assert store.remove_pod("p1", 6) == KEY
    assert store.update_pod(pod(version=5)) is None, "the answer to the delete, read after the watch told of its end"
    assert store.remove_pod("p1") is None
    assert pods(store) == ()


def test_a_new_pod_of_a_name_replaces_the_old_one(store: Store):
    store.update_pod(pod(uid="p1", version=5))
    store.update_pod(pod(uid="p2", version=9))
    assert [item.uid for item in pods(store)] == ["p2"]
    assert store.update_pod(pod(uid="p1", version=6)) is None


def test_pods_are_those_of_the_job_s_uid_not_of_its_name(store: Store):
    store.update_pod(pod(uid="p1", job_uid="j1"))
    store.update_pod(pod(uid="p2", name="demo-rollout-1", job_uid="j0"))
    assert [item.uid for item in pods(store)] == ["p1"]
    assert store.count() == (0, 2)


@pytest.mark.parametrize("spoilt", [{labels.ROLE: "chef"}, {labels.ATTEMPT: "one"}, {labels.JOB_UID: ""}])
def test_a_pod_with_spoilt_labels_is_left_aside(store: Store, spoilt: dict[str, str]):
    document = pod()
    document["metadata"]["labels"] |= spoilt
    assert store.update_pod(document) is None
    assert store.count() == (0, 0)


def owned_by(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    document["metadata"]["ownerReferences"][0] |= changes
    return document


def renamed(document: dict[str, Any], **changes: str) -> dict[str, Any]:
    document["metadata"] |= changes
    return document


@pytest.mark.parametrize(
    "foreign",
    [
        owned_by(pod(), uid="j2"),
        owned_by(pod(), controller=False),
        renamed(pod(), name="demo-rollout-00"),
        renamed(pod(), namespace="others"),
    ],
    ids=["another owner", "no controller", "another name", "another namespace"],
)
def test_a_pod_that_claims_a_job_by_its_labels_is_not_the_job_s(store: Store, foreign: dict[str, Any]):
    store.update_job(job())
    store.update_pod(foreign)
    assert pods(store) == ()


def test_a_pod_whose_labels_are_taken_away_is_not_the_job_s_until_they_are_back(store: Store):
    store.update_pod(pod(version=5))
    bare = pod(version=6)
    del bare["metadata"]["labels"][labels.JOB_UID]
    assert store.update_pod(bare) == KEY
    assert pods(store) == ()
    assert store.update_pod(pod(version=7)) == KEY and len(pods(store)) == 1


def test_pods_that_outlive_their_job_leave_nothing_behind(store: Store):
    store.update_job(job())
    store.update_pod(pod(version=5))
    store.remove_job(KEY, "j1", 6)
    store.update_pod(pod(version=7))
    assert store.config_maps("j1") == ()


def test_a_job_made_again_under_its_name_is_another_job(store: Store):
    assert store.update_job(job("j1", 5)) == KEY
    assert store.update_job(job("j2", 9)) == KEY
    assert not store.remove_job(KEY, "j1", 8), "the end of the first, told late"
    held = store.job(KEY)
    assert held is not None and held.uid == "j2"
    assert store.update_job(job("j1", 7)) is None


def test_documents_are_kept_without_managed_fields(store: Store):
    store.update_job(job())
    held = store.job(KEY)
    assert held is not None and "managedFields" not in held.document["metadata"]


def test_config_maps_are_known_by_use_until_they_are_deleted(store: Store):
    store.update_job(job())
    store.update_pod(pod())
    store.note_config_map("j1", "demo-new")
    store.remove_pod("p1")
    assert store.config_maps("j1") == ("demo-abc", "demo-new"), "the pod's outlives it: somebody has to delete it"
    store.forget_config_map("j1", "demo-abc")
    assert store.config_maps("j1") == ("demo-new",)
    store.remove_job(KEY, "j1")
    assert store.config_maps("j1") == ()


def test_a_list_tells_what_went_unseen_but_not_what_is_younger_than_it(store: Store):
    store.update_job(job(version=3))
    store.update_pod(pod(uid="p1", version=5))
    store.update_pod(pod(uid="p2", name="demo-rollout-1", version=20))
    assert store.absent_pods(listed=[], list_version=10) == ["p1"]
    assert store.absent_jobs(listed=[], list_version=10) == [(KEY, "j1")]
    assert store.absent_jobs(listed=["j1"], list_version=10) == []
