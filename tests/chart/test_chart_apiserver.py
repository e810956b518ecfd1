"""A real API server takes what the chart renders; install, upgrade and uninstall keep what must be kept."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from chart_rendering import CHART, Chart, operator_pod
from e2e.cluster import ClusterError, ControlPlane
from e2e.cluster.build import build
from openapi_schemas import LOCATION, write_schemas

MONITORS = {"enabled": True, "labels": {"release": "prometheus"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "commonLabels": {"team": "ml"},
        "commonAnnotations": {"owner": "us"},
        "imagePullSecrets": ["registry"],
        "image": {"digest": "sha256:" + "0" * 64},
        "operator": {"extraArgs": ["--verbose"], "extraEnv": [{"name": "A", "value": "1"}]},
        "priorityClassName": "system-cluster-critical",
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "metrics": {
            "namespaces": ["monitoring"],
            "serviceMonitor": MONITORS,
            "podMonitor": MONITORS,
            "rules": {"enabled": True},
            "dashboards": {"enabled": True},
        },
    },
    "namespaced": {"rbac": {"scope": "namespaced"}},
    "nothing optional": {
        "rbac": {"create": False, "aggregateRoles": False},
        "crds": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "tokenKey": {"existingSecret": "mine"},
        "nodeSelector": {},
    },
}


@pytest.fixture(scope="session")
def schemas(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Schemas of the API server's own kinds."""
    directory = tmp_path_factory.mktemp("schemas")
    write_schemas(json.loads(control_plane.kubectl("get", "--raw", "/openapi/v2")), directory)
    return directory


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_kubeconform_finds_nothing(chart: Chart, schemas: Path, values: dict[str, Any]) -> None:
    command = [build(["kubeconform"]) / "kubeconform", "-strict", "-summary", "-schema-location", schemas / LOCATION]
    done = subprocess.run(
        [*command, "-skip", "ServiceMonitor,PodMonitor,PrometheusRule"],
        input=chart.text(values),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and "Invalid: 0, Errors: 0" in done.stdout, done.stdout + done.stderr


def test_kubeconform_would_find_a_misspelt_field(chart: Chart, schemas: Path) -> None:
    command = [build(["kubeconform"]) / "kubeconform", "-strict", "-schema-location", schemas / LOCATION]
    text = chart.text().replace("readOnlyRootFilesystem", "readOnlyRootFileSystem")
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "readOnlyRootFileSystem" in done.stdout


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_api_server_takes_every_object(
    chart: Chart, control_plane: ControlPlane, namespace: str, values: dict[str, Any]
) -> None:
    documents = [
        document
        for document in chart.render(values, namespace=namespace)
        if document["apiVersion"] != "monitoring.coreos.com/v1"
        and document["kind"] != "Pod"  # its account is a dry run too
    ]
    everything = {"apiVersion": "v1", "kind": "List", "items": documents}
    answer = control_plane.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "-f", "-", input_text=json.dumps(everything)
    )
    assert answer.count("(server dry run)") == len(documents)


def test_both_pods_meet_the_restricted_standard(chart: Chart, control_plane: ControlPlane, namespace: str) -> None:
    documents = chart.render(namespace=namespace)
    template = operator_pod(documents)
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator", "labels": template["metadata"]["labels"]}, "spec": template["spec"]},
        next(document for document in documents if document["kind"] == "Pod"),
    ]  # fmt: skip
    for pod in pods:
        pod["metadata"]["namespace"] = namespace
        del pod["spec"]["serviceAccountName"]
        assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        control_plane.kubectl("create", "--dry-run=server", "-f", "-", input_text=json.dumps(pod))
    pods[0]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        control_plane.kubectl("create", "--dry-run=server", "-f", "-", input_text=json.dumps(pods[0]))


def _may(control_plane: ControlPlane, namespace: str, where: str, verb: str, resource: str) -> bool:
    account = f"system:serviceaccount:{namespace}:grpo-operator"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": account, "resourceAttributes": {"namespace": where, "verb": verb, **_attributes(resource)}},
    }
    answer = control_plane.kubectl("create", "-f", "-", "-o", "json", input_text=json.dumps(review))
    return bool(json.loads(answer)["status"]["allowed"])


def _attributes(resource: str) -> dict[str, str]:
    name, _, group = resource.partition(".")
    plural, _, subresource = name.partition("/")
    return {"resource": plural, "group": group} | ({"subresource": subresource} if subresource else {})


def test_install_upgrade_uninstall_and_install_again(control_plane: ControlPlane, namespace: str) -> None:
    def helm(*arguments: str) -> str:
        return control_plane.helm(*arguments, "--namespace", namespace)

    def token_key() -> str:
        found = control_plane.get("secret", "grpo-operator-token-key", "-n", namespace)
        return str(found["data"]["token-key"])

    def names(kind: str, *where: str) -> str:
        return control_plane.kubectl("get", kind, "-o", "name", *where)

    notes = helm("install", "grpo-operator", str(CHART))
    assert f"helm test grpo-operator --namespace {namespace}" in notes
    assert "watches all namespaces" in notes
    key = token_key()
    control_plane.wait_for_crd("grpojobs.grpo.dev")

    assert _may(control_plane, namespace, "anywhere", "list", "pods")
    assert _may(control_plane, namespace, "anywhere", "patch", "secrets")
    assert not _may(control_plane, namespace, "anywhere", "get", "secrets")
    assert not _may(control_plane, namespace, namespace, "get", "secrets")
    assert _may(control_plane, namespace, namespace, "create", "leases.coordination.k8s.io")
    assert not _may(control_plane, namespace, "anywhere", "create", "leases.coordination.k8s.io")

    notes = helm("upgrade", "grpo-operator", str(CHART), "--set", "rbac.scope=namespaced,operator.logFormat=json")
    assert f"watches {namespace}." in notes
    assert token_key() == key
    assert _may(control_plane, namespace, namespace, "patch", "grpojobs/status.grpo.dev")
    assert not _may(control_plane, namespace, "anywhere", "list", "pods")

    helm("uninstall", "grpo-operator")
    assert "deployment" not in names("deployments", "-n", namespace)
    assert "grpo-operator" not in names("clusterroles") + names("clusterrolebindings") + names("roles", "-n", namespace)
    assert "grpojobs.grpo.dev" in names("crd")
    assert token_key() == key

    helm("install", "grpo-operator", str(CHART))
    assert token_key() == key
    helm("uninstall", "grpo-operator")
