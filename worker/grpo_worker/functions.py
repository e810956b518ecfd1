"""A person's own functions: `module:function` or `path/to/file.py:function`, loaded with an error that says what is wrong.

Invariant: whatever goes wrong while finding or importing the function is a DataError that starts with the field it was named in.
Imports nothing heavy: reward workers start with it.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_worker.errors import DataError

_TRACEBACK_LINES = 8


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function that `name` (module:function or file.py:function) of the document's `field` means. Raises DataError."""
    source, colon, function_name = name.rpartition(":")
    if not (source and colon and function_name):
        raise DataError(f"{field}: {name!r} is half a name. Write module:function or path/to/file.py:function.")
    is_file = source.endswith(".py") or "/" in source
    module = _load_file(source, name, field) if is_file else _load_module(source, name, field)
    return _member(module, function_name, name, field)


def check_signature(
    signature: inspect.Signature,
    positional: int,
    keywords: Sequence[str],
    options: Mapping[str, Any],
    *,
    name: str,
    fields: tuple[str, str],
    advice: str,
) -> None:
    """Refuse a function that cannot be called with so many positional arguments, these keywords and a person's options.

    Args:
        fields: the document's fields of the function and of its options.
        advice: the signature to write.

    Raises DataError.
    """
    field, options_field = fields
    kinds = inspect.Parameter
    free = [
        parameter.name
        for parameter in list(signature.parameters.values())[positional:]
        if parameter.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD) and parameter.name not in keywords
    ]
    takes_any = any(parameter.kind is kinds.VAR_KEYWORD for parameter in signature.parameters.values())
    for option in options:
        if option in keywords or (option not in free and not takes_any):
            raise DataError(
                f"{options_field}.{option}: {name!r} takes no such option (options: {', '.join(free) or 'none'})."
                f"{did_you_mean(option, free)}"
            )
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords), **options)
    except TypeError as error:
        raise DataError(
            f"{field}: {name!r} has the signature {signature}, which cannot be called ({error})."
            f" {advice} further parameters need a default or an entry in {options_field}."
        ) from error


def traceback_tail(error: BaseException, lines: int = _TRACEBACK_LINES) -> str:
    """The last lines of the traceback: where it was raised and what."""
    text = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(text[-lines:])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest known words, or ''."""
    near = difflib.get_close_matches(word, list(known), n=2)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _load_module(module_name: str, name: str, field: str) -> ModuleType:
    _put_first_on_path(os.getcwd())
    parts = module_name.split(".")
    own = {".".join(parts[: depth + 1]) for depth in range(len(parts))}
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name not in own:
            raise DataError(
                f"{field}: {name!r} needs module {error.name!r}, which is not installed.\n{traceback_tail(error)}"
            ) from error
        here = [path.stem for path in sorted(Path.cwd().glob("*.py"))]
        raise DataError(
            f"{field}: {name!r}: no module {error.name!r} (looked in the current directory {os.getcwd()}, in PYTHONPATH "
            f"({os.environ.get('PYTHONPATH') or 'empty'}) and among the installed packages).{did_you_mean(parts[0], here)} "
            f"Start where the module is, set PYTHONPATH, or write path/to/file.py:{name.rpartition(':')[2]}."
        ) from error
    except (Exception, SystemExit) as error:  # the module is the person's program
        raise _import_failed(name, module_name, field, error) from error


def _load_file(source: str, name: str, field: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        there = [entry.name for entry in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        where = (
            f"Python files in {path.parent}: {', '.join(there) or 'none'}" if path.parent.is_dir() else "nor its folder"
        )
        raise DataError(f"{field}: {name!r}: there is no file {path} ({where}).{did_you_mean(path.name, there)}")
    _put_first_on_path(str(path.parent))
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    spec = importlib.util.spec_from_file_location(f"grpo_user_{path.stem}" if taken else path.stem, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{field}: {name!r}: {path} cannot be loaded as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the module is the person's program
        del sys.modules[spec.name]
        raise _import_failed(name, str(path), field, error) from error
    return module


def _import_failed(name: str, source: str, field: str, error: BaseException) -> DataError:
    return DataError(f"{field}: {name!r}: importing {source} failed:\n{traceback_tail(error)}")


def _put_first_on_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _member(module: ModuleType, function_name: str, name: str, field: str) -> Callable[..., Any]:
    function = getattr(module, function_name, None)
    where = getattr(module, "__file__", None) or module.__name__
    if function is None:
        functions = [
            key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
        ]
        raise DataError(
            f"{field}: {name!r}: {where} has no function {function_name!r} (functions: {', '.join(functions) or 'none'})."
            f"{did_you_mean(function_name, functions)}"
        )
    if not callable(function):
        raise DataError(
            f"{field}: {name!r}: {function_name!r} of {where} is a {type(function).__name__}, not a function."
        )
    return function
