"""OpenTelemetry: a step's spans to the collector that the standard environment names (OTEL_EXPORTER_OTLP_ENDPOINT and its kin).

Invariant: without that environment nothing is loaded and nothing is done; with it, a collector that is slow or away costs spans, never a step.
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_worker.coordinator.spans import MAX_SPANS
from grpo_worker.errors import ConfigError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
CLOSE_SECONDS = 5.0
NANOSECONDS = 1_000_000_000

log = logging.getLogger(__name__)


class SpanExporter:
    """A trace a step: its root is the step, its children what `Spans` holds. Over HTTP with protobuf."""

    def __init__(self, job: str, namespace: str) -> None:
        """Raises ConfigError when the environment asks for what is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"{' or '.join(ENDPOINTS)} is set, but {error.name} is not installed: pip install opentelemetry-exporter-otlp, or take it out of the environment"
            ) from error
        names = {"service.name": "grpo", "k8s.namespace.name": namespace, "grpo.job": job}
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), max_queue_size=MAX_SPANS + 1))
        self._tracer = self._provider.get_tracer("grpo_worker.coordinator")

    @classmethod
    def of_environment(cls, job: str, namespace: str) -> "SpanExporter | None":
        """None where no collector is named."""
        return cls(job, namespace) if any(os.environ.get(name) for name in ENDPOINTS) else None

    def export(self, step: int, spans: Sequence[Mapping[str, Any]]) -> None:
        """Hand over what ended in a step; the sending goes on in a thread."""
        from opentelemetry.trace import set_span_in_context

        if not spans:
            return
        ends = [span["start"] + span["seconds"] for span in spans]
        began = min(span["start"] for span in spans)
        root = self._tracer.start_span("step", start_time=_nanoseconds(began), attributes={"grpo.step": step})
        context = set_span_in_context(root)
        for span, end in zip(spans, ends, strict=True):
            attributes = {
                f"grpo.{key}": value for key, value in span.items() if key not in ("name", "start", "seconds")
            }
            child = self._tracer.start_span(
                span["name"], context, start_time=_nanoseconds(span["start"]), attributes=attributes
            )
            child.end(_nanoseconds(end))
        root.end(_nanoseconds(max(ends)))

    def close(self) -> None:
        """Send what is left, within a limit."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)  # it tries again for up to 30 s
        ending.start()
        ending.join(CLOSE_SECONDS)
        if ending.is_alive():
            log.warning("the last spans did not reach the OpenTelemetry collector within %.0f s", CLOSE_SECONDS)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * NANOSECONDS)
