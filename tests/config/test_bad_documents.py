"""What is wrong with a document is said with its path, the rule, and what to do; nothing is dropped or guessed."""

from pathlib import Path

import pytest
from job_documents import BAD_FIELDS, CONTRADICTIONS, DOCUMENT, GOOD

from grpo_worker.config import InvalidJob, load_job
from grpo_worker.config.rules import RULES
from grpo_worker.errors import ExitCode, UsageError

# Whole texts that are no sound document: where, and words of the message.
BAD_TEXTS = [
    ("", "(document)", "is not a mapping"),
    ("- apiVersion: grpo.dev/v1alpha1\n", "(document)", "is not a mapping"),
    ("just text", "(document)", "is not a mapping"),
    ("{}", "apiVersion", "field required"),
    ("apiVersion: grpo.dev/v1\nkind: GRPOJob\nmetadata: {name: a}\nspec: {model: {path: m}}\n", "apiVersion", "v1alpha1"),
    ("apiVersion: grpo.dev/v1alpha1\nkind: Job\nmetadata: {name: a}\nspec: {model: {path: m}}\n", "kind", "GRPOJob"),
    ("apiVersion: grpo.dev/v1alpha1\nkind: GRPOJob\nmetadata: {}\nspec: {model: {path: m}}\n", "metadata.name", "Add it"),
    ("apiVersion: grpo.dev/v1alpha1\nkind: GRPOJob\nmetadata: {name: a}\nspec: {}\n", "spec.model", "field required"),
    ("apiVersion: grpo.dev/v1alpha1\nkind: GRPOJob\nmetadata: {name: a}\nspec: []\n", "spec", "mapping"),
    (DOCUMENT + "extra: 1\n", "extra", "Known here: apiVersion, kind, metadata, spec"),
    (DOCUMENT.replace("path: model", "path:"), "spec.model.path", "string"),
]  # fmt: skip

NOT_YAML = [
    (DOCUMENT + "  data: {}\n", "duplicate key 'data'"),
    (DOCUMENT + "kind: GRPOJob\n", "duplicate key 'kind'"),
    (DOCUMENT + "  rollout: {n: 2, topP: 1, n: 3}\n", "duplicate key 'n'"),
    (DOCUMENT + "---\n" + DOCUMENT, "another document"),
    (DOCUMENT + "  ? [a, b]\n  : 1\n", "a key has to be text"),
    (DOCUMENT + "  rollout: {n: 2\n", "line"),
    (DOCUMENT + "\ttabs: 1\n", "line 12"),
    (DOCUMENT + "  model2: !!python/object:os.system {}\n", "constructor"),
]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(DOCUMENT)
    return path


def test_the_document_that_the_tables_spoil_is_sound(document: Path) -> None:
    assert load_job(document).spec.model.path == "model"


@pytest.mark.parametrize(("override", "path", "words"), BAD_FIELDS, ids=[case[0] for case in BAD_FIELDS])
def test_a_bad_field_is_blamed_by_its_path(document: Path, override: str, path: str, words: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        load_job(document, [override])
    (issue,) = [issue for issue in caught.value.issues if issue.path == path]
    assert words in str(issue)
    assert caught.value.exit_code is ExitCode.USAGE
    assert str(document) in str(caught.value)


@pytest.mark.parametrize(("overrides", "path", "words"), CONTRADICTIONS, ids=[" ".join(c[0]) for c in CONTRADICTIONS])
def test_a_contradiction_names_the_field_to_change(document: Path, overrides: list[str], path: str, words: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        load_job(document, overrides)
    (issue,) = caught.value.issues
    assert issue.path == f"spec.{path}"
    assert words in str(issue)
    assert issue.remedy


@pytest.mark.parametrize("overrides", GOOD, ids=[" ".join(case) for case in GOOD])
def test_a_sound_document_is_accepted(document: Path, overrides: list[str]) -> None:
    load_job(document, overrides)


def test_each_rule_has_a_document_that_breaks_it() -> None:
    assert {rule.path for rule in RULES} == {path for _, path, _ in CONTRADICTIONS}


@pytest.mark.parametrize(("text", "path", "words"), BAD_TEXTS)
def test_a_text_that_is_no_job_says_where(tmp_path: Path, text: str, path: str, words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(InvalidJob) as caught:
        load_job(file)
    assert any(issue.path == path and words in str(issue) for issue in caught.value.issues), str(caught.value)


@pytest.mark.parametrize(("text", "words"), NOT_YAML)
def test_what_is_not_one_yaml_document_without_repeated_keys_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_job(file)
    assert str(file) in str(caught.value)


def test_all_errors_of_a_document_are_told_at_once(document: Path) -> None:
    with pytest.raises(InvalidJob) as caught:
        load_job(document, ["actor.optim.lr=fast", "rollout.n=0", "data.truncation=cut", "batch=1"])
    assert len(caught.value.issues) == 4
    assert "4 errors" in str(caught.value)


def test_a_file_that_is_not_there_is_told_with_its_neighbours(document: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file\. Did you mean job\.yaml\?"):
        load_job(document.with_name("jobs.yaml"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        load_job(file)
