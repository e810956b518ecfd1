"""Ports of this machine for the servers that a process starts.

Invariant: a port that is given out lies below those that the kernel gives to outgoing connections (32768 and up), so none of them has it
when its server starts.
"""

import random
import socket
from contextlib import suppress

from grpo_worker.errors import ConfigError

SERVER_PORTS = range(20000, 32768)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    for port in random.sample(SERVER_PORTS, 50):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    raise ConfigError(
        f"network: no free port for a server among {SERVER_PORTS[0]} to {SERVER_PORTS[-1]} on {host}. Set the ports."
    )


def require_free(port: int, field: str, host: str = "127.0.0.1") -> None:
    """Raises ConfigError when somebody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"network.{field}: port {port} is in use ({error.strerror}). Choose another one, or 0 for any free port."
            ) from error
