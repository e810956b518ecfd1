"""The policy loss that a job names: one of ours, or the user's `module:function` or `file.py:function`.

Invariant: whatever is wrong with a user's function is known before the first step, as a DataError that names the field.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from grpo_worker.algorithms.losses import POLICY_LOSSES, PolicyLoss
from grpo_worker.errors import DataError

FIELD = "actor.lossMode"


def policy_loss(loss_mode: str) -> PolicyLoss:
    if loss_mode in POLICY_LOSSES:
        return POLICY_LOSSES[loss_mode]
    source, separator, name = loss_mode.rpartition(":")
    if not separator:
        known = ", ".join(POLICY_LOSSES)
        raise DataError(f"{FIELD}: no loss is called {loss_mode!r}. Choose one of {known}, or give module:function.")
    function = getattr(_load(source), name, None)
    if not callable(function):
        raise DataError(f"{FIELD}: {source} has no function {name!r}.")
    return function  # type: ignore[no-any-return]


def _load(source: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(f"grpo_loss_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # a user's module may raise anything while it is imported
        raise DataError(f"{FIELD}: importing {source} failed: {type(error).__name__}: {error}") from error
