"""Where a run's numbers and events go: jsonl, console, TensorBoard, wandb, and the event log.

Invariant: nothing here stops training, except the one file that a run cannot do without (metrics.jsonl) when its disk is full.
"""

from grpo_worker.metric_loggers.events import Event, EventLog, read_events
from grpo_worker.metric_loggers.loggers import MetricLoggers, open_loggers
from grpo_worker.metric_loggers.step_files import StepFile, set_aside

__all__ = ["Event", "EventLog", "MetricLoggers", "StepFile", "open_loggers", "read_events", "set_aside"]
