"""Whether the watches still deliver.

Invariant: a version that the API server is known to have given an object (the answer to a write, or a list) is expected to come through the
watch; one that has not come within a limit means a dead watch, however alive its connection looks. Silence alone proves nothing: an idle
cluster is silent. A watch that begins anew lists what there is, and says nothing of what went in between.
"""

import time
from collections.abc import Callable


class Watches:
    """Versions known and versions delivered, by resource (`grpojobs`, `pods`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._delivered: dict[str, dict[str, int]] = {}
        self._expected: dict[str, dict[str, tuple[int, float]]] = {}
        self._streaming: set[str] = set()  # resources of which changes have come, not a list alone
        self._gaps = False
        self.last_event_seconds: dict[str, float] = {}  # Unix time

    def deliver(self, resource: str, uid: str, version: int, gone: bool, listed: bool = False) -> None:
        """An event came through the watch; `listed`: the watch begins, and lists what there is."""
        if not listed:
            self._streaming.add(resource)
        elif resource in self._streaming:
            self._streaming.discard(resource)
            self._gaps = True
        self.last_event_seconds[resource] = time.time()
        delivered = self._delivered.setdefault(resource, {})
        if gone:
            delivered.pop(uid, None)
            self._expected.get(resource, {}).pop(uid, None)
            return
        delivered[uid] = max(version, delivered.get(uid, 0))
        expected = self._expected.get(resource, {}).get(uid)
        if expected is not None and expected[0] <= delivered[uid]:
            del self._expected[resource][uid]

    def expect(self, resource: str, uid: str, version: int) -> None:
        """The API server holds this version. The clock of an expectation runs from its first unseen version."""
        if version <= self._delivered.get(resource, {}).get(uid, 0):
            return
        expected = self._expected.setdefault(resource, {})
        held = expected.get(uid)
        if held is None:
            expected[uid] = (version, self._clock())

    def forget(self, resource: str, uid: str) -> None:
        """The object is gone; nothing more will come."""
        self._delivered.get(resource, {}).pop(uid, None)
        self._expected.get(resource, {}).pop(uid, None)

    def keep_only(self, resource: str, uids: set[str]) -> None:
        """Forget all but what a complete list holds."""
        for known in (self._delivered.get(resource, {}), self._expected.get(resource, {})):
            for uid in known.keys() - uids:
                del known[uid]

    def take_gaps(self) -> bool:
        """Whether a watch has begun anew since this was asked last: only a list tells what went in between."""
        gaps, self._gaps = self._gaps, False
        return gaps

    def overdue_seconds(self) -> float:
        """Age of the oldest expectation of any watch; 0 when nothing is missing."""
        now = self._clock()
        return max((now - since for known in self._expected.values() for _, since in known.values()), default=0.0)
