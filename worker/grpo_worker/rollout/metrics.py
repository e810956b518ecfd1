"""The replica's own metrics, beside vLLM's in one registry.

Invariant: counters count events once, at the place where they end; labels have a fixed, small set of values.
"""

from prometheus_client import REGISTRY

from grpo_worker.catalogue import Declared

SHOWN = Declared("rollout", REGISTRY)
REQUESTS = SHOWN.counter("grpo_rollout_requests_total")
GENERATED_TOKENS = SHOWN.counter("grpo_rollout_generated_tokens_total")
ERRORS = SHOWN.counter("grpo_rollout_errors_total")
BUSY_SECONDS = SHOWN.counter("grpo_rollout_busy_seconds_total")
WEIGHT_SYNC_SECONDS = SHOWN.histogram("grpo_rollout_weight_sync_seconds")
WEIGHT_SYNC_BYTES = SHOWN.counter("grpo_rollout_weight_sync_bytes_total")
WEIGHT_SYNC_FAILURES = SHOWN.counter("grpo_rollout_weight_sync_failures_total")


def serving(version: int | None) -> None:
    """The engine's weights are of this version; None: it has none."""
    SHOWN.set("grpo_rollout_weight_version", -1 if version is None else version)


serving(None)
