"""A port for a server."""

import socket
from pathlib import Path

import pytest

from grpo_worker.errors import ConfigError
from grpo_worker.ports import free_port, require_free


def test_a_free_port_is_free_and_a_taken_one_names_its_field() -> None:
    port = free_port()
    require_free(port, "coordinatorPort")
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port < lowest, "an outgoing connection may take it before its server starts"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"network\.trainerPort: port {number} is in use"):
            require_free(number, "trainerPort")
