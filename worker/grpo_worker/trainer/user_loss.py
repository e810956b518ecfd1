"""The policy loss that a job names: one of ours, or a person's own.

Invariant: what a person's function does wrong is a DataError that names the field, whenever it shows.
"""

import functools

import torch

from grpo_worker.algorithms.losses import POLICY_LOSSES, PolicyLoss, PolicyLossInputs, PolicyLossOutput
from grpo_worker.errors import DataError, GRPOError
from grpo_worker.functions import load_function, traceback_tail

FIELD = "actor.lossMode"


def policy_loss(loss_mode: str) -> PolicyLoss:
    """Raises DataError that names the field; so does a call of a person's own loss that goes wrong."""
    if loss_mode in POLICY_LOSSES:
        return POLICY_LOSSES[loss_mode]
    if ":" not in loss_mode:
        known = ", ".join(POLICY_LOSSES)
        raise DataError(f"{FIELD}: no loss is called {loss_mode!r}. Choose one of {known}, or give module:function.")
    own = load_function(loss_mode, FIELD)

    @functools.wraps(own)
    def checked(inputs: PolicyLossInputs, /) -> PolicyLossOutput:
        try:
            output = own(inputs)
        except (GRPOError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise DataError(f"{FIELD}: {loss_mode!r} raised:\n{traceback_tail(error)}") from error
        if not isinstance(output, PolicyLossOutput) or output.loss.shape != inputs.log_probs.shape:
            raise DataError(
                f"{FIELD}: {loss_mode!r} must return a PolicyLossOutput with one loss a token, {tuple(inputs.log_probs.shape)}."
            )
        return output

    return checked
