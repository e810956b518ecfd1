"""The learning rate, update by update."""

import pytest

from grpo_worker.errors import ConfigError
from grpo_worker.trainer.learning_rate import learning_rate
from grpo_worker.trainer.options import OptimizerOptions

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
    options = OptimizerOptions(
        lr=2.0,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_updates=warmup,
        total_updates=total,
        min_lr_ratio=floor,
    )
    assert [learning_rate(options, k) for k in range(1, len(rates) + 1)] == pytest.approx([2 * r for r in rates])


def test_a_decaying_schedule_whose_length_is_not_known_yet_keeps_the_peak() -> None:
    assert learning_rate(OptimizerOptions(lr=2.0, schedule="cosine"), 100) == 2.0


def test_a_run_shorter_than_its_warm_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"actor\.optim\.lrWarmupSteps"):
        OptimizerOptions(schedule="cosine", warmup_updates=10, total_updates=10)
