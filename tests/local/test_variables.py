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


def test_a_value_that_a_cluster_holds_is_refused_by_its_name() -> None:
    env = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}]
    with pytest.raises(UsageError, match=r"runtime\.env: HF_TOKEN: valueFrom .* export it in the shell"):
        document_variables(spec(runtime={"env": env}), {})
