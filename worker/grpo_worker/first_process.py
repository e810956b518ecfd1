"""Imported before anything that takes time: the first process of a container (process 1) ignores a signal that it has no handler for, so a
SIGTERM that arrives while Python still imports would be lost, and the pod would stay for its whole grace period.

Invariant: from the first lines of the program on, SIGTERM ends process 1; who has something to save installs a handler of its own later.
"""

import os
import signal

if os.getpid() == 1:
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
