"""Spans to an OpenTelemetry collector: a real one's wire format, and none that is away holds a step up."""

import gzip
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from grpo_worker.coordinator.otlp import SpanExporter

SPANS: list[dict[str, Any]] = [
    {"track": "step", "name": "gen", "start": 100.0, "seconds": 2.5},
    {"track": "rollout-0", "name": "generate", "start": 100.25, "seconds": 2.0, "prompts": 8, "version": 3},
    {"track": "trainer-0", "name": "update", "start": 102.5, "seconds": 4.0, "trainer_forward_backward": 3.5},
]


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", got
    server.shutdown()
    server.server_close()


def test_a_step_is_a_trace_with_each_span_where_and_as_long_as_it_was(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    exporter = SpanExporter.of_environment("grpo-demo", "team-a")
    assert exporter is not None
    exporter.export(7, SPANS)
    exporter.export(8, SPANS[:1])
    exporter.export(9, [])
    exporter.close()
    resources = [resource for request in got for resource in request.resource_spans]
    facts = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert (facts["service.name"], facts["k8s.namespace.name"], facts["grpo.job"]) == ("grpo", "team-a", "grpo-demo")
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    roots = [span for span in spans if not span.parent_span_id]
    assert [(root.name, root.attributes[0].value.int_value) for root in roots] == [("step", 7), ("step", 8)]
    assert len({span.trace_id for span in spans}) == 2
    (update,) = (span for span in spans if span.name == "update")
    assert update.parent_span_id == roots[0].span_id and update.trace_id == roots[0].trace_id
    assert (update.start_time_unix_nano, update.end_time_unix_nano) == (102_500_000_000, 106_500_000_000)
    assert (roots[0].start_time_unix_nano, roots[0].end_time_unix_nano) == (100_000_000_000, 106_500_000_000)
    values = {pair.key: pair.value.double_value or pair.value.string_value for pair in update.attributes}
    assert values == {"grpo.track": "trainer-0", "grpo.trainer_forward_backward": 3.5}


def test_where_no_collector_is_named_there_is_no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert SpanExporter.of_environment("a", "b") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    assert SpanExporter.of_environment("a", "b") is None


def test_a_collector_that_does_not_answer_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("grpo_worker.coordinator.otlp.CLOSE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        )
        exporter = SpanExporter.of_environment("a", "b")
        assert exporter is not None
        began = time.monotonic()
        exporter.export(1, SPANS)
        exporter.close()
        assert time.monotonic() - began < 8, "its own limit is 10 s, and its tries"
    assert "did not reach the OpenTelemetry collector" in caplog.text
