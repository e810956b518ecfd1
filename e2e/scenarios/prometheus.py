"""A real Prometheus on this machine that scrapes the node by the chart's own monitors and judges by the chart's own alerts.

The Prometheus operator would make scrape configuration of ServiceMonitor and PodMonitor; here `scrape_configs` does, for what the chart uses.
Debian's Prometheus is built without Kubernetes discovery: `Discovery` writes the same targets and labels into files. Alerts run in a
time-lapse: each minute in their `for` and their windows takes seconds.
"""

import json
import re
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from e2e.cluster.errors import ClusterError
from e2e.cluster.host import free_ports, need, wait_until
from e2e.scenarios.training import Cluster

from grpo_worker.storage import whole_file

Document = dict[str, Any]

SECONDS_OF_A_MINUTE = 5
SCRAPE = "2s"
DISCOVERY_SECONDS = 1.0  # between two looks
UNITS = {"m": 1, "h": 60, "d": 1440}


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of the HTTP API. Raises ClusterError with Prometheus' words."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ClusterError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[Document]:
        """Series of an instant query."""
        found: list[Document] = self.ask("query", query=expression)["result"]
        return found

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"}

    def until_firing(self, *names: str, timeout_seconds: float) -> None:
        wait_until(lambda: set(names) <= self.firing(), f"{names} fire", timeout_seconds=timeout_seconds, every_seconds=1, explain=self.explain)  # fmt: skip

    def until_quiet(self, *names: str, timeout_seconds: float) -> None:
        wait_until(lambda: not set(names) & self.firing(), f"{names} resolve", timeout_seconds=timeout_seconds, every_seconds=1, explain=self.explain)  # fmt: skip

    def explain(self) -> str:
        alerts = self.ask("alerts")["alerts"]
        targets = {t["scrapeUrl"]: t["lastError"] for t in self.ask("targets", state="active")["activeTargets"]}
        return json.dumps({"alerts": alerts, "targets": targets}, indent=1)[:6000]


class Discovery(threading.Thread):
    """Prometheus' Kubernetes discovery of pods and endpoint slices (its own names of labels), as far as the chart's monitors ask."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(daemon=True, name="discovery")
        self._cluster = cluster
        self._folder = folder
        self._stop = threading.Event()

    def run(self) -> None:
        while not self._stop.wait(DISCOVERY_SECONDS):
            with suppress(ClusterError):  # an API server that is busy is asked again
                self.look()

    def look(self) -> None:
        """Raises ClusterError."""
        everything = self._cluster.get("pods,services,endpointslices", "--all-namespaces")["items"]
        kinds = {
            kind: [item for item in everything if item["kind"] == kind] for kind in ("Pod", "Service", "EndpointSlice")
        }
        services = {_key(service["metadata"]): service for service in kinds["Service"]}
        found = {
            "pod": [target for pod in kinds["Pod"] for target in _of_pod(pod)],
            "endpointslice": [target for each in kinds["EndpointSlice"] for target in _of_slice(each, services)],
        }
        for role, targets in found.items():
            with whole_file(self._folder / f"{role}.json") as temporary:
                temporary.write_text(json.dumps(targets))

    def stop(self) -> None:
        self._stop.set()
        self.join(30)


def _of_pod(pod: Document) -> Iterator[Document]:
    meta = {
        "__meta_kubernetes_namespace": pod["metadata"]["namespace"],
        "__meta_kubernetes_pod_name": pod["metadata"]["name"],
        "__meta_kubernetes_pod_phase": pod["status"].get("phase", "Unknown"),
        **_labels("pod", pod["metadata"]),
    }
    address = pod["status"].get("podIP")
    for container in pod["spec"]["containers"] if address else ():
        for port in container.get("ports", ()):
            name = {"__meta_kubernetes_pod_container_port_name": port.get("name", "")}
            yield {"targets": [f"{address}:{port['containerPort']}"], "labels": meta | name}


def _of_slice(endpoints: Document, services: dict[tuple[str, str], Document]) -> Iterator[Document]:
    metadata = endpoints["metadata"]
    service = services.get((metadata["namespace"], metadata.get("labels", {}).get("kubernetes.io/service-name", "")))
    if service is None:
        return
    meta = {"__meta_kubernetes_namespace": metadata["namespace"], **_labels("service", service["metadata"])}
    for endpoint in endpoints.get("endpoints") or ():
        pod = {"__meta_kubernetes_pod_name": endpoint.get("targetRef", {}).get("name", "")}
        for port in endpoints.get("ports") or ():
            name = {"__meta_kubernetes_endpointslice_port_name": port.get("name", "")}
            yield {"targets": [f"{endpoint['addresses'][0]}:{port['port']}"], "labels": meta | pod | name}


def _labels(kind: str, metadata: Document) -> dict[str, str]:
    found: dict[str, str] = {}
    for label, value in metadata.get("labels", {}).items():
        found |= {f"__meta_kubernetes_{kind}_label_{_label(label)}": value}
        found |= {f"__meta_kubernetes_{kind}_labelpresent_{_label(label)}": "true"}
    return found


def _key(metadata: Document) -> tuple[str, str]:
    return metadata["namespace"], metadata["name"]


@contextmanager
def prometheus(folder: Path, monitors: list[Document], cluster: Cluster) -> Iterator[Prometheus]:
    """`monitors`: the chart's ServiceMonitor, PodMonitor and PrometheusRules."""
    need("prometheus")
    rules = [document for document in monitors if document["kind"] == "PrometheusRule"]
    for rule in rules:
        (folder / f"{rule['metadata']['name']}.yaml").write_text(time_lapse(yaml.safe_dump(rule["spec"])))
    configuration = {
        "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": SCRAPE},
        "rule_files": [f"{rule['metadata']['name']}.yaml" for rule in rules],
        "scrape_configs": [job for monitor in monitors for job in scrape_configs(monitor)],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    (port,) = free_ports(1)
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    discovery = Discovery(cluster, folder)
    discovery.look()
    discovery.start()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    running = Prometheus(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        if process.poll() is not None:
            raise ClusterError(f"prometheus ended: {(folder / 'prometheus.log').read_text()[-3000:]}")
        try:
            running.query("1")
        except OSError:
            return False
        return True

    try:
        wait_until(ready, "Prometheus to answer", timeout_seconds=60)
        yield running
    finally:
        discovery.stop()
        process.terminate()
        process.wait(30)


def time_lapse(text: str) -> str:
    """Rules whose minutes are short. Days stay what they are: no test lasts so long."""

    def shorter(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) * UNITS[match[3]] * SECONDS_OF_A_MINUTE}s{match[4]}"

    return re.sub(r"(for: |\[)(\d+)([mh])(\]|$)", shorter, text, flags=re.MULTILINE)


def scrape_configs(monitor: Document) -> Iterator[Document]:
    """What the Prometheus operator makes of a monitor, for the fields that the chart sets."""
    kind, spec, name = monitor["kind"], monitor["spec"], monitor["metadata"]["name"]
    if kind not in ("ServiceMonitor", "PodMonitor"):
        return
    pods = kind == "PodMonitor"
    selected, port = ("pod", "pod_container_port_name") if pods else ("service", "endpointslice_port_name")
    for endpoint in spec["podMetricsEndpoints" if pods else "endpoints"]:
        keep = [] if pods else [_keep("__meta_kubernetes_namespace", monitor["metadata"]["namespace"])]
        keep += [
            _keep(f"__meta_kubernetes_{selected}_label_{_label(label)}", value)
            for label, value in spec["selector"].get("matchLabels", {}).items()
        ]
        for expression in spec["selector"].get("matchExpressions", []):
            assert expression["operator"] == "Exists", expression
            keep.append(_keep(f"__meta_kubernetes_{selected}_labelpresent_{_label(expression['key'])}", "true"))
        yield {
            "job_name": f"{kind}/{name}/{endpoint['port']}",
            "honor_labels": endpoint.get("honorLabels", False),
            "file_sd_configs": [{"files": [f"{'pod' if pods else 'endpointslice'}.json"], "refresh_interval": SCRAPE}],
            "relabel_configs": [
                *keep,
                _keep(f"__meta_kubernetes_{port}", endpoint["port"]),
                {"action": "drop", "source_labels": ["__meta_kubernetes_pod_phase"], "regex": "(Failed|Succeeded)"},
                {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
                {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
                *map(_relabelling, endpoint.get("relabelings", [])),
            ],
        }


def _relabelling(rule: Document) -> Document:
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label", "replacement": "replacement"}
    return {names[key]: value for key, value in rule.items()}


def _keep(label: str, value: str) -> Document:
    return {"action": "keep", "source_labels": [label], "regex": re.escape(value)}


def _label(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)
