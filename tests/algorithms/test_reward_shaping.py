"""DAPO's overlong penalty and dynamic sampling."""

import pytest
import torch

from grpo_worker.algorithms import has_signal, overlong_penalty
from grpo_worker.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (130, -1.0)]
)
def test_the_overlong_penalty_rises_linearly_within_the_buffer(length: int, penalty: float) -> None:
    result = overlong_penalty(torch.tensor([length]), max_response_tokens=100, buffer_tokens=20, penalty_factor=1.0)
    assert result.tolist() == pytest.approx([penalty])


def test_the_penalty_factor_scales_it() -> None:
    assert overlong_penalty(torch.tensor([90, 100]), 100, 20, 0.5).tolist() == pytest.approx([-0.25, -0.5])


@pytest.mark.parametrize("buffer_tokens", [0, -1, 101])
def test_a_buffer_outside_the_response_is_refused(buffer_tokens: int) -> None:
    with pytest.raises(UsageError, match=f"100.*got {buffer_tokens}"):
        overlong_penalty(torch.tensor([90]), 100, buffer_tokens)


@pytest.mark.parametrize(
    ("values", "signal"),
    [
        ([0.0, 1.0], True),
        ([0.0, 0.0, 0.0], False),
        ([1.0, 1.0], False),
        ([0.1 + 0.2, 0.3], False),  # differ in the last bit alone
        ([0.3, 0.3001], True),
        ([0.5], True),
    ],
)
def test_a_group_has_signal_when_its_metric_varies(values: list[float], signal: bool) -> None:
    assert has_signal(values) is signal


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(DataError, match="without responses"):
        has_signal([])
