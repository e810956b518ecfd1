"""Kubernetes Events on a GRPOJob.

Invariant: the same words about the same job make one Event whose count grows, at most once in REPEAT_SECONDS; an Event that cannot be written
never holds up the work that it tells of.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from grpo_operator import labels
from grpo_operator.api import EVENTS, GRPOJOBS, Api, ApiError
from grpo_operator.facts import Job
from grpo_operator.planning.actions import Event

logger = logging.getLogger(__name__)

REPEAT_SECONDS = 30.0
SERIES_SECONDS = 900.0  # silence after which the same words make a new Event
REMEMBERED = 4096
NOTE_CHARACTERS = 1024  # the API's limit


@dataclass
class _Series:
    name: str
    count: int
    written: float


class EventRecorder:
    """Writes events.k8s.io/v1 Events."""

    def __init__(self, api: Api, instance: str) -> None:
        self._api, self._instance = api, instance
        self._series: OrderedDict[tuple[str, Event], _Series] = OrderedDict()

    async def record(self, job: Job, events: tuple[Event, ...]) -> None:
        await asyncio.gather(*(self._record(job, event) for event in events))

    async def _record(self, job: Job, event: Event) -> None:
        now, key = time.monotonic(), (job.uid, event)
        series = self._series.get(key)
        try:
            if series is not None and now - series.written < SERIES_SECONDS:
                series.count += 1
                if now - series.written < REPEAT_SECONDS:
                    return
                series.written = now
                patch = {"series": {"count": series.count, "lastObservedTime": _now()}}
                await self._api.merge(EVENTS, job.namespace, series.name, patch)
                return
            name = f"{job.name}.{_digest(job.uid, event)}"
            self._series[key] = _Series(name, 1, now)
            self._series.move_to_end(key)
            while len(self._series) > REMEMBERED:
                self._series.popitem(last=False)
            await self._api.create(self._document(job, event, name))
        except ApiError as error:
            if error.not_found and series is not None:  # it has expired on the server
                del self._series[key]
            if not error.namespace_ending:
                logger.warning("Event %s of %s/%s was not written: %s", event.reason, job.namespace, job.name, error)

    def _document(self, job: Job, event: Event, name: str) -> dict[str, Any]:
        note = event.message
        if len(note.encode()) > NOTE_CHARACTERS:
            note = note.encode()[: NOTE_CHARACTERS - 3].decode(errors="ignore") + "..."
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {"name": name, "namespace": job.namespace},
            "eventTime": _now(),
            "reportingController": labels.MANAGER,
            "reportingInstance": self._instance[:128],
            "action": "Reconcile",
            "type": event.type,
            "reason": event.reason,
            "note": note,
            "regarding": {
                "apiVersion": GRPOJOBS.api_version,
                "kind": GRPOJOBS.kind,
                "namespace": job.namespace,
                "name": job.name,
                "uid": job.uid,
            },
        }


def _digest(uid: str, event: Event) -> str:
    words = f"{uid}/{event.type}/{event.reason}/{event.message}/{time.time_ns()}"
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
