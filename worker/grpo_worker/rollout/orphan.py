"""The engine's worker processes do not outlive the server.

Invariant: when the process that started this one is gone, however it went, this one ends at once. A worker of tensor parallelism
would go on, and hold its memory and its GPU.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """Watch the parent of a `multiprocessing` child; nothing happens in any other process."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
