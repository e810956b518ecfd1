"""Carries out a plan against the API server, in the order of its fields.

Invariant: a stage begins only when the one before it has succeeded, the status first of all, and that only if the job is still the version
that was planned for. So whatever stops the execution, the next plan finds the truth. Nothing that another owner made is ever changed.
"""

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from typing import Any, Protocol

from grpo_operator import build
from grpo_operator.api import BY_KIND, CONFIG_MAPS, GRPOJOBS, PODS, Api, ApiError
from grpo_operator.control.kubernetes_events import EventRecorder
from grpo_operator.control.reports import CoordinatorSilent
from grpo_operator.control.store import Key, Store, is_owned, version_of
from grpo_operator.control.watches import Watches
from grpo_operator.facts import Job, Observation, Pod, Refusal
from grpo_operator.labels import Role
from grpo_operator.planning.actions import CreatePod, DeletePod, Event, Plan
from grpo_operator.settings import Settings
from grpo_operator.token import job_token
from grpo_worker.config.status import GRPOJobStatus

logger = logging.getLogger(__name__)

PARALLEL_REQUESTS = 16  # of one job


class MovedOn(Exception):
    """The job has changed since it was observed; observe and plan again."""


class Blocked(Exception):
    """Something in the cluster stands in the way; the job has an Event that says what."""


class Coordinators(Protocol):
    """Talks to the coordinator of a job."""

    async def stop(self, job: Job, pod: Pod) -> None:
        """Ask it to save and stop. Raises CoordinatorSilent."""


class Executor:
    """Carries out plans."""

    def __init__(
        self,
        api: Api,
        store: Store,
        watches: Watches,
        events: EventRecorder,
        coordinators: Coordinators,
        settings: Settings,
        token_key: bytes,
    ) -> None:
        self._api, self._store, self._watches, self._events = api, store, watches, events
        self._coordinators, self._settings, self._token_key = coordinators, settings, token_key
        self._ours: set[tuple[str, str, str]] = set()  # job uid, kind, name of shared objects known to be the job's
        self._refusals: dict[str, list[Refusal]] = {}  # by job uid

    async def execute(self, seen: Observation, plan: Plan) -> None:
        """Raises MovedOn, Blocked or ApiError; what is left is planned anew."""
        job = seen.job
        status = plan.status or job.status
        if plan.status is not None:
            await self._write_status(job, plan.status)
        if plan.events:
            await self._events.record(job, plan.events)
        if plan.stop_coordinator:
            await self._stop(seen, plan.stop_coordinator)
        await _all(self._delete_pod(job, item) for item in plan.delete_pods)
        self._refusals[job.uid] = []  # what is still refused is refused anew
        if plan.apply_shared:
            documents = build.shared(job, self._settings, job_token(self._token_key, job.uid))
            await _all(self._apply_shared(job, document) for document in documents)
        await _all(self._create_pod(job, item, status) for item in plan.create_pods)
        await _all(self._delete_config_map(job, name) for name in plan.delete_config_maps)
        if plan.delete_job:
            await self._delete_job(job)

    def forget(self, job_uid: str) -> None:
        """The job is gone."""
        self._refusals.pop(job_uid, None)
        self._ours = {entry for entry in self._ours if entry[0] != job_uid}

    def refusals(self, job_uid: str) -> tuple[Refusal, ...]:
        """What the API server did not take when it was last to be made. After a restart it is tried, and refused, anew."""
        return tuple(sorted(self._refusals.get(job_uid, ()), key=lambda refusal: refusal.what))

    # ---- status

    async def _write_status(self, job: Job, status: GRPOJobStatus) -> None:
        key = Key(job.namespace, job.name)
        document = {
            "apiVersion": GRPOJOBS.api_version,
            "kind": GRPOJOBS.kind,
            "metadata": {
                "name": job.name,
                "namespace": job.namespace,
                "uid": job.uid,
                "resourceVersion": job.document["metadata"]["resourceVersion"],
            },
            "status": status.document(),
        }
        try:
            answer = await self._api.apply(document, subresource="status")
        except ApiError as error:
            if error.not_found:
                self._store.remove_job(key, job.uid)
                raise MovedOn(f"{key} is gone") from error
            if error.conflict:
                await self._refresh(job)
                raise MovedOn(f"{key} has changed") from error
            raise
        self._watches.expect(GRPOJOBS.plural, job.uid, version_of(answer))
        self._store.update_job(answer)

    async def _refresh(self, job: Job) -> None:
        key = Key(job.namespace, job.name)
        try:
            self._store.update_job(await self._api.get(GRPOJOBS, job.namespace, job.name))
        except ApiError as error:
            if not error.not_found:
                raise
            self._store.remove_job(key, job.uid)

    # ---- coordinator

    async def _stop(self, seen: Observation, name: str) -> None:
        """A silent coordinator holds up nothing: the plan knows how long to ask, and what follows."""
        for pod in seen.pods:
            if pod.name == name:
                try:
                    await self._coordinators.stop(seen.job, pod)
                except CoordinatorSilent as error:
                    logger.warning("%s/%s: %s", seen.job.namespace, seen.job.name, error)

    # ---- pods

    async def _delete_pod(self, job: Job, item: DeletePod) -> None:
        try:
            answer = await self._api.delete(PODS, job.namespace, item.name, item.uid, item.grace_seconds)
        except ApiError as error:
            if error.not_found or error.conflict:  # gone, or its name is another pod's by now
                self._store.remove_pod(item.uid)
                return
            raise
        if answer.get("kind") == PODS.kind and item.grace_seconds != 0:
            self._store.update_pod(answer)

    async def _create_pod(self, job: Job, item: CreatePod, status: GRPOJobStatus) -> None:
        document = build.pod(job, item.role, item.index, status, self._settings)
        try:
            made = await self._api.create(document)
        except ApiError as error:
            if error.namespace_ending:
                raise MovedOn(f"namespace {job.namespace} is being deleted") from error
            if error.already_exists:
                await self._adopt_or_refuse(job, document)
                return
            self._note_refusal(job, document, error, (item.role, item.index))
            raise
        self._watches.expect(PODS.plural, made["metadata"]["uid"], version_of(made))
        self._store.update_pod(made)

    async def _adopt_or_refuse(self, job: Job, document: dict[str, Any]) -> None:
        """The name is taken: by a pod of this job that the watch has not told of yet, or by somebody else's."""
        name = document["metadata"]["name"]
        there = await self._api.get(PODS, job.namespace, name)
        self._store.update_pod(there)
        if any(pod.uid == there["metadata"]["uid"] for pod in self._store.pods(job)):
            raise MovedOn(f"pod {name} exists already")
        await self._refuse(job, there, PODS.kind)

    async def _refuse(self, job: Job, there: dict[str, Any], kind: str) -> None:
        name = there["metadata"]["name"]
        if _is_predecessors(there, job):
            message = f"{kind} {name} belongs to a deleted job of this name and is not gone yet. Waiting for it."
            event = Event("Normal", "WaitingForOldObjects", message)
        else:
            message = (
                f"{kind} {name} exists in namespace {job.namespace} and is not this job's, so it is left alone. "
                "Delete it, or give the job another name."
            )
            event = Event("Warning", "NameTaken", message)
        await self._events.record(job, (event,))
        raise Blocked(message)

    # ---- shared objects

    async def _apply_shared(self, job: Job, document: dict[str, Any]) -> None:
        kind, name = document["kind"], document["metadata"]["name"]
        resource, entry = BY_KIND[kind], (job.uid, document["kind"], document["metadata"]["name"])
        if kind == CONFIG_MAPS.kind:
            self._store.note_config_map(job.uid, name)
        try:
            if entry in self._ours:
                await self._api.apply(document)
                return
            await self._api.create(document)
        except ApiError as error:
            if error.namespace_ending:
                raise MovedOn(f"namespace {job.namespace} is being deleted") from error
            if not error.already_exists:
                self._note_refusal(job, document, error)
                raise
            there = await self._api.merge(resource, job.namespace, name, {})  # a Secret may be patched but not read
            if not is_owned(there, job.uid):
                await self._refuse(job, there, kind)
            await self._api.apply(document)
        self._ours.add(entry)

    def _note_refusal(
        self, job: Job, document: dict[str, Any], error: ApiError, member: tuple[Role, int] | None = None
    ) -> None:
        if error.status in (400, 403, 422):
            what = f"{document['kind']} {document['metadata']['name']}"
            invalid = member is not None and error.status == 422
            self._refusals[job.uid].append(Refusal(what, error.message, member, invalid))

    async def _delete_config_map(self, job: Job, name: str) -> None:
        """The name comes from a pod's volume, and a job's pod template may have put any there."""
        try:
            there = await self._api.merge(CONFIG_MAPS, job.namespace, name, {})
            if is_owned(there, job.uid):
                await self._api.delete(CONFIG_MAPS, job.namespace, name, there["metadata"]["uid"])
        except ApiError as error:
            if not error.not_found and not error.conflict:
                raise
        self._ours.discard((job.uid, CONFIG_MAPS.kind, name))
        self._store.forget_config_map(job.uid, name)

    # ---- the job itself

    async def _delete_job(self, job: Job) -> None:
        try:
            await self._api.delete(GRPOJOBS, job.namespace, job.name, job.uid)
        except ApiError as error:
            if not error.not_found and not error.conflict:
                raise


def _is_predecessors(document: dict[str, Any], job: Job) -> bool:
    """Whether a job of the same name, made before this one, owns it: the garbage collector takes it away."""
    owners = document["metadata"].get("ownerReferences") or ()
    return any(
        owner.get("kind") == GRPOJOBS.kind and owner.get("name") == job.name and owner.get("uid") != job.uid
        for owner in owners
    )


async def _all(steps: Iterable[Awaitable[None]]) -> None:
    """All of a stage, some at a time; the first error once every one has ended."""
    slots = asyncio.Semaphore(PARALLEL_REQUESTS)

    async def one(step: Awaitable[None]) -> None:
        async with slots:
            await step

    results = await asyncio.gather(*(one(step) for step in steps), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
