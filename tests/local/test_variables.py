"""The environment of a local run's processes comes from the document, as far as one machine can tell it."""

from typing import Any

import pytest

from grpo_worker.config import Spec
from grpo_worker.errors import UsageError
from grpo_worker.local.variables import document_variables


def spec(**sections: Any) -> Spec:
    return Spec.model_validate({"model": {"path": "m"}, **sections})


@pytest.mark.parametrize(
    ("sections", "inherited", "expected"),
    [
        ({}, {}, {"NCCL_DEBUG": "WARN"}),
        ({}, {"NCCL_DEBUG": "INFO"}, {}),
        ({"runtime": {"env": [{"name": "NCCL_DEBUG", "value": ""}]}}, {}, {"NCCL_DEBUG": ""}),
        (
            {"network": {"socketInterface": "eth1"}},
            {"NCCL_DEBUG": "INFO"},
            {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1"},
        ),
        (
            {"network": {"socketInterface": "eth1"}, "runtime": {"env": [{"name": "NCCL_SOCKET_IFNAME", "value": "ib0"}]}},
            {"NCCL_DEBUG": "INFO"},
            {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth1"},
        ),
    ],
)  # fmt: skip
def test_the_document_wins_over_defaults(
    sections: dict[str, Any], inherited: dict[str, str], expected: dict[str, str]
) -> None:
    assert document_variables(spec(**sections), inherited) == expected


SECRET = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
SETTING = {"name": "PROXY", "valueFrom": {"configMapKeyRef": {"name": "site", "key": "proxy"}}}


def test_what_a_cluster_holds_is_the_inherited_variable_of_the_same_name() -> None:
    inherited = {"HF_TOKEN": "hf_1", "PROXY": "", "NCCL_DEBUG": "WARN"}
    assert document_variables(spec(runtime={"env": [SECRET, SETTING]}), inherited) == {}


def test_what_a_cluster_holds_and_the_shell_does_not_is_refused_by_its_name() -> None:
    with pytest.raises(UsageError, match=r"runtime\.env: HF_TOKEN, PROXY: valueFrom .* export HF_TOKEN=") as caught:
        document_variables(spec(runtime={"env": [SECRET, SETTING]}), {"TOKEN": "hf_1"})
    assert "hf_1" not in str(caught.value)
