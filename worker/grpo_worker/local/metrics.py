"""`grpo run --metrics`: what all processes of a run serve, on one port.

Invariant: each series has the labels that a pod's has on a cluster (namespace, grpojob, role, index), so the same dashboards and alerts read
both; a process that does not answer in time is left out of that scrape.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from grpo_worker.errors import ConfigError

NAMESPACE = "local"
TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Server:
    """A process that serves `/metrics`."""

    role: str
    index: str
    url: str


@contextmanager
def serve_metrics(port: int, job: str, servers: Callable[[], Sequence[Server]]) -> Iterator[int]:
    """`GET /metrics` on the loopback interface, until the block ends. Yields the port. Raises ConfigError when it is in use."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = merged(job, servers()).encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """A scrape is no news."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(
            f"--metrics {port}: cannot listen: {error.strerror or error}. Choose another port, or 0 for any free one."
        ) from error
    server.daemon_threads = True
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def merged(job: str, servers: Sequence[Server]) -> str:
    """One page in the text format, each family once."""
    families: dict[str, list[str]] = {}
    for server in servers:
        own: set[str] = set()  # families that no server before has told of
        labels = f'namespace="{NAMESPACE}",grpojob="{job}",role="{server.role}",index="{server.index}"'
        family = ""
        for line in _page(server.url).splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if family not in families:
                    families[family] = []
                    own.add(family)
                if family in own:
                    families[family].append(line)
            elif line:
                families[family].append(_labelled(line, labels))
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _labelled(sample: str, labels: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{labels},{rest}"
    name, value = sample.split(" ", 1)
    return f"{name}{{{labels}}} {value}"


def _page(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_SECONDS) as response:
            return str(response.read().decode())
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return ""
