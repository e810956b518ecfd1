"""The policy loss that a job names: one of ours, or a person's own."""

from grpo_worker.algorithms.losses import POLICY_LOSSES, PolicyLoss
from grpo_worker.errors import DataError
from grpo_worker.functions import load_function

FIELD = "actor.lossMode"


def policy_loss(loss_mode: str) -> PolicyLoss:
    """Raises DataError that names the field."""
    if loss_mode in POLICY_LOSSES:
        return POLICY_LOSSES[loss_mode]
    if ":" not in loss_mode:
        raise DataError(
            f"{FIELD}: no loss is called {loss_mode!r}. Choose one of {', '.join(POLICY_LOSSES)}, or give module:function."
        )
    return load_function(loss_mode, FIELD)
