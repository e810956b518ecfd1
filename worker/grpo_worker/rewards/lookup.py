"""From `reward.function` and `reward.options` to a function that takes a RewardInput and gives a RewardResult.

Invariant: a name, an option or a signature that cannot work is refused here, once and before the first response exists,
with what was looked up, where, and what is there instead.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_worker.errors import DataError
from grpo_worker.rewards.base import RewardFunction, RewardInput, RewardResult, as_result

# name in the document -> module, function. Imported on use: math needs sympy, reasoningGym a hundred task modules.
BUILT_IN = {
    "gsm8k": ("grpo_worker.rewards.gsm8k", "gsm8k"),
    "math": ("grpo_worker.rewards.math", "math"),
    "exactMatch": ("grpo_worker.rewards.exact_match", "exact_match"),
    "format": ("grpo_worker.rewards.format", "format_match"),
    "reasoningGym": ("grpo_worker.rewards.reasoning_gym", "reasoning_gym"),
}
# What verl passes to `custom_reward_function` (verl/workers/reward_manager), by keyword.
VERL_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")

_TRACEBACK_LINES = 8


def resolve(name: str, options: Mapping[str, Any] | None = None) -> RewardFunction:
    """The function that `name` stands for, with `options` bound as keyword arguments.

    `name` is a built-in, `module:function` (current directory or PYTHONPATH) or `path/to/file.py:function`. The current
    directory, or the file's, is put first on `sys.path`, as Python does for a script. The user's module is imported, so
    this belongs in a worker process.

    Raises:
        DataError: nothing of that name, it fails to import, or its signature or the options do not fit.
    """
    options = dict(options or {})
    if name in BUILT_IN:
        module_name, function_name = BUILT_IN[name]
        module = _import(module_name, name)
        _check_options(module, options, name)
    elif ":" in name:
        source, _, function_name = name.rpartition(":")
        if not source or not function_name:
            raise DataError(
                f"reward.function: {name!r} is half a name. Write module:function or path/to/file.py:function."
            )
        module = _load_file(source, name) if source.endswith(".py") else _load_module(source, name)
    else:
        raise DataError(
            f"reward.function: {name!r} is not a built-in reward ({', '.join(BUILT_IN)})."
            f"{_did_you_mean(name, BUILT_IN)} For your own, write module:function or path/to/file.py:function."
        )
    return _bind(_member(module, function_name, name), options, name)


def traceback_tail(error: BaseException, lines: int = _TRACEBACK_LINES) -> str:
    """The last lines of the traceback: where it was raised and what."""
    text = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(text[-lines:])


def _load_module(module_name: str, name: str) -> ModuleType:
    _put_first_on_path(os.getcwd())
    parts = module_name.split(".")
    parents = {".".join(parts[: depth + 1]) for depth in range(len(parts))}
    try:
        return _import(module_name, name)
    except _ModuleMissingError as error:
        if error.module not in parents:
            raise DataError(
                f"reward.function: {name!r} needs module {error.module!r}, which is not installed.\n{error.tail}"
            ) from error
        python_path = os.environ.get("PYTHONPATH") or "empty"
        here = [path.stem for path in sorted(Path.cwd().glob("*.py"))]
        raise DataError(
            f"reward.function: {name!r}: no module {error.module!r} (looked in the current directory {os.getcwd()},"
            f" in PYTHONPATH ({python_path}) and among the installed packages).{_did_you_mean(parts[0], here)}"
            f" Start where the module is, set PYTHONPATH, or write path/to/file.py:{name.rpartition(':')[2]}."
        ) from error


class _ModuleMissingError(Exception):
    def __init__(self, module: str, tail: str) -> None:
        super().__init__(module)
        self.module = module
        self.tail = tail


def _import(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name.startswith("grpo_worker."):
            raise DataError(
                f"reward.function: {name!r} needs the package {error.name!r}."
                " Install it: pip install 'grpo-operator[worker]'."
            ) from error
        raise _ModuleMissingError(error.name or module_name, traceback_tail(error)) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(name, module_name, error) from error


def _load_file(source: str, name: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        there = [entry.name for entry in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        where = (
            f"Python files in {path.parent}: {', '.join(there) or 'none'}" if path.parent.is_dir() else "nor its folder"
        )
        raise DataError(
            f"reward.function: {name!r}: there is no file {path} ({where}).{_did_you_mean(path.name, there)}"
        )
    _put_first_on_path(str(path.parent))
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    spec = importlib.util.spec_from_file_location(f"grpo_reward_{path.stem}" if taken else path.stem, path)
    if spec is None or spec.loader is None:
        raise DataError(f"reward.function: {name!r}: {path} cannot be loaded as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise _import_failed(name, str(path), error) from error
    return module


def _import_failed(name: str, source: str, error: BaseException) -> DataError:
    return DataError(f"reward.function: {name!r}: importing {source} failed:\n{traceback_tail(error)}")


def _put_first_on_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _member(module: ModuleType, function_name: str, name: str) -> Callable[..., object]:
    function = getattr(module, function_name, None)
    where = getattr(module, "__file__", None) or module.__name__
    if function is None:
        functions = [
            key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
        ]
        raise DataError(
            f"reward.function: {name!r}: {where} has no function {function_name!r}"
            f" (functions: {', '.join(functions) or 'none'}).{_did_you_mean(function_name, functions)}"
        )
    if not callable(function):
        raise DataError(
            f"reward.function: {name!r}: {function_name!r} of {where} is a {type(function).__name__}, not a function."
        )
    if inspect.iscoroutinefunction(function):
        raise DataError(
            f"reward.function: {name!r} is an async function; a worker makes one call at a time."
            " Write a plain function (asyncio.run inside it), and raise reward.workers for calls that wait."
        )
    return function  # type: ignore[no-any-return]


def _check_options(module: ModuleType, options: dict[str, Any], name: str) -> None:
    try:
        getattr(module, "check_options", lambda **_: None)(**options)
    except ValueError as error:
        raise DataError(f"reward.options of {name!r}: {error}.") from error


def _bind(function: Callable[..., object], options: dict[str, Any], name: str) -> RewardFunction:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: take it as a function of the sample
        return lambda sample: as_result(function(sample, **options))
    parameters = signature.parameters
    if {"solution_str", "ground_truth"} <= parameters.keys():
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        passed = tuple(key for key in VERL_ARGUMENTS if takes_any or key in parameters)
        _check_signature(signature, (), dict.fromkeys(passed), options, name)

        def call_as_verl(sample: RewardInput) -> RewardResult:
            arguments = {
                "data_source": sample.data.get("data_source", ""),
                "solution_str": sample.response,
                "ground_truth": sample.ground_truth,
                "extra_info": sample.data.get("extra_info") or {},
            }
            return as_result(function(**{key: arguments[key] for key in passed}, **options))

        return call_as_verl
    _check_signature(signature, (None,), {}, options, name)
    return lambda sample: as_result(function(sample, **options))


def _check_signature(
    signature: inspect.Signature,
    positional: tuple[None, ...],
    keywords: dict[str, None],
    options: dict[str, Any],
    name: str,
) -> None:
    free = [
        parameter.name
        for parameter in list(signature.parameters.values())[len(positional) :]
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.name not in keywords
    ]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    for option in options:
        if option in keywords or (option not in free and not takes_any):
            raise DataError(
                f"reward.options.{option}: {name!r} takes no such option (options: {', '.join(free) or 'none'})."
                f"{_did_you_mean(option, free)}"
            )
    try:
        signature.bind(*positional, **keywords, **options)
    except TypeError as error:
        raise DataError(
            f"reward.function: {name!r} has the signature {signature}, which cannot be called ({error})."
            f" Write (sample: RewardInput) or verl's ({', '.join(VERL_ARGUMENTS)});"
            " further parameters need a default or an entry in reward.options."
        ) from error


def _did_you_mean(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
