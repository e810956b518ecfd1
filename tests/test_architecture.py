"""The house stands: imports point one way, the standard library is not shadowed, and every module says what it keeps."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "operator" / "grpo_operator", ROOT / "worker" / "grpo_worker")
MODULES = sorted(module for package in PACKAGES for module in package.rglob("*.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'worker'}"}
PROJECT_FILES = ("operator", "worker", "tests", "examples", "docs", "crds", "benchmarks", "charts", "e2e")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".sh"}
# Where somebody worked, not what was made: a file that names it would be wrong for every reader.
WORKPLACES = ("/" + "work/", "/" + "root/", "shared" + "/DESIGN", "shared" + "/STYLE", "/tmp/" + "brief")
MAX_LINES = 600


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


def project_texts() -> list[Path]:
    files = [file for folder in PROJECT_FILES if (ROOT / folder).is_dir() for file in (ROOT / folder).rglob("*")]
    return [file for file in (*files, *ROOT.iterdir()) if file.suffix in TEXT and file.is_file()]


def test_operator_from_the_repository_root_is_the_standard_library() -> None:
    done = run(sys.executable, "-c", "import operator, sys; print(operator.__file__); operator.itemgetter(0)")
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip().startswith(str(ROOT / "operator"))
    assert done.stdout.strip() == sys.modules["operator"].__file__


def test_the_folders_around_the_packages_are_no_packages() -> None:
    assert [folder for folder in ("operator", "worker") if (ROOT / folder / "__init__.py").exists()] == []


def test_imports_point_one_way() -> None:
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_a_module_opens_with_what_it_keeps(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring
    assert len(docstring) > 15


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_a_module_holds_one_concept(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= MAX_LINES


def test_no_file_names_the_place_where_it_was_written() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {place}"
        for file in project_texts()
        for place in WORKPLACES
        if place in file.read_text(errors="replace")
    ]
    assert found == []


def test_the_document_is_read_without_the_training_stack() -> None:
    program = (
        "import sys; import grpo_worker.config, grpo_worker.config.crd, grpo_worker.config.reference; "
        "print(sorted({'torch', 'vllm', 'transformers', 'numpy', 'aiohttp', 'pyarrow', 'msgspec'} & sys.modules.keys()))"
    )
    assert run(sys.executable, "-c", program).stdout.strip() == "[]"


def test_a_swallowed_exception_is_nowhere() -> None:
    """`except Exception: pass` hides what a person has to know."""
    found = [
        f"{module.relative_to(ROOT)}:{handler.lineno}"
        for module in MODULES
        for handler in ast.walk(ast.parse(module.read_text()))
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or getattr(handler.type, "id", "") in {"Exception", "BaseException"})
        and all(isinstance(statement, ast.Pass) for statement in handler.body)
    ]
    assert found == []
