"""What a process says on stderr: readable lines, or one JSON object a line for whoever collects logs.

Invariant: a JSON line tells one process and one moment from all others: job, namespace, role, member, attempt, step and weight version, as
far as they are known. What a library prints past `logging` stays as it is.
"""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

from grpo_worker.environment import LOG_FACTS, LOG_FORMAT

JSON = "json"  # or text

_moment: dict[str, int] = {}


def at(**moment: int) -> None:
    """From now on this process's JSON lines carry these, such as `step` and `version`."""
    _moment.update(moment)


def set_up(**facts: str | int | None) -> None:
    """Let warnings and errors of this process and its children go to stderr in the form that GRPO_LOG_FORMAT asks for, with `facts` in
    every JSON line."""
    os.environ[LOG_FACTS] = json.dumps({name: value for name, value in facts.items() if value is not None})
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return _json(record.created, record.levelname.lower(), record.getMessage(), logger=record.name, **facts)


class Formatter(JsonFormatter):
    """In the form that GRPO_LOG_FORMAT asks for."""

    def format(self, record: logging.LogRecord) -> str:
        if os.environ.get(LOG_FORMAT) == JSON:
            return super().format(record)
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        return _text(record.created, record.levelname.lower(), message, str(_facts().get("member", "")))


def line(when: float, level: str, message: str, who: str, **facts: Any) -> str:
    """What is said at `when` (Unix seconds), in the form that GRPO_LOG_FORMAT asks for; `who` and `facts` as they are in the JSON."""
    if os.environ.get(LOG_FORMAT) == JSON:
        return _json(when, level, message, **{"member": who, **facts})
    return _text(when, level, message, who)


def plain(text: str, **facts: Any) -> str:
    """A line of its own form: as it is, or as the message of a JSON line."""
    return _json(time.time(), "info", text, **facts) if os.environ.get(LOG_FORMAT) == JSON else text


def readable(text: str) -> str:
    """A JSON line as the text line that it would have been; anything else as it is."""
    if not text.startswith('{"time": '):
        return text
    try:
        entry = json.loads(text)
        when = datetime.fromisoformat(entry["time"]).timestamp()
        message = "\n".join(str(entry[key]) for key in ("message", "exception") if key in entry)
        return _text(when, str(entry["level"]), message, str(entry.get("member", "")))
    except (ValueError, KeyError, TypeError):
        return text


def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(os.environ.get(LOG_FACTS, "{}"))
    return facts


def _json(when: float, level: str, message: str, **facts: Any) -> str:
    clock = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    entry = {"time": clock, "level": level, **_facts(), **_moment, **facts, "message": message}
    return json.dumps(entry, ensure_ascii=False, default=str)


def _text(when: float, level: str, message: str, who: str) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(when))
    return f"{clock} {f'{who}: ' if who else ''}{'' if level == 'info' else f'{level}: '}{message}"
