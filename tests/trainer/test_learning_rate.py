"""The learning rate, update by update."""

import pytest

from grpo_worker.config.actor import Optim
from grpo_worker.trainer.learning_rate import learning_rate

TABLE = [
    ("constant", 0, 0, 0.0, [1.0, 1.0, 1.0]),
    ("constant", 4, 0, 0.0, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    ("linear", 0, 4, 0.0, [0.75, 0.5, 0.25, 0.0, 0.0]),
    ("linear", 2, 6, 0.2, [0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
    ("cosine", 1, 5, 0.0, [1.0, 0.8535533905932737, 0.5, 0.14644660940672624, 0.0, 0.0]),
    ("cosine", 0, 2, 0.5, [0.75, 0.5, 0.5]),
]


@pytest.mark.parametrize(("schedule", "warmup", "total", "floor", "rates"), TABLE)
def test_rates_of_the_first_updates(schedule: str, warmup: int, total: int, floor: float, rates: list[float]) -> None:
    optim = Optim.model_validate({"lr": 0.5, "lrScheduler": schedule, "lrWarmupSteps": warmup, "minLrRatio": floor})
    assert [learning_rate(optim, total, k) for k in range(1, len(rates) + 1)] == pytest.approx([0.5 * r for r in rates])


def test_a_decaying_schedule_whose_length_is_not_known_yet_keeps_the_peak() -> None:
    assert learning_rate(Optim.model_validate({"lr": 0.5, "lrScheduler": "cosine"}), 0, 100) == 0.5
