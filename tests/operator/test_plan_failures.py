"""What follows when pods end badly, do not start, or do not get on."""

import contextlib
import itertools
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from plan_world import OperatorDied, World, document, running_world

from grpo_operator.facts import LastWord
from grpo_worker.exit_policy import UNCOUNTED_LIMIT


def settle_after_second_word(world: World) -> None:
    for _ in range(3):
        world.settle()
        world.tick(6)
        world.reap()


# (who ended with what), action, culprit, counted
SET_TABLE: list[tuple[dict[str, int], str, str, bool]] = [
    ({"trainer-0": 137}, "RestartSet", "trainer-0", True),
    ({"trainer-0": 1}, "RestartSet", "trainer-0", True),
    ({"coordinator": 137}, "RestartSet", "coordinator", True),
    ({"coordinator": 70}, "RestartSet", "coordinator", True),
    ({"coordinator": 83}, "RestartSet", "coordinator", True),
    ({"coordinator": 75}, "RestartSet", "coordinator", False),
    ({"coordinator": 80}, "RestartSet", "coordinator", False),
    ({"coordinator": 75, "trainer-0": 137}, "RestartSet", "trainer-0", True),
    ({"trainer-0": 75, "coordinator": 139}, "RestartSet", "coordinator", True),
    ({"coordinator": 82, "trainer-0": 85}, "RestartSet", "trainer-0", True),
    ({"coordinator": 64}, "FailJob", "coordinator", True),
    ({"coordinator": 65}, "FailJob", "coordinator", True),
    ({"trainer-0": 78}, "FailJob", "trainer-0", True),
    ({"coordinator": 81}, "FailJob", "coordinator", True),
    ({"coordinator": 75, "trainer-0": 65}, "FailJob", "trainer-0", True),
]


@pytest.mark.parametrize(("ended", "action", "culprit", "counted"), SET_TABLE)
def test_what_follows_when_coordinator_or_trainers_end(
    ended: dict[str, int], action: str, culprit: str, counted: bool
) -> None:
    world = running_world()
    engines = {name: world.pods[name].uid for name in ("demo-rollout-0", "demo-rollout-1")}
    for name, code in ended.items():
        world.end(name, code)
    settle_after_second_word(world)
    (failure,) = world.status.failures or []
    assert (failure.action, failure.pod, failure.counted) == (action, f"demo-{culprit}", counted)
    if action == "RestartSet":
        assert (world.status.attempt, world.status.restarts, world.status.uncounted_restarts) == (
            1,
            counted,
            not counted,
        )
        assert {name: world.pods[name].uid for name in engines} == engines  # they stay
        assert {world.pods[f"demo-{name}"].attempt for name in ("coordinator", "trainer-0")} == {1}
    else:
        assert world.truth("Failed") == "True" and world.status.attempt == 0


def test_a_survivor_of_the_old_set_is_gone_before_the_new_one_starts() -> None:
    world = running_world()
    world.end("trainer-0", 137)
    world.settle()
    world.tick(6)
    world.settle()
    assert world.truth("Restarting") == "True" and world.status.state == "Restarting"
    assert world.pods["demo-coordinator"].deleting and "demo-trainer-0" not in world.pods
    world.tick(2)
    world.vanish("coordinator")
    world.settle()
    assert {world.pods[f"demo-{name}"].attempt for name in ("coordinator", "trainer-0")} == {1}
    world.run()
    world.train(3)
    world.settle()
    assert world.truth("Restarting") == "False"


def test_the_second_word_is_waited_for_but_not_for_ever() -> None:
    world = running_world()
    world.end("coordinator", 75)
    made = world.reconcile()
    assert made.status is None or made.status.attempt == 0
    assert made.requeue_after_seconds is not None and made.requeue_after_seconds <= 5
    world.tick(2)
    world.end("trainer-0", 137, reason="OOMKilled")
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.pod, failure.reason, failure.counted) == ("demo-trainer-0", "OOMKilled", True)


def test_a_clock_that_runs_ahead_does_not_make_us_wait_for_hours() -> None:
    world = running_world()
    pod = world.end("coordinator", 75)
    assert pod.ended is not None
    world.change("coordinator", ended=replace(pod.ended, finished=world.now + timedelta(hours=1)))
    world.reconcile()
    assert world.status.attempt == 1


@pytest.mark.parametrize(
    ("member", "code", "counted"),
    [
        ("rollout-0", 1, True),
        ("rollout-0", 137, True),
        ("rollout-1", 82, True),
        ("rollout-1", 75, False),
        ("rollout-0", 80, False),
    ],
)
def test_an_engine_is_replaced_alone(member: str, code: int, counted: bool) -> None:
    world = running_world()
    others = {name: pod.uid for name, pod in world.pods.items() if name != f"demo-{member}"}
    old = world.pods[f"demo-{member}"].uid
    world.end(member, code)
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.action, failure.counted, failure.pod_uid) == ("RestartPod", counted, old)
    assert member not in world.members  # back-off
    world.tick(3)
    world.settle()
    assert world.pods[f"demo-{member}"].uid != old
    assert {name: world.pods[name].uid for name in others} == others
    assert (world.status.attempt, world.truth("Progressing")) == (0, "True")
    rollout = next(role for role in world.status.roles or [] if role.name == "rollout")
    assert rollout.restarts == 1


def test_a_worker_whose_clock_runs_ahead_is_not_waited_for() -> None:
    world = running_world()
    pod = world.end("rollout-0", 0)
    assert pod.ended is not None
    world.change("rollout-0", ended=replace(pod.ended, finished=world.now + timedelta(hours=1)))
    world.reconcile()
    assert len(world.status.failures or []) == 1


def test_a_failure_whose_pod_is_still_there_outlives_newer_ones() -> None:
    world = running_world(failurePolicy={"maxRestarts": 100})
    world.evict("rollout-1")
    kept = world.change("rollout-1", ended=None, deletion_deadline=world.now + timedelta(hours=9)).uid
    for _ in range(12):
        world.settle()
        world.end("rollout-0", 1)
        world.settle()
        world.tick(61)
        world.settle()
        world.run("rollout-0")
    uids = [failure.pod_uid for failure in world.status.failures or []]
    assert len(uids) == 10 and kept in uids
    rollout = next(role for role in world.status.roles or [] if role.name == "rollout")
    assert rollout.restarts == 13


def test_an_engine_that_ended_as_told_is_replaced_when_the_job_goes_on() -> None:
    world = running_world()
    old = world.end("rollout-0", 0).uid
    world.settle()
    assert world.pods["demo-rollout-0"].uid == old  # the coordinator may be about to end
    world.tick(31)
    world.settle()
    world.tick(3)
    world.settle()
    (failure,) = world.status.failures or []
    assert world.pods["demo-rollout-0"].uid != old and failure.counted is False


def test_engines_that_die_together_are_one_failure() -> None:
    world = running_world(rollout={"replicas": 16}, failurePolicy={"maxRestarts": 1})
    world.run()
    world.settle()
    for turn in range(2):  # the second time no restart is left
        for index in range(16):
            world.end(f"rollout-{index}", 137)
        for _ in range(4):
            world.tick(3)
            world.settle()
        world.run()
        assert world.truth("Failed") == ("True" if turn else "False")
        if not turn:
            assert (
                len(world.pods) == 18 and world.status.budget is not None and world.status.budget.rollout_counted == 1
            )


def test_more_failures_than_the_status_keeps_are_each_acted_on_once() -> None:
    world = running_world(rollout={"replicas": 16}, failurePolicy={"maxRestarts": 100})
    world.run()
    world.settle()
    for index in range(16):
        world.end(f"rollout-{index}", 137)
    for _ in range(6):
        with contextlib.suppress(OperatorDied):
            world.execute(world.plan(), actions_until_death=2)  # the status, and at most one pod
        world.tick(1)
    for _ in range(4):
        world.settle()
        world.tick(3)
    seen: set[str | None] = set()
    for before, after in itertools.pairwise(world.statuses):
        known = {failure.pod_uid for failure in before.failures or []}
        new = [failure.pod_uid for failure in after.failures or [] if failure.pod_uid not in known]
        assert not seen & set(new)
        seen |= set(new)
    rollout = next(role for role in world.status.roles or [] if role.name == "rollout")
    assert (len(seen), rollout.restarts, len(world.pods)) == (16, 16, 18)


def test_a_chain_of_engine_failures_uses_up_the_budget() -> None:
    world = running_world(failurePolicy={"maxRestarts": 2})
    for turn in range(3):
        world.end("rollout-0", 1)
        world.settle()
        assert world.truth("Failed") == ("True" if turn == 2 else "False")
        world.tick(70)
        world.settle()
        world.run()
    assert "after 2 restarts without progress" in (world.status.message or "")


def test_memory_that_was_full_is_tried_again_and_the_last_word_has_the_remedy() -> None:
    """On the same nodes: another process's spike is not the node's fault."""
    world = running_world(failurePolicy={"maxRestarts": 1})
    word = LastWord("OutOfMemory", "trainer rank 0, update: out of memory. Lower actor.ppoMaxTokenLenPerGPU")
    for turn in range(2):
        world.end("trainer-0", 84, word=word)
        world.end("coordinator", 75)
        world.settle()
        assert world.truth("Failed") == ("True" if turn == 1 else "False")
        world.tick(70)
        world.settle()
        world.run()
    assert not world.status.excluded_nodes
    (failed,) = [condition for condition in world.status.conditions or [] if condition.type == "Failed"]
    assert failed.reason == "OutOfMemory"
    assert "Lower actor.ppoMaxTokenLenPerGPU" in failed.message


def test_the_back_off_doubles_and_progress_gives_the_budget_back() -> None:
    world = running_world()
    waits = []
    for _ in range(3):
        world.end("trainer-0", 1)
        world.end("coordinator", 75)
        world.settle()
        assert world.members == ["rollout-0", "rollout-1"]
        requeue = world.plan().requeue_after_seconds
        assert requeue is not None
        waits.append(requeue)
        world.tick(requeue)
        world.settle()
        world.run()
        world.settle()
    assert waits == [2, 4, 8]
    world.train(3)  # as far as before: no progress
    world.settle()
    assert world.status.budget is not None and world.status.budget.counted == 3
    world.tick(1)
    world.train(4)
    world.settle()
    assert world.status.budget.counted == 0 and world.status.restarts == 3
    world.end("trainer-0", 1)
    world.end("coordinator", 75)
    world.settle()
    assert world.truth("Failed") == "False"


@pytest.mark.parametrize(("code", "limit"), [(1, 3), (75, UNCOUNTED_LIMIT)])
def test_restarts_without_progress_are_bounded(code: int, limit: int) -> None:
    world = running_world()
    for turn in range(limit + 1):
        assert world.truth("Failed") == "False", turn
        world.end("trainer-0", code)
        world.end("coordinator", 75)
        world.settle()
        world.tick(61)
        world.settle()
        world.run()
    assert world.truth("Failed") == "True" and world.status.attempt == limit


@pytest.mark.parametrize("member", ["trainer-0", "coordinator"])
def test_a_preempted_member_restarts_the_set_without_charge(member: str) -> None:
    world = running_world(failurePolicy={"maxRestarts": 0})
    world.evict(member)
    other = "coordinator" if member == "trainer-0" else "trainer-0"
    world.end(other, 70)  # it fell over the loss of the other
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.pod, failure.reason, failure.counted) == (f"demo-{member}", "EvictionByEvictionAPI", False)
    assert (world.status.restarts, world.status.uncounted_restarts, world.status.attempt) == (0, 1, 1)


def test_an_evicted_pod_without_a_container_status_is_a_disruption() -> None:
    world = running_world(failurePolicy={"maxRestarts": 0})
    world.end("rollout-0", None, reason="Evicted", message="The node was low on resource: memory.")
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.reason, failure.counted, failure.action) == ("Evicted", False, "RestartPod")
    assert "low on resource" in (failure.message or "")


def test_a_member_that_somebody_deleted_restarts_the_set_without_charge() -> None:
    world = running_world(failurePolicy={"maxRestarts": 0})
    world.vanish("coordinator")
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.reason, failure.pod, failure.counted) == ("PodDeleted", "demo-coordinator", False)
    assert world.status.attempt == 1 and world.pods["demo-trainer-0"].deleting


def test_an_engine_that_somebody_deleted_comes_back() -> None:
    world = running_world()
    world.change("rollout-1", deletion_deadline=world.now + timedelta(seconds=60))
    world.settle()
    world.end("rollout-1", 143)
    world.settle()
    world.vanish("rollout-1")
    world.settle()
    assert world.pods["demo-rollout-1"].deletion_deadline is None
    assert (world.status.attempt, world.status.failures) == (0, [])


def test_a_set_that_was_being_made_is_completed_not_restarted() -> None:
    world = World(document())
    made = world.plan()
    with pytest.raises(OperatorDied):
        world.execute(made, actions_until_death=3)  # status, shared, coordinator
    assert world.members == ["coordinator"]
    world.settle()
    assert (len(world.pods), world.status.attempt, world.status.failures) == (4, 0, [])


def test_hardware_that_failed_is_left_out_for_a_while() -> None:
    world = running_world()
    world.end("trainer-0", 85)
    world.end("coordinator", 75)
    world.settle()
    (node,) = world.status.excluded_nodes or []
    assert node.name == "node-a" and world.status.restarts == 1
    world.tick(3601)
    world.settle()
    assert world.status.excluded_nodes == []


def test_a_node_that_does_not_answer_is_given_up_after_its_margin() -> None:
    world = running_world(failurePolicy={"maxRestarts": 0})
    world.change("trainer-0", deletion_deadline=world.now + timedelta(seconds=60))
    world.settle()
    world.tick(89)
    world.settle()
    assert "trainer-0" in world.members and world.status.attempt == 0
    world.tick(1)
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.reason, failure.counted, world.status.attempt) == ("NodeLost", False, 1)
    assert "trainer-0" not in world.members


def test_a_lost_node_takes_engines_alone() -> None:
    world = running_world()
    world.change("rollout-0", deletion_deadline=world.now - timedelta(seconds=31))
    world.settle()
    world.tick(5)
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.reason, failure.action, world.status.attempt) == ("NodeLost", "RestartPod", 0)
    assert world.pods["demo-rollout-0"].attempt == 0 and not world.pods["demo-rollout-0"].deleting


def test_a_rule_may_have_a_lost_node_restart_the_whole_job() -> None:
    world = running_world(failurePolicy={"rules": [{"action": "RestartJob", "reasons": ["NodeLost"]}]})
    world.change("rollout-0", deletion_deadline=world.now - timedelta(seconds=31))
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.reason, failure.action, failure.counted) == ("NodeLost", "RestartJob", True)
    assert (world.status.attempt, world.status.rollout_attempt) == (1, 1)


@pytest.mark.parametrize("terminal", [True, False])
def test_pods_of_a_lost_node_do_not_hold_up_a_job_that_ends(terminal: bool) -> None:
    world = running_world()
    if terminal:
        world.end("coordinator", 0)
    else:
        world.edit(suspend=True)
    world.settle()
    world.change("rollout-0", deletion_deadline=world.now - timedelta(seconds=31))
    world.settle()
    assert "rollout-0" not in world.members and world.status.failures == []


RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"action": "FailJob", "exitCodes": [137]}, "trainer-0", "FailJob"),
    ({"action": "FailJob", "exitCodes": [1]}, "trainer-0", "RestartSet"),
    ({"action": "FailJob", "roles": ["rollout"]}, "trainer-0", "RestartSet"),
    ({"action": "FailJob", "roles": ["rollout"]}, "rollout-0", "FailJob"),
    ({"action": "RestartJob", "roles": ["rollout"]}, "rollout-0", "RestartJob"),
    ({"action": "RestartSet", "roles": ["rollout"]}, "rollout-0", "RestartSet"),
    ({"action": "RestartJob", "reasons": ["OOMKilled"]}, "trainer-0", "RestartJob"),
    ({"action": "RestartJob", "reasons": ["Evicted"]}, "trainer-0", "RestartSet"),
    ({"action": "FailJob", "podConditions": ["DisruptionTarget"]}, "trainer-0", "RestartSet"),
]


@pytest.mark.parametrize(("rule", "member", "action"), RULES)
def test_the_first_rule_that_matches_wins(rule: dict[str, Any], member: str, action: str) -> None:
    late = {"action": "FailJob", "exitCodes": [99]}
    world = running_world(failurePolicy={"rules": [late, rule, {"action": "FailJob", "exitCodes": [86]}]})
    world.end(member, 137, reason="OOMKilled")
    settle_after_second_word(world)
    (failure,) = world.status.failures or []
    assert failure.action == action
    if action == "RestartJob":
        assert (world.status.attempt, world.status.rollout_attempt) == (1, 1)
        assert {pod.attempt for pod in world.pods.values()} == {1}


def test_a_rule_may_mend_what_would_fail_and_may_not_count() -> None:
    rule = {"action": "RestartSet", "exitCodes": [78], "count": False}
    world = running_world(failurePolicy={"maxRestarts": 0, "rules": [rule]})
    world.end("trainer-0", 78)
    settle_after_second_word(world)
    assert (world.truth("Failed"), world.status.attempt, world.status.uncounted_restarts) == ("False", 1, 1)


@pytest.mark.parametrize(("name", "words"), [("flaky-disk", "flaky-disk"), (None, "failurePolicy.rules[1]")])
def test_the_rule_that_decided_is_told(name: str | None, words: str) -> None:
    rule = {"action": "RestartJob", "exitCodes": [137], **({"name": name} if name else {})}
    world = running_world(failurePolicy={"rules": [{"action": "FailJob", "exitCodes": [99]}, rule]})
    world.end("trainer-0", 137)
    settle_after_second_word(world)
    (failure,) = world.status.failures or []
    assert f"RestartJob by rule {words}" in (failure.message or "")
    assert any(f"RestartJob by rule {words}" in event for event in world.events)


def test_a_rule_matches_a_condition_of_the_pod() -> None:
    rule = {"action": "FailJob", "podConditions": ["DisruptionTarget"]}
    world = running_world(failurePolicy={"rules": [rule]})
    world.evict("rollout-0")
    world.settle()
    assert world.truth("Failed") == "True"


def test_a_job_that_is_half_scheduled_gives_its_devices_back() -> None:
    world = World(document(failurePolicy={"startupTimeoutSeconds": 600.0, "maxRestarts": 1}))
    world.settle()
    world.run("coordinator", "rollout-0", "rollout-1")
    world.change("trainer-0", unschedulable="0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    world.settle()
    scheduled = world.condition("Scheduled")
    assert (scheduled.status, scheduled.reason) == ("False", "Unschedulable")
    assert "1 Insufficient nvidia.com/gpu" in (world.status.message or "") and "trainer.gpusPerNode" in (
        world.status.message or ""
    )
    assert sum("Warning Unschedulable" in event for event in world.events) == 1
    world.tick(599)
    world.settle()
    assert world.status.attempt == 0
    world.tick(1)
    world.settle()
    assert (world.status.attempt, world.status.restarts) == (1, 1)
    assert all(pod.deleting for pod in world.pods.values())
    world.pods.clear()
    world.tick(3)
    world.settle()
    assert len(world.pods) == 4
    world.tick(600)
    world.settle()
    assert (world.condition("Failed").status, world.condition("Failed").reason) == ("True", "StartupTimeout")


def test_a_set_that_cannot_be_completed_gives_its_devices_back_too() -> None:
    world = World(document(failurePolicy={"startupTimeoutSeconds": 600.0}))
    with pytest.raises(OperatorDied):
        world.execute(world.plan(), actions_until_death=3)  # a quota refuses what comes after the coordinator
    world.run("coordinator")
    world.tick(599)
    made = world.plan()
    assert made.status is not None and made.status.attempt == 0
    world.tick(1)
    made = world.plan()
    assert made.status is not None and (made.status.attempt, made.status.restarts) == (1, 1)
    assert [deletion.name for deletion in made.delete_pods] == ["demo-coordinator"]


QUOTA = 'pods "demo-trainer-0" is forbidden: exceeded quota: team, requested: pods=1, used: pods=1, limited: pods=1'


def test_a_quota_is_told_in_the_condition_and_in_the_line_for_people_until_it_lets_the_pods_pass() -> None:
    world = World(document(), refuse=QUOTA, quota=1)
    for _ in range(4):
        world.reconcile()
    assert world.members == ["coordinator"]
    scheduled = world.condition("Scheduled")
    assert (scheduled.status, scheduled.reason) == ("False", "QuotaExceeded")
    assert "trainer-0 was refused by the API server" in (scheduled.message or "")
    assert "exceeded quota: team" in (world.status.message or "") and "ResourceQuota" in (world.status.message or "")
    assert sum("Warning QuotaExceeded" in event for event in world.events) == 1
    assert (world.status.state, world.status.attempt) == ("Pending", 0)

    world.refuse = None
    world.settle()
    assert len(world.pods) == 4
    assert world.condition("Scheduled").reason == "Pending"


def test_half_a_job_gives_its_devices_back_with_the_quota_s_words() -> None:
    world = World(document(failurePolicy={"startupTimeoutSeconds": 600.0}), refuse=QUOTA, quota=1)
    world.reconcile()
    world.run("coordinator")
    world.reconcile()
    world.tick(600)
    world.reconcile()
    assert (world.status.attempt, world.status.restarts) == (1, 1)
    (failure,) = world.status.failures or []
    assert failure.reason == "QuotaExceeded" and "exceeded quota: team" in (failure.message or "")
    assert [pod.name for pod in world.pods.values() if not pod.deleting] == []


def test_an_engine_that_a_quota_refuses_is_told_of_while_training_goes_on() -> None:
    world = running_world(failurePolicy={"startupTimeoutSeconds": 60.0})
    world.refuse, world.quota = QUOTA, 4
    world.edit(rollout={"replicas": 3})
    for step in range(4, 10):
        world.tick(30)
        world.train(step)
        world.reconcile()
    assert world.condition("Scheduled").reason == "QuotaExceeded"
    assert (world.status.state, world.status.attempt, world.status.failures) == ("Training", 0, [])


def test_a_pod_that_can_never_be_is_the_end_of_a_new_job_and_not_of_one_that_has_trained() -> None:
    words = 'Pod "demo-rollout-2" is invalid: spec.tolerations[0].operator: Invalid value: "exists"'
    new = World(document(), refuse=words)
    new.reconcile()
    new.reconcile()
    assert (new.condition("Failed").status, new.condition("Failed").reason) == ("True", "InvalidPod")
    assert "spec.tolerations[0].operator" in (new.status.message or "")
    assert "runtime.podTemplate" in (new.status.message or "")

    trained = running_world()
    trained.refuse = words
    trained.edit(rollout={"replicas": 3})
    for _ in range(3):
        trained.reconcile()
    assert (trained.status.state, trained.condition("Scheduled").reason) == ("Training", "InvalidPod")


def test_engines_beyond_the_minimum_may_wait() -> None:
    world = World(document(rollout={"replicas": 3, "minReplicas": 1}, failurePolicy={"startupTimeoutSeconds": 60.0}))
    world.settle()
    world.run("coordinator", "trainer-0", "rollout-0")
    world.tick(1000)
    world.settle()
    assert world.status.attempt == 0


@pytest.mark.parametrize("operator_restarted", [False, True])
def test_a_job_that_trains_is_not_restarted_for_engines_that_nobody_can_place(operator_restarted: bool) -> None:
    world = running_world(failurePolicy={"startupTimeoutSeconds": 60.0})
    world.edit(rollout={"replicas": 4})
    world.settle()
    for step in range(4, 10):
        world.tick(30)
        world.train(step)
        world.settle()
    if operator_restarted:
        world.report = None
        world.settle()
    assert (world.status.attempt, world.status.failures) == (0, [])
    assert not any(pod.deleting for pod in world.pods.values())


def test_an_engine_that_waited_long_before_the_set_restarted_has_its_time_anew() -> None:
    world = running_world(failurePolicy={"startupTimeoutSeconds": 60.0})
    world.edit(rollout={"replicas": 3})
    world.settle()
    world.tick(300)
    world.train(4)
    world.end("trainer-0", 137)
    settle_after_second_word(world)
    world.run("coordinator", "trainer-0")
    world.settle()
    assert (world.status.attempt, world.status.rollout_attempt) == (1, 0)
    world.tick(61)
    world.settle()
    assert (world.status.attempt, world.status.rollout_attempt) == (2, 2), (
        "before its first step the job needs them all"
    )


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("ImagePullBackOff", "ImagePullFailed"),
        ("ErrImagePull", "ImagePullFailed"),
        ("CreateContainerConfigError", "CreateContainerConfigError"),
    ],
)
def test_a_pod_that_cannot_start_shows_why_at_once_and_restarts_after_the_limit(reason: str, shown: str) -> None:
    world = World(document(failurePolicy={"startupTimeoutSeconds": 60.0}))
    world.settle()
    world.wait("trainer-0", reason, "no such thing")
    world.settle()
    assert world.condition("Ready").reason == shown and "no such thing" in (world.status.message or "")
    world.tick(61)
    world.settle()
    assert (world.status.failures or [])[0].reason == shown and world.status.restarts == 1


def test_an_image_name_that_can_never_be_valid_fails_at_once() -> None:
    world = World(document())
    world.settle()
    world.wait("rollout-1", "InvalidImageName", "couldn't parse image name")
    world.settle()
    assert world.condition("Failed").reason == "InvalidImageName" and "runtime.image" in (world.status.message or "")


STALL = {"stallTimeoutSeconds": 100.0, "startupTimeoutSeconds": 1000.0}


def test_a_job_without_steps_is_restarted_though_it_lives() -> None:
    world = running_world(failurePolicy=STALL)
    for _ in range(3):
        world.tick(30)
        world.train(3, last_progress_time=world.now.timestamp() - 30 * (_ + 1))
        world.settle()
    assert world.status.attempt == 0
    world.tick(11)
    world.settle()
    (failure,) = world.status.failures or []
    assert (failure.reason, failure.counted, world.status.attempt) == ("Stalled", True, 1)
    assert world.pods["demo-coordinator"].deleting and not world.pods["demo-rollout-0"].deleting


def test_a_start_has_its_own_allowance() -> None:
    world = World(document(failurePolicy=STALL))
    world.settle()
    world.run()
    world.train(0, state="Starting")
    world.tick(1099)
    world.settle()
    assert world.status.attempt == 0
    world.tick(1)
    world.settle()
    assert world.status.attempt == 1


def test_a_coordinator_that_saves_because_its_pod_is_being_deleted_does_not_stall() -> None:
    world = running_world(failurePolicy=STALL)
    world.change("coordinator", deletion_deadline=world.now + timedelta(seconds=300))
    world.tick(250)
    world.settle()
    assert (world.status.attempt, world.status.failures) == (0, [])


def test_a_coordinator_that_cannot_be_reached_stalls_too() -> None:
    world = running_world(failurePolicy=STALL)
    world.report = None
    world.tick(1101)
    world.settle()
    assert (world.status.failures or [])[0].reason == "Stalled"
    assert "could not be reached" in ((world.status.failures or [])[0].message or "")


def test_the_failures_kept_are_the_last_ten() -> None:
    world = running_world(failurePolicy={"maxRestarts": 100})
    for turn in range(14):
        world.end("trainer-0", 1, word=LastWord("Broken", f"turn {turn}"))
        world.end("coordinator", 75)
        world.settle()
        world.tick(61)
        world.settle()
        world.run()
    messages = [failure.message for failure in world.status.failures or []]
    assert messages == [f"trainer-0: turn {turn}" for turn in range(13, 3, -1)]
