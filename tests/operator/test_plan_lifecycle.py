"""The life of a job: created, trained, suspended, scaled, finished; each by what the API server holds afterwards."""

from datetime import timedelta
from typing import Any

import pytest
from plan_world import World, acts, document, running_world

from grpo_operator.facts import LastWord
from grpo_operator.planning.conditions import TYPES


def test_the_first_visit_makes_everything_and_all_conditions() -> None:
    world = World(document())
    made = world.reconcile()
    assert made.apply_shared
    assert world.members == ["coordinator", "rollout-0", "rollout-1", "trainer-0"]
    assert [condition.type for condition in world.status.conditions or []] == list(TYPES)
    assert all(
        condition.last_transition_time and condition.observed_generation == 1
        for condition in world.status.conditions or []
    )
    assert world.status.state == "Pending" and world.status.start_time == "2026-11-22T12:00:00Z"
    assert "Normal Started: Creating coordinator, trainers and rollout engines." in world.events


def test_conditions_follow_the_pods_and_the_coordinator() -> None:
    world = World(document())
    world.settle()
    assert (world.truth("Scheduled"), world.truth("Ready"), world.truth("Progressing")) == ("False", "False", "False")
    world.run()
    world.settle()
    assert (world.truth("Scheduled"), world.truth("Ready"), world.status.state) == ("True", "True", "Starting")
    world.train(1)
    world.settle()
    assert (world.truth("Progressing"), world.condition("Progressing").reason, world.status.state) == (
        "True",
        "Training",
        "Training",
    )
    assert world.status.summary is not None
    assert (world.status.summary.trainers, world.status.summary.rollouts) == ("1/1", "2/2")
    assert any(event.startswith("Normal Training: Training begins") for event in world.events)


def test_the_transition_time_changes_with_the_status_alone() -> None:
    world = running_world()
    before = world.condition("Progressing")
    world.tick(60)
    world.train(4, state="Validating", checkpoint=2)
    world.settle()
    after = world.condition("Progressing")
    assert (before.reason, after.reason) == ("Training", "Validating")
    assert before.last_transition_time == after.last_transition_time


def test_progress_alone_is_written_once_in_ten_seconds() -> None:
    world = running_world()
    writes = len(world.statuses)
    for step in range(4, 20):
        world.tick(1)
        world.train(step, checkpoint=2 * (step // 2))
        made = world.reconcile()
        assert made.status is not None or made.requeue_after_seconds is not None
    assert len(world.statuses) - writes in (1, 2)


def test_the_first_and_the_last_step_are_written_at_once() -> None:
    world = World(document())
    world.settle()
    world.run()
    world.settle()
    world.train(0)
    world.settle()
    for step in (1, 20):
        world.tick(0.5)
        world.train(step)
        world.reconcile()
        assert world.status.progress is not None and world.status.progress.step == step


def test_progress_and_checkpoints_come_from_the_report() -> None:
    world = World(document(checkpoint={"saveFreq": 2, "keepLast": 2}))
    world.settle()
    world.run()
    members = [
        {"role": "rollout", "name": "rollout-0", "in_service": True, "weight_version": 7},
        {"role": "rollout", "name": "rollout-1", "in_service": True, "weight_version": 6},
        {"role": "rollout", "name": "rollout-2", "in_service": False, "weight_version": 1},
    ]
    world.train(7, checkpoint=6, reward=0.25, policy_version=7, members=members, eta_seconds=float("nan"))
    world.settle()
    progress, checkpoints = world.status.progress, world.status.checkpoints
    assert progress is not None and checkpoints is not None
    assert (progress.step, progress.reward, progress.policy_version, progress.rollout_version) == (7, 0.25, 7, 6)
    assert progress.eta_seconds is None
    assert (checkpoints.last_step, checkpoints.path) == (6, "checkpoints/6")
    kept = [{"step": step, "path": f"checkpoints/{step}", "time": 1.0} for step in (6, 8)]
    world.tick(20)
    world.train(8, checkpoint=8, checkpoints=kept)
    world.settle()
    assert [item.step for item in world.status.checkpoints.kept or []] == [6, 8]  # type: ignore[union-attr]
    assert sum("CheckpointSaved" in event for event in world.events) == 1


@pytest.mark.parametrize(("resume", "last", "kept"), [("never", 4, [2, 4]), ("auto", 90, [80, 90])])
def test_a_run_that_starts_anew_does_not_count_an_older_run_s_checkpoints(
    resume: str, last: int, kept: list[int]
) -> None:
    world = World(document(checkpoint={"saveFreq": 2, "keepLast": 2, "resume": resume}))
    world.settle()
    world.run()
    old = [{"step": step, "path": f"c/{step}", "time": world.now.timestamp() - 3600} for step in (90, 80)]
    world.tick(20)
    world.train(1, checkpoints=old)
    world.settle()
    assert (world.status.checkpoints is None) == (resume == "never")
    new = [{"step": step, "path": f"c/{step}", "time": world.now.timestamp() + step} for step in (4, 2)]
    world.tick(20)
    world.train(4, checkpoints=[*old, *new])
    world.settle()
    found = world.status.checkpoints
    assert found is not None and found.last_step == last
    assert [item.step for item in found.kept or []] == kept


def test_the_last_word_s_checkpoint_takes_the_place_of_the_oldest() -> None:
    world = running_world(checkpoint={"saveFreq": 2, "keepLast": 2})
    world.tick(20)
    world.train(4, checkpoints=[{"step": 4, "path": "c/4", "time": 1.0}, {"step": 2, "path": "c/2", "time": 1.0}])
    world.settle()
    world.end("coordinator", 80, word=LastWord("Yielded", "stopped", 5, "c/global_step_5"))
    world.settle()
    found = world.status.checkpoints
    assert found is not None and [item.step for item in found.kept or []] == [4, 5]


@pytest.mark.parametrize(
    ("step", "saved", "frequency", "status"),
    [(1, None, 2, "Unknown"), (5, None, 2, "False"), (5, 4, 2, "True"), (4, 0, 2, "True"), (5, 0, 2, "False"), (9, None, 0, "Unknown")],
)  # fmt: skip
def test_a_checkpoint_is_current_within_two_intervals(
    step: int, saved: int | None, frequency: int, status: str
) -> None:
    world = World(document(checkpoint={"saveFreq": frequency}))
    world.settle()
    world.run()
    world.train(step, checkpoint=saved)
    world.settle()
    assert world.truth("CheckpointCurrent") == status


def test_a_coordinator_that_starts_again_does_not_take_progress_back() -> None:
    world = running_world()
    world.tick(20)
    world.train(0, state="Starting")
    world.settle()
    assert world.status.progress is not None and world.status.progress.step == 3
    assert world.status.checkpoints is not None and world.status.checkpoints.last_step == 2


def test_an_operator_that_has_just_started_takes_nothing_back() -> None:
    world = running_world()
    before, events = world.status, list(world.events)
    world.report = None
    world.settle()
    assert (world.status, world.events) == (before, events)


@pytest.mark.parametrize(
    ("resume", "path", "saved"),
    [("auto", "checkpoints/global_step_5", 5), ("old/global_step_5", "old/global_step_5", 2), ("auto", None, 2)],
)
def test_the_last_word_may_tell_of_a_later_checkpoint(resume: str, path: str | None, saved: int) -> None:
    world = running_world(checkpoint={"resume": resume})
    world.edit(suspend=True)
    world.settle()
    world.end("coordinator", 80, word=LastWord("Yielded", "stopped after step 5", 5, path))
    world.settle()
    assert world.status.checkpoints is not None and world.status.progress is not None
    assert (world.status.checkpoints.last_step, world.status.progress.step) == (saved, 5)
    assert world.status.checkpoints.time is not None


def test_the_last_step_is_known_though_nobody_asked_the_coordinator_after_it() -> None:
    world = running_world()
    world.train(19)
    told = {"step": 20, "total_steps": 20, "epoch": 2.0, "reward": 0.75, "accuracy": 0.9, "policy_version": 20}
    world.end("coordinator", 0, word=LastWord("Completed", "", 20, "checkpoints/epoch_2_step_20", told))
    world.settle()
    progress, checkpoints = world.status.progress, world.status.checkpoints
    assert progress is not None and checkpoints is not None
    assert (progress.step, progress.epoch, progress.reward, progress.accuracy) == (20, 2.0, 0.75, 0.9)
    assert progress.policy_version == 20 and checkpoints.last_step == 20
    assert "20 steps, accuracy 0.900" in (world.status.message or "")


def test_success_is_sticky_and_ended_pods_stay() -> None:
    world = running_world()
    world.train(20, checkpoint=20)
    world.end("coordinator", 0)
    world.end("trainer-0", 0)
    world.settle()
    assert (world.truth("Succeeded"), world.truth("Failed"), world.status.state) == ("True", "False", "Succeeded")
    assert "accuracy 0.500" in (world.status.message or "")
    assert world.members == ["coordinator", "rollout-0", "rollout-1", "trainer-0"]  # engines end by themselves
    world.end("rollout-0", 0)
    world.tick(31)
    world.settle()
    assert world.pods["demo-rollout-1"].deleting and not world.pods["demo-rollout-0"].deleting
    world.pods.clear()
    world.settle()
    assert world.members == []
    world.edit(rollout={"replicas": 3})
    world.settle()
    assert world.members == [] and world.truth("Succeeded") == "True"


def test_a_sidecar_that_outlives_its_worker_does_not_keep_the_devices() -> None:
    world = running_world()
    world.end("trainer-0", 0)
    world.change("trainer-0", phase="Running")
    world.end("coordinator", 0)
    world.settle()
    assert world.truth("Succeeded") == "True" and not world.pods["demo-trainer-0"].deleting
    world.tick(31)
    world.settle()
    assert world.pods["demo-coordinator"].ended is not None, "its log stays"
    assert "demo-trainer-0" not in world.pods or world.pods["demo-trainer-0"].deleting


def test_success_counts_though_a_trainer_died_at_the_end() -> None:
    world = running_world()
    world.end("trainer-0", 137)
    world.end("coordinator", 0)
    world.settle()
    assert world.truth("Succeeded") == "True"


@pytest.mark.parametrize("started", [True, False])
def test_the_job_is_deleted_after_its_time_to_live(started: bool) -> None:
    world = running_world(ttlSecondsAfterFinished=100)
    world.end("coordinator", 0 if started else 65)
    world.settle()
    world.tick(99)
    assert not world.reconcile().delete_job and not world.deleted
    made = world.plan()
    assert made.requeue_after_seconds is not None and made.requeue_after_seconds <= 1
    world.tick(1)
    assert world.reconcile().delete_job and world.deleted


def test_a_job_that_is_being_deleted_is_left_to_its_owner_references() -> None:
    world = running_world()
    world.job["metadata"]["deletionTimestamp"] = "2026-11-22T12:10:00Z"
    made = world.plan()
    assert not acts(made) and made.requeue_after_seconds is None


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        ({"rollout": {"replicas": 0}}, "InvalidSpec", "rollout.replicas"),
        ({"data": {"trainBatchSize": "x"}}, "InvalidSpec", "trainBatchSize"),
        ({"runtime": {"workspace": None}}, "InvalidConfiguration", "workspace"),
    ],
)
def test_a_job_that_can_never_run_fails_with_the_field_to_change(spec: dict[str, Any], reason: str, words: str) -> None:
    world = World(document(**spec))
    world.settle()
    failed = world.condition("Failed")
    assert (failed.status, failed.reason) == ("True", reason)
    assert words in (failed.message or "")
    assert world.members == [] and not world.config_maps


def test_a_running_job_whose_document_became_invalid_goes_on_and_says_so() -> None:
    world = running_world()
    before = dict(world.pods)
    world.edit(rollout={"replicas": 0})
    world.settle()
    assert (world.condition("Progressing").reason, world.truth("Failed")) == ("InvalidSpec", "False")
    assert world.pods == before
    world.edit(rollout={"replicas": 2})
    world.settle()
    assert world.truth("Progressing") == "True"


def test_a_job_suspended_from_the_start_has_no_pods() -> None:
    world = World(document(suspend=True))
    world.settle()
    assert world.members == [] and world.truth("Suspended") == "True" and world.status.start_time is None
    world.tick(1000)
    world.edit(suspend=False)
    world.settle()
    assert "coordinator" in world.members and (world.truth("Suspended"), world.status.attempt) == ("False", 0)


def test_suspend_saves_first_then_frees_all_pods() -> None:
    world = running_world()
    world.edit(suspend=True)
    world.settle()
    assert world.asked_to_stop and world.status.state == "Suspending"
    assert not any(pod.deleting for pod in world.pods.values())
    world.tick(10)
    world.train(4, state="Stopping", checkpoint=4)
    world.end("coordinator", 80)
    world.end("trainer-0", 0)
    world.settle()
    assert not any(pod.deleting for pod in world.pods.values())  # engines have been told
    world.end("rollout-0", 0)
    world.end("rollout-1", 0)
    world.settle()
    assert world.members == [] and (world.truth("Suspended"), world.status.state) == ("True", "Suspended")
    assert "step 4" in (world.status.message or "") and world.status.stop_requested_time is None
    assert (world.status.restarts, world.status.uncounted_restarts) == (0, 0)


def test_resume_is_a_new_attempt_from_the_checkpoint() -> None:
    world = running_world()
    world.edit(suspend=True)
    world.settle()
    for name in ("coordinator", "trainer-0", "rollout-0", "rollout-1"):
        world.end(name, 80 if name == "coordinator" else 0)
    world.settle()
    world.tick(500)
    world.edit(suspend=False)
    world.settle()
    assert (world.status.attempt, world.status.restarts, world.status.suspended_seconds) == (1, 0, 500.0)
    assert {pod.attempt for pod in world.pods.values()} == {1} and len(world.pods) == 4
    assert any("Resumed: Going on from the checkpoint of step 2" in event for event in world.events)


def test_a_coordinator_that_does_not_stop_loses_its_pods_after_the_grace_period() -> None:
    world = running_world()
    world.edit(suspend=True)
    world.settle()
    world.tick(59)
    world.train(4, state="Stopping")
    world.settle()
    assert not any(pod.deleting for pod in world.pods.values())
    world.tick(2)
    world.settle()
    assert all(pod.deleting for pod in world.pods.values())
    world.pods.clear()
    world.settle()
    assert world.truth("Suspended") == "True"


def test_a_coordinator_that_cannot_be_reached_is_asked_by_sigterm_and_keeps_its_trainers() -> None:
    world = running_world()
    world.edit(suspend=True)
    world.settle()
    world.tick(21)
    world.settle()
    coordinator = world.pods["demo-coordinator"]
    assert coordinator.deletion_deadline == world.now + timedelta(seconds=39), "what is left of the grace period"
    assert [name for name, pod in world.pods.items() if pod.deleting] == ["demo-coordinator"]
    world.tick(10)
    world.end("coordinator", 80, word=LastWord("Yielded", "stopped after step 4", 4, "checkpoints/global_step_4"))
    world.settle()
    assert not world.pods["demo-trainer-0"].deleting, "it has been told, and ends by itself"
    world.vanish("coordinator")
    world.settle()
    world.reap()
    world.settle()
    assert world.truth("Suspended") == "True" and "Saved at step 4" in (world.status.message or "")


def test_suspend_before_the_coordinator_runs_deletes_at_once() -> None:
    world = World(document())
    world.settle()
    world.edit(suspend=True)
    world.settle()
    assert world.members == [] and not world.asked_to_stop


def test_suspend_taken_back_is_completed_and_then_resumed() -> None:
    world = running_world()
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    world.settle()
    for name in ("coordinator", "trainer-0", "rollout-0", "rollout-1"):
        world.end(name, 80 if name == "coordinator" else 0)
    world.settle()
    world.settle()
    assert {pod.attempt for pod in world.pods.values()} == {1} and world.truth("Suspended") == "False"


def test_a_pod_that_dies_while_the_job_stops_is_not_replaced() -> None:
    world = running_world()
    world.edit(suspend=True)
    world.settle()
    world.end("rollout-0", 137)
    world.end("trainer-0", 137)
    world.tick(10)
    world.settle()
    assert (world.status.attempt, world.status.failures) == (0, [])


def test_more_replicas_are_added_and_the_highest_go_first() -> None:
    world = running_world()
    uids = {name: pod.uid for name, pod in world.pods.items()}
    world.edit(rollout={"replicas": 4})
    made = world.reconcile()
    assert made.apply_shared and [create.index for create in made.create_pods] == [2, 3]
    assert any("Scaled: rollout.replicas: 2 -> 4" in event for event in world.events)
    world.run()
    world.settle()
    world.edit(rollout={"replicas": 1})
    world.settle()
    assert sorted(name for name, pod in world.pods.items() if pod.deleting) == [
        "demo-rollout-1",
        "demo-rollout-2",
        "demo-rollout-3",
    ]
    assert all(world.pods[name].uid == uid for name, uid in uids.items()) and world.status.attempt == 0
    world.end("rollout-3", 143)
    world.settle()
    assert world.status.failures == []  # told to go, so no failure
    assert world.status.rollout is not None and world.status.rollout.replicas == 3


def test_config_maps_that_no_pod_uses_are_deleted() -> None:
    world = running_world()
    (old,) = world.config_maps
    world.edit(rollout={"replicas": 3})
    world.settle()
    assert len(world.config_maps) == 2  # running pods keep theirs
    for name in list(world.pods):
        if world.pods[name].config == old:
            world.change(name.removeprefix("demo-"), config=next(iter(world.config_maps - {old})))
    world.settle()
    assert len(world.config_maps) == 1 and old not in world.config_maps


def test_the_deadline_saves_and_then_fails() -> None:
    world = running_world(activeDeadlineSeconds=100)
    world.tick(80)
    world.settle()
    assert world.asked_to_stop and world.status.state == "Stopping"
    world.train(9, state="Stopping", checkpoint=9)
    world.end("coordinator", 80)
    world.end("trainer-0", 0)
    world.end("rollout-0", 0)
    world.end("rollout-1", 0)
    world.settle()
    failed = world.condition("Failed")
    assert (failed.status, failed.reason) == ("True", "DeadlineExceeded") and "saved at step 9" in (
        failed.message or ""
    )
    assert len(world.pods) == 4  # ended ones stay for their logs


def test_time_suspended_does_not_count_against_the_deadline() -> None:
    world = running_world(activeDeadlineSeconds=100)
    world.edit(suspend=True)
    world.settle()
    world.pods.clear()
    world.settle()
    world.tick(1000)
    world.settle()
    assert world.truth("Failed") == "False"
    world.edit(suspend=False)
    world.settle()
    world.run()
    world.settle()
    assert world.truth("Failed") == "False" and not world.status.stop_requested_time
    world.tick(100)
    world.settle()
    assert world.status.stop_requested_time


def test_pods_of_a_status_not_seen_yet_are_left_alone() -> None:
    world = running_world()
    world.change("trainer-0", attempt=5)
    made = world.plan()
    assert not acts(made) and made.requeue_after_seconds


def test_a_colocated_job_has_a_pod_a_node_and_none_for_engines() -> None:
    spec = {"placement": "Colocated", "trainer": {"nodes": 2, "gpusPerNode": 2}, "rollout": {"replicas": 1}}
    world = World(document(**spec))
    world.settle()
    assert world.members == ["coordinator", "trainer-0", "trainer-1"]
    world.run()
    world.train(1)
    world.settle()
    assert (world.truth("Ready"), world.truth("Progressing")) == ("True", "True")
    assert world.status.summary is not None
    assert (world.status.summary.trainers, world.status.summary.rollouts) == ("2/2", "0/0")
    assert not any("Scaled" in event for event in world.events)
