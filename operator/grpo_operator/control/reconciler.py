"""One job, from what is seen to what is done: observe, plan, execute.

Invariant: everything a plan knows is in its Observation; a reconcile that fails anywhere is repeated from the start and ends the same.
"""

import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime

from grpo_operator.control.execute import Executor, MovedOn
from grpo_operator.control.metrics import OperatorMetrics
from grpo_operator.control.reports import Reports
from grpo_operator.control.store import Key, Store
from grpo_operator.facts import Job, Observation
from grpo_operator.planning.actions import Plan
from grpo_operator.settings import Settings

logger = logging.getLogger(__name__)

MOVED_ON_SECONDS = 0.5

MakePlan = Callable[[Observation, Settings, datetime], Plan]


class Reconciler:
    """`reconcile(key)` for the work queue."""

    def __init__(
        self,
        store: Store,
        reports: Reports,
        executor: Executor,
        plan: MakePlan,
        settings: Settings,
        metrics: OperatorMetrics,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store, self._reports, self._executor, self._plan = store, reports, executor, plan
        self._settings, self._metrics, self._now = settings, metrics, now
        self._uids: dict[Key, str] = {}  # of the jobs that anything is remembered of

    async def reconcile(self, key: Key) -> float | None:
        """Seconds after which the job wants to be looked at again; None when it is gone."""
        with self._metrics.reconcile_seconds.time():
            try:
                again = await self._reconcile(key)
            except MovedOn as moved:
                self._metrics.reconciles.labels("moved_on").inc()
                logger.info("%s: %s; planned anew.", key, moved)
                return MOVED_ON_SECONDS
            except Exception:
                self._metrics.reconciles.labels("error").inc()
                raise
        self._metrics.reconciles.labels("success").inc()
        return again

    async def _reconcile(self, key: Key) -> float | None:
        job = self._store.job(key)
        known = self._uids.get(key)
        if known is not None and (job is None or job.uid != known):
            self._forget(key, known)
        if job is None:
            return None
        self._uids[key] = job.uid
        seen = self.observe(job)
        plan = self._plan(seen, self._settings, self._now())
        if plan.status is not None:
            _log_change(job, plan)
        await self._executor.execute(seen, plan)
        after = self._store.job(key)
        if plan.status is not None and after is not None and after.uid == job.uid:
            self._metrics.count_change(job, after)
        resync = self._settings.resync_seconds * random.uniform(0.8, 1.0)
        return resync if plan.requeue_after_seconds is None else min(plan.requeue_after_seconds, resync)

    def observe(self, job: Job) -> Observation:
        return Observation(
            job=job,
            pods=self._store.pods(job),
            config_maps=self._store.config_maps(job.uid),
            refusals=self._executor.refusals(job.uid),
            report=self._reports.newest(job.uid),
        )

    def _forget(self, key: Key, uid: str) -> None:
        self._reports.forget(uid)
        self._executor.forget(uid)
        del self._uids[key]


def _log_change(job: Job, plan: Plan) -> None:
    """What people look for in the operator's log: changes of state, and why."""
    before, after = job.status, plan.status
    if after is not None and (before.state != after.state or before.attempt != after.attempt):
        logger.info(
            "%s/%s: %s (attempt %d): %s", job.namespace, job.name, after.state, after.attempt or 0, after.message or ""
        )
