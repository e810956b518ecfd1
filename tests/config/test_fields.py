"""Every field that is promised exists, and every field that is accepted has an effect."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from grpo_worker.config import InvalidJob, Spec, job_from_document

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "worker" / "grpo_worker" / "config"
SOURCES = [ROOT / "worker" / "grpo_worker", ROOT / "operator" / "grpo_operator"]

# The parameters of the design, by hand: verl's names of the left column of docs/design.md, section 2, as paths of the document.
PROMISED = [
    "algorithm.advantageEstimator",
    "algorithm.normAdvByStd",
    "algorithm.useKLInReward",
    "algorithm.klPenalty",
    "algorithm.klCtrl",
    "algorithm.filterGroups",
    "algorithm.rolloutCorrection",
    "algorithm.preset",
    "data.trainFiles",
    "data.validationFiles",
    "data.trainBatchSize",
    "data.maxPromptLength",
    "data.maxResponseLength",
    "data.filterOverlongPrompts",
    "data.truncation",
    "model.path",
    "model.revision",
    "model.useRemovePadding",
    "model.enableGradientCheckpointing",
    "actor.optim.lr",
    "actor.optim.lrWarmupSteps",
    "actor.optim.weightDecay",
    "actor.optim.betas",
    "actor.optim.clipGrad",
    "actor.ppoMiniBatchSize",
    "actor.ppoMicroBatchSizePerGPU",
    "actor.ppoMaxTokenLenPerGPU",
    "actor.clipRatioLow",
    "actor.clipRatioHigh",
    "actor.clipRatioC",
    "actor.lossAggMode",
    "actor.lossMode",
    "actor.useKLLoss",
    "actor.klLossCoef",
    "actor.klLossType",
    "actor.entropyCoeff",
    "actor.fsdp.shardSize",
    "actor.fsdp.paramOffload",
    "actor.fsdp.optimizerOffload",
    "ref.fsdp.paramOffload",
    "ref.logProbMicroBatchSizePerGPU",
    "rollout.logProbMicroBatchSizePerGPU",
    "rollout.n",
    "rollout.temperature",
    "rollout.topP",
    "rollout.topK",
    "rollout.tensorParallelSize",
    "rollout.gpuMemoryUtilization",
    "trainer.gpusPerNode",
    "trainer.nodes",
    "checkpoint.saveFreq",
    "trainer.testFreq",
    "trainer.totalEpochs",
    "trainer.loggers",
    "trainer.projectName",
    "trainer.experimentName",
    "rollout.replicas",
    "rollout.minReplicas",
    "rollout.maxStaleness",
    "reward.function",
    "reward.timeoutSeconds",
    "checkpoint.path",
    "checkpoint.keepLast",
    "checkpoint.resume",
    "failurePolicy",
    "activeDeadlineSeconds",
    "suspend",
    "ttlSecondsAfterFinished",
    "rollout.maxReplicas",
    "runtime.image",
    "runtime.env",
    "runtime.podTemplate",
    "runtime.shmSize",
    "network.rdma",
    "scheduling",
]

DEFAULTS = {
    "algorithm.advantageEstimator": "grpo", "algorithm.normAdvByStd": True, "algorithm.useKLInReward": False,
    "algorithm.filterGroups.enable": False, "algorithm.rolloutCorrection.rolloutIs": "token",
    "algorithm.rolloutCorrection.rolloutIsThreshold": 2.0, "algorithm.preset": None, "data.trainBatchSize": 1024,
    "data.maxPromptLength": 512, "data.maxResponseLength": 1024, "data.filterOverlongPrompts": True, "data.truncation": "error",
    "model.useRemovePadding": True, "model.enableGradientCheckpointing": True, "actor.optim.lr": 1e-6, "actor.ppoMiniBatchSize": 256,
    "actor.ppoMicroBatchSizePerGPU": None, "actor.clipRatioLow": 0.2, "actor.clipRatioHigh": 0.2, "actor.clipRatioC": 3.0,
    "actor.lossAggMode": "token-mean", "actor.lossMode": "vanilla", "actor.useKLLoss": False, "actor.klLossCoef": 0.001,
    "actor.klLossType": "low_var_kl", "actor.entropyCoeff": 0.0, "actor.fsdp.paramOffload": False, "actor.fsdp.optimizerOffload": False,
    "actor.fsdp.shardSize": -1, "ref.fsdp.paramOffload": False, "rollout.n": 5, "rollout.temperature": 1.0, "rollout.topP": 1.0, "rollout.topK": -1,
    "rollout.tensorParallelSize": 1, "rollout.gpuMemoryUtilization": 0.6, "trainer.gpusPerNode": 1, "trainer.nodes": 1,
    "checkpoint.saveFreq": 20, "trainer.testFreq": 5, "trainer.totalEpochs": 15, "trainer.loggers": ["console", "jsonl"],
}  # fmt: skip

# Where a section is passed on under another name: section -> the names that its readers give it.
READ_AS = {
    "overlong_buffer": {"options"},
    "rollout_correction": {"options"},
    "model": {"section"},
    "kl_ctrl": {"kl"},
    "filter_groups": {"dynamic"},
    "optim": {"options"},
    "fsdp": {"offload"},
    "ref": {"limits"},
    "rollout": {"limits"},
    "validation": {"sampling", "sampled"},
    "env": {"variable"},
    "spec": {"_spec"},
    "rules": {"rule"},
    "volumes": {"volume", "extra"},
    "parts": {"part"},
    "chat_template": {"template"},
    "scheduling": {"wanted"},
}
# Sections that a reader passes on whole, as Kubernetes spells them: what counts is that the section itself is read.
PASSED_ON = ("runtime.env", "runtime.envFrom", "runtime.resources", "runtime.podTemplate", "scheduling.tolerations")
# presets fill other fields before anybody reads them; maxReplicas bounds replicas at the door
APPLIED_BY_THE_CONFIGURATION = {"algorithm.preset", "rollout.maxReplicas"}


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section of an annotation: `Section`, `Section | None`, `list[Section]`."""
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def leaves(model: type[BaseModel], path: tuple[str, ...] = (), section: str = "spec") -> Iterator[tuple[str, str, str]]:
    """(path in the document, Python name of its section, Python name) of each field that holds a value."""
    for name, info in model.model_fields.items():
        here = (*path, str(info.alias))
        if (nested := sections_of(info.annotation)) and ".".join(here) not in PASSED_ON:
            yield from leaves(nested[0], here, name)
        else:
            yield ".".join(here), section, name


LEAVES = list(leaves(Spec))


def reads() -> set[tuple[str, str]]:
    """(owner, attribute) of each `owner.attribute` in the product code that gets the document.

    Of the document's own package `self.attribute` alone counts: what a section derives from its fields, for readers elsewhere.
    """
    found = set()
    for source in (path for folder in SOURCES for path in folder.rglob("*.py")):
        text = source.read_text()
        own = source.is_relative_to(CONFIGURATION)
        if not own and not ("grpo_worker.config" in text or "spec" in text or "grpo_operator" in text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                if not own or name == "self":
                    found.add((name, node.attr))
    return found


@pytest.fixture(scope="module")
def read_attributes() -> set[tuple[str, str]]:
    return reads()


def resolve(path: str) -> Any:
    job = job_from_document(
        {
            "apiVersion": "grpo.dev/v1alpha1",
            "kind": "GRPOJob",
            "metadata": {"name": "job"},
            "spec": {"model": {"path": "m"}, "data": {"trainFiles": ["t.parquet"]}, "reward": {"function": "gsm8k"}},
        }
    )
    node: Any = job.model_dump(by_alias=True)["spec"]
    for key in path.split("."):
        node = node[key]
    return node


@pytest.mark.parametrize("path", PROMISED)
def test_a_promised_parameter_is_a_field(path: str) -> None:
    resolve(path)


@pytest.mark.parametrize("path", DEFAULTS)
def test_a_default_is_the_one_of_the_design(path: str) -> None:
    assert resolve(path) == DEFAULTS[path]


@pytest.mark.parametrize("setting", [{"algorithm": {"advantageEstimator": "gae"}}, {"trainer": {"criticWarmup": 0}}])
def test_what_needs_a_critic_is_refused(setting: dict[str, Any]) -> None:
    raw = {
        "apiVersion": "grpo.dev/v1alpha1",
        "kind": "GRPOJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"path": "m"},
            "data": {"trainFiles": ["t.parquet"]},
            "reward": {"function": "gsm8k"},
            **setting,
        },
    }
    with pytest.raises(InvalidJob):
        job_from_document(raw)


@pytest.mark.parametrize(
    ("path", "section", "name"),
    [leaf for leaf in LEAVES if leaf[0] not in APPLIED_BY_THE_CONFIGURATION],
    ids=lambda part: part,
)
def test_a_field_that_is_accepted_has_an_effect(
    path: str, section: str, name: str, read_attributes: set[tuple[str, str]]
) -> None:
    owners = {section, "self"} | READ_AS.get(section, set())
    assert any((owner, name) in read_attributes for owner in owners), f"no code reads {section}.{name} ({path})"


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, _, name in LEAVES])
def test_a_name_in_camel_case_spells_its_python_name(path: str, name: str) -> None:
    last = path.rpartition(".")[2]
    assert last.lower() == name.replace("_", "")
    assert re.fullmatch(r"[a-z][A-Za-z]*", last)
