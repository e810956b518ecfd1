"""The operator's rights: least, and in the namespaces it was given."""

from typing import Any

import pytest
from chart_rendering import Chart, of_kind, one

NAMESPACED = {"rbac": {"scope": "namespaced", "namespaces": ["team-a", "team-b"]}}


def _verbs(rules: list[dict[str, Any]], resource: str) -> set[str]:
    return {verb for rule in rules if resource in rule["resources"] for verb in rule["verbs"]}


def _operator_rules(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = one(documents, "ClusterRole", "grpo-operator")["rules"]
    return rules


def test_secrets_are_written_and_never_read(chart: Chart) -> None:
    assert _verbs(_operator_rules(chart.render()), "secrets") == {"create", "patch"}


@pytest.mark.parametrize("scope", [{}, NAMESPACED])
def test_no_rule_has_a_wildcard(chart: Chart, scope: dict[str, Any]) -> None:
    roles = [d for d in chart.render(scope) if d["kind"] in ("Role", "ClusterRole")]
    for role in roles:
        for rule in role["rules"]:
            assert not [value for values in rule.values() for value in values if "*" in value], role["metadata"]["name"]


@pytest.mark.parametrize(
    "resource", ["pods/exec", "pods/log", "pods/proxy", "nodes", "namespaces", "roles", "serviceaccounts/token"]
)
def test_what_the_operator_has_no_business_with(chart: Chart, resource: str) -> None:
    assert not _verbs(_operator_rules(chart.render()), resource)


def test_the_lease_is_bound_to_its_name_and_namespace(chart: Chart) -> None:
    documents = chart.render()
    assert not _verbs(_operator_rules(documents), "leases")
    create, use = one(documents, "Role", "grpo-operator-lease")["rules"]
    assert create["verbs"] == ["create"]
    assert use["resourceNames"] == ["grpo-operator"]
    assert use["verbs"] == ["get", "update"]
    assert one(documents, "Role", "grpo-operator-lease")["metadata"]["namespace"] == "grpo-system"


def test_namespaced_scope_gives_one_role_a_namespace_and_nothing_in_the_cluster(chart: Chart) -> None:
    values = NAMESPACED | {"rbac": NAMESPACED["rbac"] | {"aggregateRoles": False}}
    documents = chart.render(values)
    assert not of_kind(documents, "ClusterRole") + of_kind(documents, "ClusterRoleBinding")
    roles = [role for role in of_kind(documents, "Role") if role["metadata"]["name"] == "grpo-operator"]
    bindings = [role for role in of_kind(documents, "RoleBinding") if role["metadata"]["name"] == "grpo-operator"]
    assert [role["metadata"]["namespace"] for role in roles] == ["team-a", "team-b"]
    assert [binding["metadata"]["namespace"] for binding in bindings] == ["team-a", "team-b"]
    assert all(role["rules"] == _operator_rules(chart.render()) for role in roles)
    (subject,) = bindings[0]["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "grpo-operator", "namespace": "grpo-system"}


def test_namespaced_scope_without_names_is_the_releases_own_namespace(chart: Chart) -> None:
    documents = chart.render({"rbac": {"scope": "namespaced"}}, namespace="here")
    assert one(documents, "Role", "grpo-operator")["metadata"]["namespace"] == "here"


def test_rights_can_be_left_to_somebody_else(chart: Chart) -> None:
    documents = chart.render({"rbac": {"create": False}})
    names = {document["metadata"]["name"] for document in documents if "Role" in document["kind"]}
    assert names == {"grpo-operator-selfcheck"}


def test_an_existing_service_account_is_bound_and_not_made(chart: Chart) -> None:
    documents = chart.render({"serviceAccount": {"create": False, "name": "ours"}})
    assert [account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")] == [
        "grpo-operator-selfcheck"
    ]
    assert one(documents, "ClusterRoleBinding", "grpo-operator")["subjects"][0]["name"] == "ours"


def test_viewers_editors_and_admins_of_the_cluster_get_grpojobs(chart: Chart) -> None:
    documents = chart.render()
    aggregated = {}
    for role in of_kind(documents, "ClusterRole"):
        for label in role["metadata"]["labels"]:
            if "aggregate-to-" in label:
                aggregated.setdefault(label.rpartition("-")[2], set()).update(_verbs(role["rules"], "grpojobs"))
    reading, writing = {"get", "list", "watch"}, {"create", "update", "patch", "delete"}
    assert aggregated == {
        "view": reading,
        "edit": reading | writing,
        "admin": reading | writing | {"deletecollection"},
    }


def test_the_test_pod_may_only_create_grpojobs(chart: Chart) -> None:
    role = one(chart.render(), "Role", "grpo-operator-selfcheck")
    assert role["rules"] == [{"apiGroups": ["grpo.dev"], "resources": ["grpojobs"], "verbs": ["create"]}]
