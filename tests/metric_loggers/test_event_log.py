"""events.jsonl: many writers, one reader that follows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_worker.metric_loggers.events import MAX_MESSAGE_CHARACTERS, EventLog, read_events

WRITER = """
import sys
from pathlib import Path
from grpo_worker.metric_loggers.events import EventLog
log = EventLog(Path(sys.argv[1]), sys.argv[2])
for i in range(300):
    log.emit("info", "Counted", f"{i} " + "x" * 500)
"""


def test_an_event_is_one_json_line_and_one_plain_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EventLog(tmp_path / "events.jsonl", "trainer").emit("warning", "SlowStep", 'two\nlines and "quotes" é')
    (line,) = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    event = json.loads(line)
    assert {key: event[key] for key in ("role", "level", "reason", "message")} == {
        "role": "trainer", "level": "warning", "reason": "SlowStep", "message": 'two\nlines and "quotes" é',
    }  # fmt: skip
    assert capsys.readouterr().err.endswith('trainer: warning: two\nlines and "quotes" é\n')


def test_four_processes_write_to_one_file_and_no_line_is_lost_or_torn(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, f"rollout-{i}"], stderr=subprocess.DEVNULL) for i in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    events, offset = read_events(path)
    assert offset == path.stat().st_size
    for i in range(4):
        own = [int(event["message"].split()[0]) for event in events if event["role"] == f"rollout-{i}"]
        assert own == list(range(300))


def test_a_torn_last_line_is_left_for_the_next_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, "coordinator")
    log.emit("info", "A", "first")
    with path.open("ab") as file:
        file.write(b'{"time": 1, "message": "sec')
    events, offset = read_events(path)
    assert [event["message"] for event in events] == ["first"]
    with path.open("ab") as file:
        file.write(b'ond"}\n')
    events, offset = read_events(path, offset)
    assert [event["message"] for event in events] == ["second"]
    assert read_events(path, offset) == ([], offset)


@pytest.mark.parametrize("line", [b"half a li", b"[1, 2]", b'"text"', b"\xff\xfe", b"", b'{"time": 3}'])
def test_a_line_that_is_no_event_is_skipped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line + b"\n" + b'{"message": "whole", "time": null}\n')
    events, _ = read_events(path)
    assert [(event["message"], event["level"], event["time"]) for event in events] == [("whole", "info", 0.0)]


def test_no_file_has_no_events_and_a_replaced_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path, 7) == ([], 7)
    EventLog(path, "coordinator").emit("info", "A", "new")
    assert [event["message"] for event in read_events(path, 100_000)[0]] == ["new"]


def test_a_long_message_is_cut_so_that_an_append_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path, "coordinator").emit("error", "Long", "x" * 100_000)
    assert len(read_events(path)[0][0]["message"]) == MAX_MESSAGE_CHARACTERS


def test_a_full_disk_does_not_stop_the_process_and_stderr_still_gets_the_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    log = EventLog(path, "coordinator")
    log.emit("info", "A", "one")
    log.emit("info", "A", "two")
    lines = capsys.readouterr().err
    assert "one" in lines and "two" in lines and lines.count("cannot be written: No space left on device") == 1
    path.unlink()
    log.emit("info", "A", "three")
    assert [event["message"] for event in read_events(path)[0]] == ["three"]


def test_a_disk_that_hangs_costs_nobody_time(tmp_path: Path) -> None:
    """A FIFO that nobody reads: to open it for writing never ends."""
    path = tmp_path / "events.jsonl"
    os.mkfifo(path)
    log = EventLog(path, "coordinator", echo=False, background=True)
    started = time.monotonic()
    for number in range(100):
        log.emit("info", "Counted", str(number))
    assert time.monotonic() - started < 1.0
    log.close(0.2)
    assert time.monotonic() - started < 5.0


def test_what_was_emitted_in_the_background_is_in_the_file_in_order_after_close(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "coordinator", echo=False, background=True)
    for number in range(500):
        log.emit("info", "Counted", str(number))
    log.close()
    events, _ = read_events(tmp_path / "events.jsonl")
    assert [event["message"] for event in events] == [str(number) for number in range(500)]
