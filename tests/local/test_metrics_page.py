"""One page for all processes of a run: their series with the labels that pods have, whoever answers."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from grpo_worker.errors import ConfigError
from grpo_worker.local.metrics import Server, serve_metrics


@contextmanager
def process(role: str, index: int) -> Iterator[Server]:
    registry = CollectorRegistry()
    Gauge("shared_level", "A level.", registry=registry).set(index + 1)
    Counter("shared_things", "Things.", ["kind"], registry=registry).labels('odd "kind" {of} thing').inc(index + 1)
    if role == "trainer":
        Histogram("trainer_seconds", "Only here.", registry=registry, buckets=(1,)).observe(0.5)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    yield Server(role, str(index), f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    thread.join(5)


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as response:
        return str(response.read().decode())


def test_series_of_all_processes_have_the_labels_of_pods() -> None:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(process(role, index))
            for role, index in (("trainer", 0), ("rollout", 0), ("rollout", 1))
        ]
        page = stack.enter_context(serve_metrics(0, "demo", lambda: servers))
        text = get(page)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    levels = {(s.labels["role"], s.labels["index"]): s.value for s in families["shared_level"].samples}
    assert levels == {("trainer", "0"): 1, ("rollout", "0"): 1, ("rollout", "1"): 2}
    for sample in families["shared_things"].samples:
        assert (sample.labels["namespace"], sample.labels["grpojob"]) == ("local", "demo")
        assert sample.labels["kind"] == 'odd "kind" {of} thing'
    (count,) = (sample for sample in families["trainer_seconds"].samples if sample.name.endswith("_count"))
    assert (count.value, count.labels["role"]) == (1, "trainer")
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads)), "each family once"


def test_a_process_that_does_not_answer_is_left_out() -> None:
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        gone = Server("rollout", "1", "http://127.0.0.1:1")
        hangs = Server("rollout", "2", f"http://127.0.0.1:{silent.getsockname()[1]}")
        servers = [gone, stack.enter_context(process("coordinator", 0)), hangs]
        page = stack.enter_context(serve_metrics(0, "demo", lambda: servers))
        (level,) = (family for family in text_string_to_metric_families(get(page)) if family.name == "shared_level")
    assert [sample.labels["role"] for sample in level.samples] == ["coordinator"]


def test_there_is_nothing_else() -> None:
    with serve_metrics(0, "demo", list) as page, pytest.raises(urllib.error.HTTPError, match="404"):
        get(page.replace("/metrics", "/status"))


def test_a_port_in_use_names_the_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--metrics {port}: cannot listen"), serve_metrics(port, "demo", list):
            pass
