"""Decides what is done next for one job: a pure function of what was observed and the time.

Invariant: level-triggered. Nothing is remembered but what the status says, so it does not matter what was missed, how often this runs, or
at which line the last plan was broken off; a plan carried out in full is followed by one that changes nothing. `status.state` and
`status.message` are for people: nothing here reads them.
"""

from collections.abc import Callable
from datetime import datetime

from grpo_operator import build
from grpo_operator.facts import Observation
from grpo_operator.planning import changes, progress, summary
from grpo_operator.planning.actions import Plan
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import (
    deadline,
    failure,
    finished,
    node_loss,
    scale,
    stall,
    start,
    startup,
    suspend,
    validity,
)
from grpo_operator.settings import Settings

STALE_SECONDS = 1.0

# In this order; one that returns True leaves nothing to decide for those after it.
RUNNING: tuple[Callable[[Draft], bool], ...] = (
    suspend.resume,  # spec.suspend was taken back
    failure.judge,  # who ended, and what follows
    deadline.enforce,  # activeDeadlineSeconds
    suspend.suspend,  # spec.suspend: save, stop, free the devices
    suspend.begin,  # the job's time runs
    startup.limit,  # half a job gives its devices back
    stall.watch,  # steps, not heartbeats
    scale.scale,  # rollout.replicas
    start.start,  # leftovers go, missing pods come
)


def plan(seen: Observation, settings: Settings, now: datetime) -> Plan:
    """The next actions for the job."""
    if seen.job.deleting:
        return Plan()  # its children have it as their owner
    draft = Draft(seen, now)
    if any(pod.attempt > draft.attempt for pod in seen.pods):
        return Plan(requeue_after_seconds=STALE_SECONDS)  # pods of a status that we have not seen yet
    if not draft.terminal and not validity.check(draft, lambda job: build.problem(job, settings)):
        progress.observe(draft)
        node_loss.release(draft)
        for policy in RUNNING:
            if draft.terminal or policy(draft):
                break
    elif draft.terminal:
        node_loss.release(draft)
    finished.keep(draft)
    summary.summarize(draft)
    return _plan(draft)


def _plan(draft: Draft) -> Plan:
    due = changes.due(draft.job.status, draft.status, draft.now)
    if due is not None and due > draft.now:
        draft.wake_at(due)
    applies, unused = _shared(draft, bool(draft.creates))
    return Plan(
        status=draft.status if due is not None and due <= draft.now else None,
        events=tuple(draft.events),
        stop_coordinator=draft.stop_coordinator,
        delete_pods=draft.deletes,
        apply_shared=applies,
        create_pods=tuple(draft.creates),
        delete_config_maps=unused,
        delete_job=draft.delete_job,
        requeue_after_seconds=draft.requeue_after_seconds,
    )


def _shared(draft: Draft, creates: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether Service, ConfigMap and the like are to be applied, and which ConfigMaps nobody uses any more."""
    if draft.job.spec is None or draft.status.start_time is None or draft.terminal:
        return False, ()
    changed = draft.job.status.observed_generation != draft.job.generation
    if not creates and not changed and len(draft.seen.config_maps) == 1:
        return False, ()  # the usual visit; rendering the document to learn its name is the dear part of a plan
    current = build.config_map_name(draft.job)
    used = {pod.config for pod in draft.seen.pods} | {current}
    applies = creates or changed or current not in draft.seen.config_maps
    return applies, tuple(sorted(name for name in draft.seen.config_maps if name not in used))
