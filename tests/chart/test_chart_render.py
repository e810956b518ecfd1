"""Each switch of the chart does what values.yaml says, and nothing else."""

import json
import subprocess
from typing import Any

import pytest
import yaml
from chart_rendering import CHART, ROOT, Chart, RenderError, arguments, of_kind, one, operator_pod

DIGEST = "sha256:" + "0" * 64
KEEP = "helm.sh/resource-policy"


def test_the_chart_has_no_lint(chart: Chart) -> None:
    done = subprocess.run(
        [chart.helm, "lint", "--strict", CHART], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_carries_the_generated_crd() -> None:
    ours, generated = CHART / "files/crds/grpojobs.grpo.dev.yaml", ROOT / "crds/grpojobs.grpo.dev.yaml"
    assert ours.read_text() == generated.read_text(), "run `make generated`"


def test_the_rendered_crd_is_the_generated_one_with_the_releases_labels(chart: Chart) -> None:
    (crd,) = of_kind(chart.render(), "CustomResourceDefinition")
    metadata = crd.pop("metadata")
    generated = yaml.safe_load((ROOT / "crds/grpojobs.grpo.dev.yaml").read_text())
    assert metadata["name"] == generated.pop("metadata")["name"]
    assert metadata["annotations"] == {KEEP: "keep"}
    assert "namespace" not in metadata
    assert crd == generated


def test_a_crd_that_is_not_kept_goes_with_the_release(chart: Chart) -> None:
    (crd,) = of_kind(chart.render({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "annotations" not in crd["metadata"]


def test_the_crd_can_be_left_out(chart: Chart) -> None:
    assert not of_kind(chart.render({"crds": {"enabled": False}}), "CustomResourceDefinition")


def test_kubernetes_before_1_31_is_refused(chart: Chart) -> None:
    with pytest.raises(RenderError, match=r"requires kubeVersion: >=1\.31"):
        chart.text(kube_version="v1.30.9")


@pytest.mark.parametrize("version", ["v1.31.0", "v1.33.2-gke.100", "v1.36.3"])
def test_kubernetes_from_1_31_on_is_taken(chart: Chart, version: str) -> None:
    assert chart.render(kube_version=version)


@pytest.mark.parametrize(
    ("values", "operator", "worker"),
    [
        ({}, "grpo-operator:0.1.0", "grpo-worker:0.1.0"),
        (
            {"global": {"imageRegistry": "registry.example.com/ml/"}},
            "registry.example.com/ml/grpo-operator:0.1.0",
            "registry.example.com/ml/grpo-worker:0.1.0",
        ),
        (
            {"global": {"imageRegistry": "a.example.com"}, "image": {"registry": "b.example.com", "tag": "7"}},
            "b.example.com/grpo-operator:7",
            "a.example.com/grpo-worker:0.1.0",
        ),
        (
            {"image": {"tag": "7", "digest": DIGEST}, "worker": {"image": {"repository": "ours", "digest": DIGEST}}},
            f"grpo-operator@{DIGEST}",
            f"ours@{DIGEST}",
        ),
    ],
)
def test_images_are_named_by_registry_repository_tag_and_digest(
    chart: Chart, values: dict[str, Any], operator: str, worker: str
) -> None:
    documents = chart.render(values)
    assert operator_pod(documents)["spec"]["containers"][0]["image"] == operator
    assert one(documents, "Pod", "grpo-operator-selfcheck")["spec"]["containers"][0]["image"] == operator
    assert arguments(documents)["worker-image"] == worker


def test_the_operator_is_told_where_it_is_and_what_to_watch(chart: Chart) -> None:
    documents = chart.render(release="research", namespace="platform")
    assert arguments(documents) == {
        "worker-image": "grpo-worker:0.1.0",
        "worker-image-pull-policy": "IfNotPresent",
        "operator-namespace": "platform",
        "lease-namespace": "platform",
        "lease-name": "research-grpo-operator",
        "token-key-file": "/etc/grpo-operator/token-key",
        "metrics-port": "8080",
        "workers": "8",
        "log-format": "text",
    }


@pytest.mark.parametrize(
    ("values", "flag", "expected"),
    [
        ({"rbac": {"scope": "namespaced", "namespaces": ["a", "b"]}}, "namespaces", "a,b"),
        ({"rbac": {"scope": "namespaced"}}, "namespaces", "grpo-system"),
        ({"metrics": {"namespaces": ["monitoring", "ops"]}}, "metrics-namespaces", "monitoring,ops"),
        ({"operator": {"workers": 3}}, "workers", "3"),
        ({"operator": {"logFormat": "json"}}, "log-format", "json"),
        ({"operator": {"extraArgs": ["--verbosity=2"]}}, "verbosity", "2"),
        ({"worker": {"image": {"pullPolicy": "Always"}}}, "worker-image-pull-policy", "Always"),
    ],
)
def test_a_value_becomes_a_flag(chart: Chart, values: dict[str, Any], flag: str, expected: str) -> None:
    assert arguments(chart.render(values))[flag] == expected


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({"priorityClassName": "high"}, ["spec", "priorityClassName"], "high"),
        ({"nodeSelector": {"pool": "cpu"}}, ["spec", "nodeSelector", "pool"], "cpu"),
        ({"tolerations": [{"operator": "Exists"}]}, ["spec", "tolerations"], [{"operator": "Exists"}]),
        ({"affinity": {"nodeAffinity": {}}}, ["spec", "affinity"], {"nodeAffinity": {}}),
        ({"podLabels": {"team": "ml"}}, ["metadata", "labels", "team"], "ml"),
        ({"commonLabels": {"team": "ml"}}, ["metadata", "labels", "team"], "ml"),
        ({"podAnnotations": {"a": "b"}}, ["metadata", "annotations", "a"], "b"),
        ({"imagePullSecrets": ["x"], "global": {"imagePullSecrets": ["y"]}}, ["spec", "imagePullSecrets"], [{"name": "y"}, {"name": "x"}]),
        ({"operator": {"extraEnv": [{"name": "A", "value": "1"}]}}, ["spec", "containers", 0, "env"], [{"name": "A", "value": "1"}]),
        ({"resources": {"limits": {"memory": "1Gi"}}}, ["spec", "containers", 0, "resources", "limits", "memory"], "1Gi"),
        ({"terminationGracePeriodSeconds": 5}, ["spec", "terminationGracePeriodSeconds"], 5),
        ({"tokenKey": {"existingSecret": "mine"}}, ["spec", "volumes", 0, "secret", "secretName"], "mine"),
        ({"serviceAccount": {"create": False, "name": "ours"}}, ["spec", "serviceAccountName"], "ours"),
    ],
)  # fmt: skip
def test_a_value_reaches_the_pod(chart: Chart, values: dict[str, Any], path: list[Any], expected: object) -> None:
    found: Any = operator_pod(chart.render(values))
    for step in path:
        found = found[step]
    assert found == expected


def test_one_operator_at_a_time(chart: Chart) -> None:
    (deployment,) = of_kind(chart.render(), "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_job_network_policies_find_the_operator_whatever_it_is_called(chart: Chart) -> None:
    template = operator_pod(chart.render({"fullnameOverride": "other", "podLabels": {"app.kubernetes.io/name": "no"}}))
    assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "grpo-operator"


def test_what_selects_the_operator_never_selects_the_test_pod(chart: Chart) -> None:
    documents = chart.render({"metrics": {"serviceMonitor": {"enabled": True}}})
    labels = operator_pod(documents)["metadata"]["labels"]
    test_labels = one(documents, "Pod", "grpo-operator-selfcheck")["metadata"]["labels"]
    selectors = [
        of_kind(documents, "Deployment")[0]["spec"]["selector"]["matchLabels"],
        one(documents, "Service", "grpo-operator-metrics")["spec"]["selector"],
        of_kind(documents, "NetworkPolicy")[0]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= test_labels.items()


def test_a_kept_token_key_is_mounted_read_only(chart: Chart) -> None:
    documents = chart.render()
    secret = one(documents, "Secret", "grpo-operator-token-key")
    assert secret["metadata"]["annotations"][KEEP] == "keep"
    (mount,) = (m for m in operator_pod(documents)["spec"]["containers"][0]["volumeMounts"] if m["name"] == "token-key")
    assert mount == {"name": "token-key", "mountPath": "/etc/grpo-operator", "readOnly": True}


def test_no_secret_is_made_where_one_is_named(chart: Chart) -> None:
    assert not of_kind(chart.render({"tokenKey": {"existingSecret": "mine"}}), "Secret")


def test_the_network_policy_opens_metrics_alone(chart: Chart) -> None:
    documents = chart.render({"metrics": {"namespaces": ["monitoring"]}, "networkPolicy": {"apiServerPorts": [8443]}})
    spec = one(documents, "NetworkPolicy", "grpo-operator")["spec"]
    (ingress,) = spec["ingress"]
    assert ingress["ports"] == [{"port": "metrics", "protocol": "TCP"}]
    assert ingress["from"][0]["namespaceSelector"]["matchExpressions"][0]["values"] == ["monitoring"]
    dns, api_server, coordinators = spec["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert api_server["ports"] == [{"port": 8443, "protocol": "TCP"}]
    assert coordinators["to"][0]["podSelector"]["matchLabels"]["grpo.dev/role"] == "coordinator"


def test_the_network_policy_can_be_left_out(chart: Chart) -> None:
    assert not of_kind(chart.render({"networkPolicy": {"enabled": False}}), "NetworkPolicy")


def test_monitors_are_off_unless_asked_for(chart: Chart) -> None:
    assert not {"ServiceMonitor", "PodMonitor", "PrometheusRule"} & {document["kind"] for document in chart.render()}


def test_monitors_carry_the_labels_that_a_prometheus_selects(chart: Chart) -> None:
    monitor = {"enabled": True, "interval": "5s", "labels": {"release": "prometheus"}}
    documents = chart.render({"metrics": {"namespaces": ["m"], "serviceMonitor": monitor, "podMonitor": monitor}})
    service = one(documents, "ServiceMonitor", "grpo-operator")
    pods = one(documents, "PodMonitor", "grpo-operator-jobs")
    assert service["metadata"]["labels"]["release"] == pods["metadata"]["labels"]["release"] == "prometheus"
    assert service["spec"]["endpoints"] == [{"port": "metrics", "interval": "5s", "honorLabels": True}]
    endpoints = {endpoint["port"]: endpoint for endpoint in pods["spec"]["podMetricsEndpoints"]}
    assert list(endpoints) == ["coordinator", "trainer", "rollout", *(f"rollout-{engine}" for engine in range(1, 16))]
    for port, endpoint in endpoints.items():
        targets = {rule["targetLabel"]: rule for rule in endpoint["relabelings"]}
        assert targets["role"]["replacement"] == port.partition("-")[0]
        assert targets["grpojob"]["sourceLabels"] == ["__meta_kubernetes_pod_label_grpo_dev_job"]
        assert targets["index"]["sourceLabels"] == ["__meta_kubernetes_pod_label_grpo_dev_index"]
        assert endpoint["interval"] == "5s"
    assert pods["spec"]["namespaceSelector"] == {"any": True}


def test_rules_are_the_alerts_with_the_place_of_their_runbooks(chart: Chart) -> None:
    rules = {"enabled": True, "labels": {"release": "prometheus"}}
    plain = of_kind(chart.render({"metrics": {"rules": rules}}), "PrometheusRule")
    assert all(rule["metadata"]["labels"]["release"] == "prometheus" for rule in plain)
    written = {file.stem: yaml.safe_load(file.read_text()) for file in (CHART / "files" / "alerts").iterdir()}
    assert {rule["metadata"]["name"].removeprefix("grpo-operator-"): rule["spec"] for rule in plain} == written
    placed = chart.render({"metrics": {"rules": rules | {"runbookUrl": "https://wiki.example/grpo/"}}})
    urls = {
        rule["alert"]: rule["annotations"]["runbook_url"]
        for document in of_kind(placed, "PrometheusRule")
        for group in document["spec"]["groups"]
        for rule in group["rules"]
    }
    assert urls
    assert all(url == f"https://wiki.example/grpo/{alert}.md" for alert, url in urls.items())


def test_each_dashboard_is_a_config_map_for_grafanas_sidecar(chart: Chart) -> None:
    dashboards = {"enabled": True, "annotations": {"grafana_folder": "GRPO"}}
    documents = chart.render({"metrics": {"dashboards": dashboards}})
    files = {file.name: file.read_text() for file in (CHART / "files" / "dashboards").iterdir()}
    found = {}
    for document in of_kind(documents, "ConfigMap"):
        assert document["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert document["metadata"]["annotations"]["grafana_folder"] == "GRPO"
        assert len(json.dumps(document)) < 1 << 20, "what an object may be"
        found |= document["data"]
    assert found == files
    assert not of_kind(chart.render(), "ConfigMap")


def test_without_monitors_pods_can_be_annotated(chart: Chart) -> None:
    documents = chart.render({"metrics": {"annotations": True}})
    annotations = operator_pod(documents)["metadata"]["annotations"]
    assert {key: annotations[f"prometheus.io/{key}"] for key in ("scrape", "port", "path")} == {
        "scrape": "true",
        "port": "8080",
        "path": "/metrics",
    }
    assert "--scrape-annotations" in operator_pod(documents)["spec"]["containers"][0]["args"]
    plain = operator_pod(chart.render())
    assert not [key for key in plain["metadata"]["annotations"] if key.startswith("prometheus.io/")]
    assert "--scrape-annotations" not in plain["spec"]["containers"][0]["args"]


def test_a_pod_monitor_that_no_job_would_let_in_is_refused(chart: Chart) -> None:
    with pytest.raises(
        RenderError, match=r"metrics\.podMonitor\.enabled: .* Set it to the namespace of your Prometheus"
    ):
        chart.text({"metrics": {"podMonitor": {"enabled": True}}})


@pytest.mark.parametrize(
    ("values", "release", "expected"),
    [
        ({}, "grpo-operator", "grpo-operator"),
        ({}, "research", "research-grpo-operator"),
        ({}, "r" * 53, "r" * 34 + "-grpo-operator"),
        ({"fullnameOverride": "short"}, "research", "short"),
    ],
)
def test_names_follow_the_release_and_stay_short(
    chart: Chart, values: dict[str, Any], release: str, expected: str
) -> None:
    documents = chart.render(values, release=release)
    assert of_kind(documents, "Deployment")[0]["metadata"]["name"] == expected
    assert all(len(document["metadata"]["name"]) <= 63 for document in documents)


def test_common_labels_and_annotations_are_on_every_object(chart: Chart) -> None:
    documents = chart.render({"commonLabels": {"team": "ml"}, "commonAnnotations": {"owner": "us"}})
    for document in documents:
        assert document["metadata"]["labels"]["team"] == "ml", document["kind"]
        assert document["metadata"]["annotations"]["owner"] == "us", document["kind"]


def test_the_test_pod_asks_the_operator_of_its_release(chart: Chart) -> None:
    pod = one(chart.render(release="r", namespace="n"), "Pod", "r-grpo-operator-selfcheck")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["containers"][0]["args"] == [
        "selfcheck",
        "--namespace=n",
        "--readyz-url=http://r-grpo-operator-metrics.n.svc:8080/readyz",
    ]
