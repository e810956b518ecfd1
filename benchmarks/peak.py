"""The highest value of something that is sampled while a block runs."""

import threading
from collections.abc import Callable
from typing import Self


class Peak:
    """`value` is the highest that `sample` gave; None when it gave none. It is asked in a thread, until it gives None or the block ends."""

    def __init__(self, sample: Callable[[], float | None], every_seconds: float) -> None:
        self.value: float | None = None
        self._sample, self._every_seconds = sample, every_seconds

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every_seconds) and (found := self._sample()) is not None:
            self.value = found if self.value is None else max(self.value, found)
