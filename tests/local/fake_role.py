"""A role of a job that trains nothing: it ends as the files of its run directory tell it to.

The coordinator ends with 80 when it is asked to stop, and the others, which it tells, with 0, as the real ones do. `<member>.ends` holds one JSON object a line, one for each start, in order: {"code": 65, "reason": ..., "message": ...}, {"signal": 9}, {"when_told": 143} (its code when it is asked to stop), or
{} to live on. `starts.jsonl` records each start. The file `step` is the coordinator's step, 0 while it starts; the file `finish` ends everybody with 0.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

RUN, NAME = Path(os.environ["GRPO_RUN_DIR"]), os.environ["GRPO_MEMBER_NAME"]
stopping = threading.Event()


def last_word(reason: str, message: str) -> None:
    Path(os.environ["GRPO_TERMINATION_LOG"]).write_text(json.dumps({"reason": reason, "message": message}))


def directive() -> dict:
    file = RUN / f"{NAME}.ends"
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines:
        return {}
    file.write_text("\n".join(lines[1:]))
    return json.loads(lines[0])


class Status(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {os.environ['GRPO_JOB_TOKEN']}":
            self.send_response(401)
            self.end_headers()
            return
        step = int((RUN / "step").read_text()) if (RUN / "step").exists() else 1
        state = "Training" if step else "Starting"
        body = json.dumps({"state": state, "step": step, "total_steps": 9, "checkpoint": None}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        return


def main() -> None:
    start = {"name": NAME, "pid": os.getpid(), "environment": dict(os.environ)}
    with (RUN / "starts.jsonl").open("ab", buffering=0) as file:
        file.write((json.dumps(start) + "\n").encode())  # one append: others write to the file too
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    print(f"{NAME} runs as {sys.argv[1]}", flush=True)
    told = directive()
    if NAME == "coordinator":
        server = HTTPServer(("127.0.0.1", int(os.environ["GRPO_COORDINATOR_PORT"])), Status)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    if "signal" in told:
        os.kill(os.getpid(), told["signal"])
    if "code" in told:
        if "reason" in told:
            last_word(told["reason"], told["message"])
        sys.exit(told["code"])
    before = set(RUN.glob("farewell-*"))
    while not stopping.is_set():
        if (RUN / "finish").exists() or (NAME != "coordinator" and set(RUN.glob("farewell-*")) - before):
            sys.exit(0)
        time.sleep(0.01)
    if "when_told" in told:
        last_word("Terminated", "told to end while starting")
        sys.exit(told["when_told"])
    if NAME == "coordinator":
        (RUN / f"farewell-{os.getpid()}").touch()  # the others hear of it with their next heartbeat
        last_word("Yielded", "stopped after step 1 of 9 (SIGTERM)")
        sys.exit(80)
    sys.exit(143)


main()
