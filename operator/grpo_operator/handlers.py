"""kopf: the watches on GRPOJobs and their pods.

Invariant: a handler hands the event to the main loop and returns: no request, no decision, no exception. kopf writes nothing to the cluster:
no finalizers, annotations, status or Events. It runs in a thread and an event loop of its own, since it ends foreign tasks of its loop.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import kopf

from grpo_operator import labels
from grpo_operator.api import GRPOJOBS, PAGE_OBJECTS, PODS, Credentials, Resource
from grpo_operator.api import credentials as read_credentials
from grpo_operator.loops import new_event_loop

logger = logging.getLogger(__name__)

Document = dict[str, Any]
Deliver = Callable[[Resource, Document, str | None], None]  # resource, object, type of the event (None: listed)

SELECTOR = f"{labels.MANAGED_BY}={labels.MANAGER}"
JOIN_SECONDS = 10.0


def registry(deliver: Deliver) -> kopf.OperatorRegistry:
    """kopf's handlers. `deliver` is called in kopf's thread."""
    made = kopf.OperatorRegistry()

    @kopf.on.startup(registry=made)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.watching.label_selectors[PODS.version, PODS.plural] = SELECTOR
        settings.watching.chunk_size = PAGE_OBJECTS
        settings.networking.request_timeout = 30
        settings.networking.error_backoffs = (0.5, 1, 2, 5, 10)
        # A worker of kopf holds an object and its slot until it has been idle for so long: with a limit of 64 and a second, no more than 64
        # objects a second come through. Handlers here end at once, so no limit is needed.
        settings.queueing.worker_limit = None
        settings.queueing.idle_timeout = 0.2
        settings.posting.enabled = False
        settings.peering.standalone = True
        settings.scanning.disabled = True  # else it would list and watch CRDs and namespaces

    @kopf.on.login(registry=made, retries=3)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return _connection(await read_credentials())

    @kopf.on.event(GRPOJOBS.group, GRPOJOBS.version, GRPOJOBS.plural, registry=made)
    async def job_event(event: Any, **_: Any) -> None:
        deliver(GRPOJOBS, event["object"], event["type"])

    @kopf.on.event(PODS.version, PODS.plural, registry=made)
    async def pod_event(event: Any, **_: Any) -> None:
        deliver(PODS, event["object"], event["type"])

    return made


def _connection(credentials: Credentials) -> kopf.ConnectionInfo:
    return kopf.ConnectionInfo(
        server=credentials.server,
        ca_path=credentials.ca_file,
        ca_data=credentials.ca_data,
        insecure=not credentials.verify,
        token=credentials.token,
        certificate_path=credentials.certificate_file,
        private_key_path=credentials.key_file,
    )


class WatchThread:
    """kopf in a thread of its own."""

    def __init__(self, namespaces: tuple[str, ...], deliver: Deliver) -> None:
        self._namespaces = namespaces
        self._main = asyncio.get_running_loop()
        self._deliver = deliver
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)
        self.ended: asyncio.Future[BaseException | None] = self._main.create_future()

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    async def stop(self) -> None:
        """Ask it to end and wait for that, within a limit."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, JOIN_SECONDS)

    def _hand_over(self, resource: Resource, document: Document, kind: str | None) -> None:
        try:
            self._main.call_soon_threadsafe(self._deliver, resource, document, kind)
        except RuntimeError:  # the main loop has ended: so does this process
            self._stop.set()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(
                    kopf.operator(
                        registry=registry(self._hand_over),
                        clusterwide=not self._namespaces,
                        namespaces=self._namespaces,
                        stop_flag=self._stop,
                        standalone=True,
                    )
                )
        except BaseException as reason:
            error = reason
        try:
            self._main.call_soon_threadsafe(self._note_end, error)
        except RuntimeError:
            pass  # the main loop has ended already

    def _note_end(self, error: BaseException | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)
