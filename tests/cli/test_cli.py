"""The `grpo` command: what it prints, how it ends, and how little it needs for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from grpo_worker.cli.main import call
from grpo_worker.config import job_from_document, load_job
from grpo_worker.config.crd import crd_yaml
from grpo_worker.config.reference import reference_markdown
from grpo_worker.errors import ExitCode

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "arithmetic.yaml"
HEAVY = ("torch", "vllm", "transformers", "numpy", "pyarrow", "aiohttp", "msgspec", "rich")
COMMANDS = [
    [], ["run"], ["report"], ["validate"], ["crd"], ["docs"], ["data"], ["data", "gsm8k"], ["data", "reasoning-gym"], ["generate"],
    ["demo"], ["demo", "prepare"], ["submit"], ["status"], ["logs"], ["stop"], ["resume"],
]  # fmt: skip


def in_a_process(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip


def test_validate_prints_valid_and_the_resolved_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["validate", str(EXAMPLE), "--set", "actor.optim.lr=1e-5"]) == ExitCode.DONE
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert first == "valid"
    job = job_from_document(yaml.safe_load(rest))
    assert job == load_job(EXAMPLE, ["actor.optim.lr=1e-5"])
    assert job.spec.actor.optim.lr == 1e-5


def test_validate_prints_what_a_preset_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["validate", str(ROOT / "examples" / "arithmetic-dapo.yaml")]) == ExitCode.DONE
    assert "clipRatioHigh: 0.28" in capsys.readouterr().out


def test_validate_prints_every_error_and_ends_with_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["validate", str(EXAMPLE), "--set", "rollout.n=0", "--set", "actor.lr=1"]) == 64
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"grpo: {EXAMPLE}: 2 errors\n")
    assert "spec.rollout.n = 0" in captured.err
    assert "spec.actor.lr = 1: unknown field" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["validate"], "the following arguments are required: file"),
        (["train"], "invalid choice"),
        ([], "required: COMMAND"),
        (["validate", "a.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["data", "reasoning-gym", "--task", "x", "--size", "1", "-o", "x", "--set", "a"], "expected NAME=VALUE"),
        (["generate", "--checkpoint", "x"], "no prompt"),
        (["generate", "--checkpoint", "x", "--prompts-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_wrong_command_line_ends_with_64(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(arguments) == 64
    assert words in capsys.readouterr().err


def test_crd_and_docs_print_the_generated_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["crd"]) == 0
    assert capsys.readouterr().out == crd_yaml()
    assert call(["docs"]) == 0
    assert capsys.readouterr().out == reference_markdown()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert capsys.readouterr().out.startswith("grpo 0.")


def test_help_of_each_command_needs_nothing_heavy() -> None:
    program = (
        "import json, sys; from grpo_worker.cli.main import call\n"
        "codes = [call([*command, '--help']) for command in json.loads(sys.argv[1])]\n"
        "print(json.dumps([codes, sorted(set(json.loads(sys.argv[2])) & sys.modules.keys())]))"
    )
    done = in_a_process(program, json.dumps(COMMANDS), json.dumps(HEAVY))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] * len(COMMANDS), []]
    assert done.stdout.count("usage: grpo") == len(COMMANDS)


@pytest.mark.parametrize("command", [["validate", str(EXAMPLE)], ["crd"], ["docs"]], ids=lambda command: command[0])
def test_a_command_on_the_document_needs_nothing_heavy(command: list[str]) -> None:
    program = (
        "import json, sys; from grpo_worker.cli.main import call\n"
        "code = call(sys.argv[2:]); print(file=sys.stderr)\n"
        "print(json.dumps([code, sorted(set(json.loads(sys.argv[1])) & sys.modules.keys())]), file=sys.stderr)"
    )
    done = in_a_process(program, json.dumps(HEAVY), *command)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]


def test_output_into_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        command = [sys.executable, "-m", "grpo_worker.cli.main", "docs"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_data_gsm8k_writes_a_training_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "train.jsonl"
    rows = [
        {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"question": "And now?", "answer": "much\n#### 1,000"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.parquet"
    assert call(["data", "gsm8k", str(source), "-o", str(output), "--no-instruction"]) == 0
    assert capsys.readouterr().out == f"{output}: 2 rows\n"
    table = pq.read_table(output).to_pylist()
    assert {(row["prompt"], row["reward"]) for row in table} == {("How many?", "4"), ("And now?", "1000")}


def test_data_does_not_overwrite_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.parquet"
    make = ["data", "reasoning-gym", "--task", "chain_sum", "--size", "3", "--set", "max_terms=2", "-o", str(output)]
    assert call(make) == 0
    assert pq.read_table(output).num_rows == 3
    before = output.read_bytes()
    assert call(make) in (64, 65, 78)
    assert "overwrite" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert call([*make, "--overwrite"]) == 0


def test_data_of_an_unknown_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call(["data", "reasoning-gym", "--task", "chain_summ", "--size", "3", "-o", str(tmp_path / "x.parquet")])
    assert code in (64, 65)
    assert "chain_sum" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert call(["run", str(EXAMPLE), "--run-dir", str(tmp_path / "file" / "run")]) == 64
    assert "--run-dir" in capsys.readouterr().err
