"""`grpo run --metrics`: what all processes of a run serve, on one port.

Invariant: each series has the labels that a pod's has on a cluster (namespace, grpojob, role, index), so the same dashboards and alerts read
both; a process that does not answer in time is left out of that scrape.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST

from grpo_worker.local.status import ask
from grpo_worker.pages import serve_pages

NAMESPACE = "local"


@dataclass(frozen=True)
class Server:
    """A process that serves `/metrics`."""

    role: str
    index: str
    url: str


@contextmanager
def serve_metrics(port: int, job: str, servers: Callable[[], Sequence[Server]]) -> Iterator[str]:
    """Until the block ends. Yields the page's address. Raises ConfigError when the port is in use."""
    with serve_pages("--metrics", port, CONTENT_TYPE_LATEST, {"/metrics": lambda: merged(job, servers())}) as address:
        yield f"{address}/metrics"


def merged(job: str, servers: Sequence[Server]) -> str:
    """One page in the text format, each family once."""
    families: dict[str, list[str]] = {}
    for server in servers:
        own: set[str] = set()  # families that no server before has told of
        labels = f'namespace="{NAMESPACE}",grpojob="{job}",role="{server.role}",index="{server.index}"'
        family = ""
        for line in (ask(f"{server.url}/metrics") or b"").decode(errors="replace").splitlines():
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
