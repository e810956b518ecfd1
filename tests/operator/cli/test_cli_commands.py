"""Command lines, and connections that do not come about."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_operator.cli.api_errors import Asked, NotThere, Refused, Unreachable, explain
from grpo_worker.errors import ConfigError, GRPOError, UsageError

Grpo = Callable[[Sequence[str]], int]
ASKED = Asked("get", "GRPOJob small", "ml", "context dev")


def kubeconfig(folder: Path, server: str, **changes: Any) -> str:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "dev", "context": {"cluster": "c", "user": "u", "namespace": "ml"}}],
        "current-context": "dev",
        **changes,
    }
    path = folder / "config"
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "--follow"], "--follow needs the name of a job"),
        (["status", "a", "-A"], "choose the namespace with -n"),
        (["logs"], "required: name"),
        (["logs", "a", "--role", "driver"], "invalid choice"),
        (["logs", "a", "--role", "all", "--index", "1"], "--index needs one --role"),
        (["logs", "a", "--tail", "-1"], "must not be negative"),
        (["logs", "a", "--tail", "many"], "invalid"),
        (["stop", "a", "--timeout", "0"], "positive"),
        (["resume"], "required: name"),
    ],
)
def test_a_wrong_command_line_ends_with_64(
    grpo: Grpo, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grpo(arguments) == 64
    assert words in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_message(
    grpo: Grpo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = kubeconfig(tmp_path, "http://127.0.0.1:9")
    for command in (["status"], ["status", "a"], ["logs", "a"], ["stop", "a"], ["resume", "a"]):
        assert grpo([*command, "--kubeconfig", config]) == 75
        error = capsys.readouterr().err
        assert error.startswith(
            "grpo: context dev: no answer from the API server at http://127.0.0.1:9: Connection refused."
        )
        assert "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, ["--context", "prod"], "no context 'prod'. Choose with --context: dev"),
        ({"current-context": ""}, [], "no current context. Choose with --context: dev"),
        ({"contexts": []}, [], "no context 'dev'. Choose with --context: there are none"),
        ({"clusters": []}, [], "kubeconfig"),
    ],
)
def test_a_kubeconfig_that_does_not_fit_names_what_it_has(
    grpo: Grpo, tmp_path: Path, changes: dict[str, Any], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    config = kubeconfig(tmp_path, "http://127.0.0.1:9", **changes)
    assert grpo(["status", "--kubeconfig", config, *options]) == 78
    assert words in capsys.readouterr().err


def test_a_kubeconfig_that_is_not_yaml_is_told(grpo: Grpo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config").write_text("a: [b")
    assert grpo(["status", "--kubeconfig", str(tmp_path / "config")]) == 78
    assert str(tmp_path / "config") in capsys.readouterr().err


def test_without_the_kubernetes_client_the_remedy_is_told_and_the_rest_works() -> None:
    program = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "from types import SimpleNamespace\n"
        "from grpo_operator.cli import add_commands\n"
        "from grpo_worker.cli import main\n"
        "main.entry_points = lambda group: [SimpleNamespace(load=lambda: add_commands)]\n"
        "codes = [main.call(['status']), main.call(['submit', '--help'])]\n"
        "print(codes)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[78, 0]"
    assert "pip install 'grpo-operator[cli]'" in done.stderr


def test_help_needs_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from grpo_operator.cli import add_commands\n"
        "from grpo_worker.cli import main\n"
        "main.entry_points = lambda group: [SimpleNamespace(load=lambda: add_commands)]\n"
        "codes = [main.call([*command, '--help']) for command in ([], ['submit'], ['status'], ['logs'], ['stop'], ['resume'])]\n"
        "print(codes, sorted({'kubernetes', 'kopf', 'rich', 'aiohttp', 'urllib3', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0] []"


def answer(code: int, message: str, reason: str = "", **details: Any) -> bytes:
    return json.dumps(
        {"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": reason, "details": details}
    ).encode()


@pytest.mark.parametrize(
    ("code", "body", "kind", "words"),
    [
        (401, answer(401, "Unauthorized"), Refused, "does not accept these credentials"),
        (
            403,
            answer(403, 'User "eve" cannot get'),
            Refused,
            'not allowed to get GRPOJob small in namespace ml.*User "eve"',
        ),
        (404, b"404 page not found\n", ConfigError, "does not know GRPOJobs.*grpojobs.grpo.dev is not installed"),
        (404, answer(404, "not found", name="small", kind="grpojobs"), NotThere, "no GRPOJob small in namespace ml"),
        (404, answer(404, "no", name="ml", kind="namespaces"), UsageError, "there is no namespace ml"),
        (409, answer(409, "the object has been modified"), Unreachable, "changed at the same moment"),
        (422, answer(422, "spec.x: wrong"), UsageError, "refuses it.\n  spec.x: wrong"),
        (400, answer(400, 'unknown field "spec.y"'), UsageError, "of another version than this grpo"),
        (429, answer(429, "slow down"), Unreachable, "slow down"),
        (503, b"<html>", Unreachable, "503"),
        (418, b"", ConfigError, "HTTP 418"),
    ],
)
def test_each_refusal_is_one_message(code: int, body: bytes, kind: type[GRPOError], words: str) -> None:
    error = explain(code, body, ASKED)
    assert type(error) is kind
    with pytest.raises(kind, match=f"(?s){words}"):
        raise error
