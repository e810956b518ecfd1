"""Where a job's model is, what its directory consists of, and what that says about itself.

Invariants: every role of a run gets the same directory of the same commit from `resolve_model`, and works with nothing but that
directory. No tensor is loaded and torch is not imported.
"""

import difflib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from grpo_worker.environment import RUN_DIRECTORY
from grpo_worker.errors import DataError, one_line
from grpo_worker.run_directory import RunDirectory

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
TEMPLATES_FOLDER = "additional_chat_templates"
# Beside the weights: tokenizers, chat templates, generation_config.json, processors, custom code, the licence. Named by kind,
# so a directory that also holds data or other people's checkpoints is not copied with them.
SMALL_FILES = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.py", "*.md", "tokenizer*", "LICEN[CS]E*",
    "NOTICE*",
)  # fmt: skip
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def resolve_model(path: str, revision: str | None = None) -> Path:
    """The directory of `model.path`, complete; a Hugging Face id is looked up in the local cache, or downloaded into it.

    A branch may move while a run lasts: the commit that the first role of a run found is kept in the run directory
    (`GRPO_RUN_DIR`), and all others take that one, after restarts too.

    Raises:
        DataError: no such directory, nothing that the hub gives, or no model in it.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        _refuse_path(path, directory)
        directory = _snapshot(path, revision)
    if not (directory / CONFIG_FILE).is_file():
        raise DataError(
            f"model.path: {directory} has no {CONFIG_FILE}. Give a model directory in Hugging Face format, or a Hugging Face id."
        )
    weight_files(directory)
    return directory.resolve()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model: those of the index, when there is one. Raises DataError when there are none, or one is
    missing."""
    index, single = directory / INDEX_FILE, directory / "model.safetensors"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"model.path: {index} cannot be read ({one_line(error)}). Copy the model again.") from error
        files = [directory / name for name in named]
    else:
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(
            f"model.path: {directory} has no *.safetensors file. Save the model with safe_serialization=True, or download it again."
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(
            f"model.path: {directory} lacks {len(missing)} of the {len(files)} files that {INDEX_FILE} names, "
            f"the first: {missing[0]}. Copy or download the model again."
        )
    return files


def tensor_headers(directory: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and safetensors' dtype (`BF16`) of each tensor of the model. Raises DataError."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(directory):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    part = tensors.get_slice(name)
                    yield name, tuple(part.get_shape()), part.get_dtype()
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"model.path: {file} is not a readable safetensors file ({one_line(error)}). Copy the model again."
            ) from error


def parameter_count(directory: Path) -> int:
    return sum(math.prod(shape) for _, shape, _ in tensor_headers(directory))


def files_beside_weights(directory: Path) -> Iterator[Path]:
    """What a copy of the model needs beside config.json and the weights with their index, relative to `directory`."""
    for folder, patterns in ((directory, SMALL_FILES), (directory / TEMPLATES_FOLDER, ("*.jinja",))):
        names = {path for pattern in patterns for path in folder.glob(pattern)}
        for path in sorted(names):
            written_anew = (
                path.name == CONFIG_FILE or path.name.endswith(".index.json") or path.suffix == ".safetensors"
            )
            if path.is_file() and not written_anew:
                yield path.relative_to(directory)


def _snapshot(model_id: str, revision: str | None) -> Path:
    """The cached snapshot of the commit that this run trains."""
    root = os.environ.get(RUN_DIRECTORY)
    record = RunDirectory(Path(root)).model_commit(model_id, revision) if root else None
    if record is None:
        return _download(model_id, revision)
    if not record.is_file():
        found = _download(model_id, revision)
        _write_once(record, found.name)
        if record.read_text(encoding="utf-8") == found.name:
            return found
    return _download(model_id, record.read_text(encoding="utf-8"))


def _write_once(path: Path, text: str) -> None:
    """Of several processes that write the file at the same time the first one wins; the file is whole as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f".tmp-{path.name}-{os.getpid()}-{os.uname().nodename}")
    mine.write_text(text, encoding="utf-8")
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    except OSError:  # no hard links on this file system: the last one wins
        os.replace(mine, path)
    finally:
        mine.unlink(missing_ok=True)


def _download(model_id: str, revision: str | None) -> Path:
    """The snapshot directory, whose name is the commit. What is in the cache already is not downloaded again."""
    from huggingface_hub import snapshot_download

    variable = _offline_variable()
    try:
        folder = snapshot_download(
            model_id,
            revision=revision,
            local_files_only=variable is not None,
            allow_patterns=[*SMALL_FILES, "*.safetensors"],
            ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"],  # the same weights in another format
        )
    except Exception as error:  # the hub's errors, the network's and the disk's
        wanted = f"{model_id} at revision {revision}" if revision else model_id
        near = _near_directory(Path(model_id))
        if variable:
            raise DataError(
                f"model.path: {model_id} is not a directory here, and {wanted} is not in the Hugging Face cache "
                f"({variable} is set, so the hub is not asked).{near} Give a directory, or download the model first."
            ) from error
        raise DataError(
            f"model.path: {model_id} is not a directory here, and {wanted} could not be had from the Hugging Face hub: it is not "
            f"reachable, or there is no such model ({one_line(error)}).{near} "
            "Give a directory, check the name and revision, or download the model first."
        ) from error
    return Path(folder)


def _offline_variable() -> str | None:
    on = ("1", "on", "yes", "true")
    return next((name for name in _OFFLINE_VARIABLES if os.environ.get(name, "").lower() in on), None)


def _refuse_path(path: str, local: Path) -> None:
    """What cannot be a Hugging Face id (`name` or `owner/name`) is a path, and must exist."""
    is_id = path.count("/") <= 1 and not path.startswith(("/", ".", "~")) and not path.endswith("/")
    if local.is_file():
        raise DataError(f"model.path: {path} is a file. Name the directory that holds config.json and the weights.")
    if is_id:
        return
    if not local.parent.is_dir():
        where = f"Nor does its directory {local.parent}. Check the path, or mount the volume that holds it."
    else:
        names = sorted(entry.name for entry in local.parent.iterdir() if entry.is_dir())
        held = f"Directories there: {', '.join(names[:5])}." if names else f"{local.parent} holds no directory."
        where = _near_directory(local).strip() or held
    raise DataError(f"model.path: {path} does not exist. {where}")


def _near_directory(local: Path) -> str:
    if not local.parent.is_dir():
        return ""
    names = [entry.name for entry in local.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(local.name, names, n=3)
    return f" Did you mean {' or '.join(str(local.parent / name) for name in near)}?" if near else ""
