"""The cluster under the e2e tests is a real one: pods run and talk, images load in seconds, and its end leaves nothing behind."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from e2e.cluster import cgroups, network, node
from e2e.cluster.errors import ClusterError
from e2e.cluster.host import wait_until
from e2e.cluster.images import base_image, build_image, load_image
from e2e.cluster.node import Node
from e2e.cluster.processes import processes_of

DOCKERFILE = """
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN head -c 50000000 /dev/urandom > /dependencies
COPY answer.txt /srv/answer.txt
USER 65532:65532
CMD ["python", "-m", "http.server", "--directory", "/srv", "8000"]
"""


def pod(name: str, namespace: str, image: str, command: list[str] | None = None, **extra: Any) -> dict[str, Any]:
    """A pod of one container, as restricted as the operator's pods are."""
    container: dict[str, Any] = {"name": "main", "image": image, "imagePullPolicy": "IfNotPresent", **extra}
    if command is not None:
        container["command"] = command
    metadata = {"name": name, "namespace": namespace, "labels": {"app": name}}
    specification = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsUser": 65532, "fsGroup": 65532},
        "containers": [container],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": specification}


def wait_for_phase(cluster: Node, namespace: str, name: str, phase: str) -> None:
    def reached() -> bool:
        return bool(cluster.get("pod", name, "-n", namespace)["status"].get("phase") == phase)

    def explain() -> str:
        return cluster.kubectl("describe", "pod", name, "-n", namespace)[-3000:]

    wait_until(reached, f"pod {name} is {phase}", timeout_seconds=60, explain=explain)


def build_and_load(cluster: Node, context: Path, answer: str) -> str:
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "answer.txt").write_text(answer)
    build_image(context / "Dockerfile", "grpo-e2e-page", context, {"BASE_IMAGE": base_image()})
    return load_image(cluster, "grpo-e2e-page")


@pytest.fixture(scope="module")
def page_image(own_node: Node, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_and_load(own_node, tmp_path_factory.mktemp("page"), "first")


def test_pods_find_each_other_by_service_name(own_node: Node, namespace: str, page_image: str) -> None:
    port = {"port": 80, "targetPort": 8000}
    own_node.apply(pod("page", namespace, page_image))
    metadata = {"name": "page", "namespace": namespace}
    specification = {"selector": {"app": "page"}, "ports": [port]}
    own_node.apply({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": specification})
    headless = {**specification, "clusterIP": "None"}
    own_node.apply(
        {"apiVersion": "v1", "kind": "Service", "metadata": {**metadata, "name": "direct"}, "spec": headless}
    )
    wait_for_phase(own_node, namespace, "page", "Running")
    program = (
        (
            "import urllib.request, time\n"
            "for url in ('http://page/answer.txt', f'http://direct.{0}.svc:8000/answer.txt'):\n"
            "    for attempt in range(30):\n"
            "        try: print(urllib.request.urlopen(url, timeout=5).read().decode()); break\n"
            "        except OSError: time.sleep(0.5)\n"
        )
        .replace("f'", "'")
        .replace("{0}", namespace)
    )
    own_node.apply(pod("reader", namespace, page_image, ["python", "-c", program]))
    wait_for_phase(own_node, namespace, "reader", "Succeeded")
    assert own_node.kubectl("logs", "reader", "-n", namespace).split() == ["first", "first"]


def test_a_change_of_code_reaches_new_pods_without_moving_the_dependencies(
    own_node: Node, namespace: str, page_image: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    image = build_and_load(own_node, tmp_path, "second")
    assert time.monotonic() - started < 30
    own_node.apply(pod("second", namespace, image, ["cat", "/srv/answer.txt"]))
    wait_for_phase(own_node, namespace, "second", "Succeeded")
    assert own_node.kubectl("logs", "second", "-n", namespace) == "second"


def test_a_volume_is_writable_by_the_group_of_its_pods(own_node: Node, namespace: str, page_image: str) -> None:
    folder = own_node.create_volume(namespace, "workspace")
    document = pod(
        "writer",
        namespace,
        page_image,
        ["sh", "-c", "echo kept > /workspace/file"],
        volumeMounts=[{"name": "workspace", "mountPath": "/workspace"}],
    )
    document["spec"]["volumes"] = [{"name": "workspace", "persistentVolumeClaim": {"claimName": "workspace"}}]
    own_node.apply(document)
    wait_for_phase(own_node, namespace, "writer", "Succeeded")
    assert (folder / "file").read_text() == "kept\n"


def test_faked_gpus_are_counted(own_node: Node, namespace: str, page_image: str) -> None:
    own_node.set_gpus(1)
    limits: dict[str, Any] = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    own_node.apply(pod("first", namespace, page_image, **limits))
    wait_for_phase(own_node, namespace, "first", "Running")
    own_node.apply(pod("second", namespace, page_image, **limits))

    def refused() -> bool:
        conditions = own_node.get("pod", "second", "-n", namespace)["status"].get("conditions", [])
        return any("Insufficient nvidia.com/gpu" in each.get("message", "") for each in conditions)

    wait_until(refused, "the second pod finds no GPU", timeout_seconds=30)


def test_only_rules_of_kubernetes_are_removed() -> None:
    saved = """*nat
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:CNI-abc123 - [0:0]
-A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE
-A POSTROUTING -m comment --comment "a b" -j CNI-abc123
-A KUBE-SERVICES -j ACCEPT
COMMIT
"""
    assert network.removal(saved).splitlines() == [
        "*nat",
        '-D POSTROUTING -m comment --comment "a b" -j CNI-abc123',
        "-F KUBE-SERVICES",
        "-F CNI-abc123",
        "-X KUBE-SERVICES",
        "-X CNI-abc123",
        "COMMIT",
    ]


def leftovers(directory: Path) -> list[str]:
    """Whatever a node of this folder left on the machine."""
    found = [f"process {pid} {name}" for pid, name in processes_of(directory).items()]
    found += [f"container process {pid}" for pid in cgroups.members()]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if f" {directory}" in line]
    found += [network.BRIDGE] if network.bridge_exists() else []
    found += network.kubernetes_chains()
    found += [str(path) for path in [directory, Path("/run/containerd/s")] if path.exists() and any(path.iterdir())]
    return found


def test_down_leaves_nothing_of_a_node_with_running_pods(own_node: Node, namespace: str, page_image: str) -> None:
    """Ends the session's node and starts it again: the image is still there, so a pod starts with no registry push."""
    own_node.apply(pod("page", namespace, page_image))
    wait_for_phase(own_node, namespace, "page", "Running")
    assert leftovers(own_node.directory)
    node.down()
    assert leftovers(own_node.directory) == []
    again = node.up()
    fresh = again.create_namespace("e2e")
    again.apply(pod("page", fresh, page_image, imagePullPolicy="Never"))
    wait_for_phase(again, fresh, "page", "Running")


def test_an_up_that_is_killed_half_way_is_cleaned_up_by_down(own_node: Node) -> None:
    node.down()
    with subprocess.Popen([sys.executable, "-m", "e2e.cluster", "up"], cwd=Path(__file__).parents[1]) as starting:
        directory = own_node.directory
        wait_until(lambda: (directory / "containerd.sock").exists(), "containerd starts", timeout_seconds=30)
        starting.kill()
    with pytest.raises(ClusterError, match="End it: python -m"):
        node.up()
    node.down()
    assert leftovers(directory) == []
    node.up()
