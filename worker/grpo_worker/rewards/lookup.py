"""From `reward.function` and `reward.options` to a function that takes a RewardInput and gives a RewardResult.

Invariant: a name, an option or a signature that cannot work is refused here, once and before the first response exists,
with what was looked up, where, and what is there instead.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from grpo_worker.errors import DataError
from grpo_worker.functions import check_signature, did_you_mean, load_function
from grpo_worker.rewards.base import RewardFunction, RewardInput, RewardResult, as_result
from grpo_worker.rewards.parts import Part, combined

# name in the document -> module, function. Imported on use: math needs sympy, reasoningGym a hundred task modules.
BUILT_IN = {
    "gsm8k": ("grpo_worker.rewards.gsm8k", "gsm8k"),
    "math": ("grpo_worker.rewards.math", "math"),
    "exactMatch": ("grpo_worker.rewards.exact_match", "exact_match"),
    "format": ("grpo_worker.rewards.format", "format_match"),
    "reasoningGym": ("grpo_worker.rewards.reasoning_gym", "reasoning_gym"),
    "judge": ("grpo_worker.rewards.judge", "judge"),
    "remote": ("grpo_worker.rewards.judge", "remote"),
}
# In place of a function's name: options["parts"] holds several (`parts.as_options`).
PARTS = "reward.parts"
# What verl passes to `custom_reward_function` (verl/workers/reward_manager), by keyword.
VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def resolve(name: str, options: Mapping[str, Any] | None = None, field: str = "reward") -> RewardFunction:
    """The function that `name` stands for, with `options` bound as keyword arguments.

    `name` is a built-in, `module:function` (current directory or PYTHONPATH) or `path/to/file.py:function`. The current
    directory, or the file's, is put first on `sys.path`, as Python does for a script. The user's module is imported, so
    this belongs in a worker process. `field` is the part of the document that messages name.

    Raises:
        DataError: nothing of that name, it fails to import, or its signature or the options do not fit.
    """
    options = dict(options or {})
    if name == PARTS:
        return combined([_part(part, f"{PARTS}[{position}]") for position, part in enumerate(options["parts"])])
    if name in BUILT_IN:
        module, function = _built_in(name, field)
        _check_options(module, options, name, field)
    elif ":" in name:
        function = _own(name, field)
    else:
        raise DataError(
            f"{field}.function: {name!r} is not a built-in reward ({', '.join(BUILT_IN)})."
            f"{did_you_mean(name, BUILT_IN)} For your own, write module:function or path/to/file.py:function."
        )
    return _bind(function, options, name, field)


def _part(part: Mapping[str, Any], field: str) -> Part:
    function = resolve(part["function"], part["options"], field)
    return Part(part["name"], function, part["weight"], part["sources"])


def _built_in(name: str, field: str) -> tuple[ModuleType, Callable[..., object]]:
    module_name, function_name = BUILT_IN[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{field}.function: {name!r} needs the package {error.name!r}. Install it: pip install 'grpo-operator[worker]'."
        ) from error
    return module, getattr(module, function_name)


def _own(name: str, field: str) -> Callable[..., object]:
    return load_function(name, f"{field}.function")


def _check_options(module: ModuleType, options: dict[str, Any], name: str, field: str) -> None:
    try:
        getattr(module, "check_options", lambda **_: None)(**options)
    except ValueError as error:
        raise DataError(f"{field}.options of {name!r}: {error}.") from error


def _bind(function: Callable[..., object], options: dict[str, Any], name: str, field: str) -> RewardFunction:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: take it as a function of the sample
        return _checked(function, lambda sample: function(sample, **options))
    parameters = signature.parameters
    if {"solution_str", "ground_truth"} <= parameters.keys():
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        passed = tuple(key for key in VERL_ARGUMENTS if takes_any or key in parameters)
        _check_signature(signature, 0, passed, options, name, field)

        def call_as_verl(sample: RewardInput) -> Any:
            arguments = {
                "data_source": sample.data.get("data_source", ""),
                "solution_str": sample.response,
                "ground_truth": sample.ground_truth,
                "extra_info": sample.data.get("extra_info") or {},
            }
            return function(**{key: arguments[key] for key in passed}, **options)

        return _checked(function, call_as_verl)
    _check_signature(signature, 1, (), options, name, field)
    return _checked(function, lambda sample: function(sample, **options))


def _checked(function: Callable[..., object], call: Callable[[RewardInput], Any]) -> RewardFunction:
    """`call`, with what it returns, or what awaiting that gives, as a RewardResult."""
    if not inspect.iscoroutinefunction(function):
        return lambda sample: as_result(call(sample))

    async def wait(sample: RewardInput) -> RewardResult:
        return as_result(await call(sample))

    return wait


def _check_signature(
    signature: inspect.Signature,
    positional: int,
    keywords: Sequence[str],
    options: Mapping[str, Any],
    name: str,
    field: str,
) -> None:
    check_signature(
        signature,
        positional,
        keywords,
        options,
        name=name,
        fields=(f"{field}.function", f"{field}.options"),
        advice=f"Write (sample: RewardInput) or verl's ({', '.join(VERL_ARGUMENTS)});",
    )
