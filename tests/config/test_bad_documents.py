"""What is wrong with a document is said with its path, the rule, and what to do; nothing is dropped or guessed."""

from pathlib import Path

import pytest

from grpo_worker.config import InvalidJob, load_job
from grpo_worker.config.rules import RULES
from grpo_worker.errors import ExitCode, UsageError

DOCUMENT = """\
apiVersion: grpo.dev/v1alpha1
kind: GRPOJob
metadata:
  name: job
spec:
  model:
    path: model
  data:
    trainFiles: [train.parquet]
"""

# One field of the sound document above is set to a YAML value: the path that is blamed, and words of the message.
BAD_FIELDS = [
    # unknown fields, with hints
    ("batchSize=4", "spec.batchSize", "unknown field"),
    ("data.train_batch_size=4", "spec.data.train_batch_size", "Did you mean trainBatchSize?"),
    ("data.trainbatchsize=4", "spec.data.trainbatchsize", "Did you mean trainBatchSize?"),
    ("data.trainFile=[a]", "spec.data.trainFile", "Did you mean trainFiles"),
    ("data.valFiles=[a]", "spec.data.valFiles", "unknown field"),
    ("actor.optim.learningRate=1e-6", "spec.actor.optim.learningRate", "Known here: lr,"),
    ("actor.ppo_micro_batch_size_per_gpu=1", "spec.actor.ppo_micro_batch_size_per_gpu", "ppoMicroBatchSizePerGPU"),
    ("actor.ppoMicroBatchSizePerGpu=1", "spec.actor.ppoMicroBatchSizePerGpu", "Did you mean ppoMicroBatchSizePerGPU?"),
    ("actor.useKlLoss=true", "spec.actor.useKlLoss", "Did you mean useKLLoss?"),
    ("rollout.tensorModelParallelSize=2", "spec.rollout.tensorModelParallelSize", "tensorParallelSize"),
    ("trainer.criticWarmup=1", "spec.trainer.criticWarmup", "unknown field"),
    ("trainer.total_epoch=1", "spec.trainer.total_epoch", "totalEpochs"),
    ("critic.lr=1e-5", "spec.critic", "unknown field"),
    ("runtime.env=[{nme: A}]", "spec.runtime.env[0].nme", "Did you mean name?"),
    # wrong types
    ("actor.optim.lr='1e-6'", "spec.actor.optim.lr", "number without quotes"),
    ("actor.optim.lr=fast", "spec.actor.optim.lr", "number"),
    ("actor.optim.betas=0.9", "spec.actor.optim.betas", "list"),
    ("actor.optim.betas=[0.9, '0.99']", "spec.actor.optim.betas[1]", "number"),
    ("actor.optim=1e-6", "spec.actor.optim", "mapping"),
    ("actor=", "spec.actor", "mapping"),
    ("data.trainBatchSize='8'", "spec.data.trainBatchSize", "whole number"),
    ("data.trainBatchSize=8.5", "spec.data.trainBatchSize", "integer"),
    ("data.trainBatchSize=1e3", "spec.data.trainBatchSize", "whole number"),
    ("data.trainBatchSize=true", "spec.data.trainBatchSize", "integer"),
    ("data.trainFiles=train.parquet", "spec.data.trainFiles", "Write a list"),
    ("data.trainFiles=[1]", "spec.data.trainFiles[0]", "string"),
    ("data.shuffle=1", "spec.data.shuffle", "true or false"),
    ("data.shuffle='true'", "spec.data.shuffle", "true or false"),
    ("model.path=7", "spec.model.path", "quote it"),
    ("model.revision=1e10", "spec.model.revision", "text"),
    ("reward.options=[strict]", "spec.reward.options", "mapping"),
    ("runtime.env={A: b}", "spec.runtime.env", "list"),
    ("runtime.env=[{name: A, value: 1}]", "spec.runtime.env[0].value", "text"),
    ("metadata.labels={a: 1}", "metadata.labels.a", "text"),
    # ranges and choices
    ("actor.optim.lr=-1e-6", "spec.actor.optim.lr", "greater than or equal to 0"),
    ("actor.optim.lr=.inf", "spec.actor.optim.lr", "finite"),
    ("actor.optim.lr=.nan", "spec.actor.optim.lr", "finite"),
    ("actor.optim.betas=[0.9]", "spec.actor.optim.betas", "at least 2"),
    ("actor.optim.clipGrad=0", "spec.actor.optim.clipGrad", "greater than 0"),
    ("actor.optim.lrScheduler=step", "spec.actor.optim.lrScheduler", "'constant', 'cosine' or 'linear'"),
    ("actor.ppoMiniBatchSize=0", "spec.actor.ppoMiniBatchSize", "greater than or equal to 1"),
    ("actor.clipRatioC=1.0", "spec.actor.clipRatioC", "greater than 1"),
    ("actor.clipRatioLow=-0.1", "spec.actor.clipRatioLow", "greater than or equal to 0"),
    ("actor.lossAggMode=mean", "spec.actor.lossAggMode", "token-mean"),
    ("actor.lossMode=ppo", "spec.actor.lossMode", "vanilla, gspo, cispo, or module:function"),
    ("actor.klLossType=k4", "spec.actor.klLossType", "low_var_kl"),
    ("algorithm.preset=PPO", "spec.algorithm.preset", "'GRPO'"),
    ("algorithm.preset=[DAPO]", "spec.algorithm.preset", "'DAPO'"),
    ("algorithm.advantageEstimator=gae", "spec.algorithm.advantageEstimator", "Expected: grpo, rloo"),
    ("algorithm.advantageEstimator=mine", "spec.algorithm.advantageEstimator", "pattern"),
    ("algorithm.gamma=1.5", "spec.algorithm.gamma", "less than or equal to 1"),
    ("algorithm.klCtrl.type=linear", "spec.algorithm.klCtrl.type", "'fixed' or 'adaptive'"),
    ("algorithm.filterGroups.maxNumGenBatches=0", "spec.algorithm.filterGroups.maxNumGenBatches", "equal to 1"),
    ("algorithm.rolloutCorrection.rolloutIs=both", "spec.algorithm.rolloutCorrection.rolloutIs", "'sequence'"),
    ("algorithm.rolloutCorrection.rolloutRs=[seq_max_k1]", "spec.algorithm.rolloutCorrection.rolloutRs[0]", "seq_max_k2"),
    ("data.truncation=cut", "spec.data.truncation", "'middle'"),
    ("data.dataset=rows", "spec.data.dataset", "pattern"),
    ("reward.function=accuracy", "spec.reward.function", "pattern"),
    ("reward.timeoutSeconds=0", "spec.reward.timeoutSeconds", "greater than 0"),
    ("reward.maxFailureRatio=2", "spec.reward.maxFailureRatio", "less than or equal to 1"),
    ("model.path=''", "spec.model.path", "at least 1 character"),
    ("model.dtype=float64", "spec.model.dtype", "'bfloat16'"),
    ("rollout.n=0", "spec.rollout.n", "equal to 1"),
    ("rollout.temperature=0", "spec.rollout.temperature", "greater than 0"),
    ("rollout.topP=1.01", "spec.rollout.topP", "less than or equal to 1"),
    ("rollout.gpuMemoryUtilization=0", "spec.rollout.gpuMemoryUtilization", "greater than 0"),
    ("rollout.gpuMemoryUtilization=1", "spec.rollout.gpuMemoryUtilization", "less than 1"),
    ("rollout.maxStaleness=-1", "spec.rollout.maxStaleness", "equal to 0"),
    ("trainer.loggers=[mlflow]", "spec.trainer.loggers[0]", "'tensorboard'"),
    ("trainer.totalEpochs=0", "spec.trainer.totalEpochs", "equal to 1"),
    ("checkpoint.keepLast=0", "spec.checkpoint.keepLast", "equal to 1"),
    ("network.coordinatorPort=70000", "spec.network.coordinatorPort", "65535"),
    ("network.weightSyncStreams=65", "spec.network.weightSyncStreams", "64"),
    ("runtime.env=[{name: 1A}]", "spec.runtime.env[0].name", "pattern"),
    ("runtime.env=[{name: A-B}]", "spec.runtime.env[0].name", "pattern"),
    ("activeDeadlineSeconds=0", "spec.activeDeadlineSeconds", "equal to 1"),
    ("metadata.name=Job_1", "metadata.name", "pattern"),
    (f"metadata.name={'a' * 53}", "metadata.name", "52"),
]  # fmt: skip

# Contradictions: all the overrides that make one, the field to change, words of the remedy.
CONTRADICTIONS = [
    (["algorithm.useKLInReward=true", "actor.useKLLoss=true"], "actor.useKLLoss", "count twice"),
    (["algorithm.useKLInReward=true", "algorithm.preset=GRPO"], "actor.useKLLoss", "preset GRPO turns useKLLoss on"),
    (["rollout.n=1"], "rollout.n", "at least 2"),
    (["rollout.n=1", "algorithm.advantageEstimator=rloo"], "rollout.n", "reinforce"),
    (["rollout.n=1", "algorithm.advantageEstimator=reinforcePlusPlusBaseline"], "rollout.n", "at least 2"),
    (["data.trainBatchSize=100", "actor.ppoMiniBatchSize=64"], "actor.ppoMiniBatchSize", "divisor"),
    (["data.trainBatchSize=8"], "actor.ppoMiniBatchSize", "does not divide"),
    (["rollout.minReplicas=2"], "rollout.minReplicas", "raise rollout.replicas"),
    (["data.trainFiles=[]"], "data.trainFiles", "exactly one"),
    (["data.dataset=rows:make"], "data.trainFiles", "exactly one"),
    (["algorithm.overlongBuffer.length=2000"], "algorithm.overlongBuffer.length", "longer than data.maxResponseLength"),
    (
        ["algorithm.rolloutCorrection.rolloutIsLowerThreshold=2.0"],
        "algorithm.rolloutCorrection.rolloutIsLowerThreshold",
        "not below",
    ),
    (["rollout.topK=0"], "rollout.topK", "no token"),
    (["actor.ppoMicroBatchSizePerGPU=1", "actor.ppoMaxTokenLenPerGPU=8"], "actor.ppoMicroBatchSizePerGPU", "Keep one"),
    (
        ["ref.logProbMicroBatchSizePerGPU=1", "ref.logProbMaxTokenLenPerGPU=8"],
        "ref.logProbMicroBatchSizePerGPU",
        "Keep one",
    ),
    (
        ["rollout.logProbMicroBatchSizePerGPU=1", "rollout.logProbMaxTokenLenPerGPU=8"],
        "rollout.logProbMicroBatchSizePerGPU",
        "Keep one",
    ),
    (["network.memberTimeoutSeconds=2"], "network.memberTimeoutSeconds", "three heartbeats"),
]

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
    (DOCUMENT + "\ttabs: 1\n", "line 10"),
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
