"""The replica's own metrics, beside vLLM's in one registry.

Invariant: counters count events once, at the place where they end; labels have a fixed, small set of values.
"""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("grpo_rollout_requests", "Generate requests that were answered, whole or in part.")
GENERATED_TOKENS = Counter("grpo_rollout_generated_tokens", "Tokens in delivered samples.")
ERRORS = Counter("grpo_rollout_errors", "Prompts and requests answered with an error.", ["kind"])
WEIGHT_VERSION = Gauge(
    "grpo_rollout_weight_version", "Version of the weights that the engine serves; -1 when it has none."
)
WEIGHT_SYNC_SECONDS = Histogram(
    "grpo_rollout_weight_sync_seconds",
    "Time of a weight sync, by part.",
    ["part"],
    buckets=(0.05, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)
WEIGHT_SYNC_BYTES = Counter("grpo_rollout_weight_sync_bytes", "Bytes of weights that were pulled and verified.")
WEIGHT_SYNC_FAILURES = Counter("grpo_rollout_weight_sync_failures", "Weight syncs that failed.", ["reason"])
