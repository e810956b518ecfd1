"""From how a pod ended, or why it does not start, to a reason and a message that says what a person should change.

Invariant: pure. The process's own last word comes first, since it knows most; Kubernetes' words are never dropped, only added to.
"""

import re
from dataclasses import dataclass

from grpo_operator.facts import Ended, Pod, Refusal
from grpo_operator.labels import Role, member_name
from grpo_worker.config import Spec
from grpo_worker.exit_policy import killed

_LONGEST = 1500  # characters of a message
LOG_LINES = 3  # of a process that left no last word


@dataclass(frozen=True)
class Diagnosis:
    """`reason` is one CamelCase word; `message` one or two sentences."""

    reason: str
    message: str

    @property
    def sentence(self) -> str:
        """The message as one that another sentence may follow."""
        return _sentence(self.message)


def ended(pod: Pod, spec: Spec) -> Diagnosis:
    """Why a pod ended."""
    end = pod.ended
    name = member_name(pod.role, pod.index)
    if end is None:
        return gone(pod)
    if end.kube_reason == "OOMKilled":
        return Diagnosis("OOMKilled", f"{name} was killed for its memory. {_memory_advice(pod.role, spec)}")
    if pod.disruption:
        return Diagnosis(pod.disruption, _cut(f"{name} was disrupted ({pod.disruption}). {_words(end)}"))
    if end.kube_reason in ("Evicted", "NodeLost"):
        return Diagnosis(end.kube_reason, _cut(f"{name}: {_words(end) or end.kube_reason}"))
    said = end.last_word.message if end.last_word is not None else end.message
    text = said if end.last_word is not None else _last_lines(said)  # without a last word it is the log's end
    for pattern, reason, advice in _KNOWN:
        if re.search(pattern, said):
            known = end.last_word is not None and end.last_word.reason == reason  # it gives its own advice
            return Diagnosis(reason, _cut(f"{name}: {text}", "" if known else advice))
    if end.last_word is not None and end.last_word.reason not in ("UnexpectedError", "InternalError", "Completed"):
        return Diagnosis(end.last_word.reason, _cut(f"{name}: {text or end.last_word.reason}"))
    if end.exit_code is None:
        return Diagnosis(end.kube_reason, _cut(f"{name} never ran: {_words(end) or end.kube_reason}"))
    if killed(end.exit_code) and end.last_word is None:
        return Diagnosis("Killed", f"{name} was killed (exit code {end.exit_code}). {_killed_advice(pod, spec)}")
    if end.exit_code == 0:
        return Diagnosis("Ended", f"{name} ended while the job goes on.")
    reason = end.last_word.reason if end.last_word is not None else "UnexpectedError"
    hint = "" if text else f" Its log says why: kubectl logs {pod.name}"
    return Diagnosis(reason, _cut(f"{name} ended with exit code {end.exit_code}{': ' + text if text else '.'}{hint}"))


def gone(pod: Pod) -> Diagnosis:
    """A pod whose end nobody saw."""
    name = member_name(pod.role, pod.index)
    return Diagnosis("NodeLost", f"{name}: node {pod.node or 'unknown'} did not end the pod within its grace period.")


def deleted(role: Role, index: int) -> Diagnosis:
    return Diagnosis("PodDeleted", f"{member_name(role, index)} was deleted.")


def refused(refusal: Refusal) -> Diagnosis:
    """Why there is no such object, and so no pod."""
    what = member_name(*refusal.member) if refusal.member is not None else refusal.what
    words = f"{what} was refused by the API server: {refusal.message}"
    if refusal.invalid:
        return Diagnosis("InvalidPod", _cut(words, "Correct runtime.podTemplate, or the field that the message names."))
    if "exceeded quota" in refusal.message:
        advice = "Lower rollout.replicas or runtime.resources, or have the ResourceQuota of the namespace raised."
        return Diagnosis("QuotaExceeded", _cut(words, advice))
    return Diagnosis("PodRefused" if refusal.member is not None else "ObjectRefused", _cut(words))


def not_started(pod: Pod, spec: Spec) -> Diagnosis | None:
    """Why a pod does not run yet; None when it takes its normal course."""
    name = member_name(pod.role, pod.index)
    if pod.started or pod.ended is not None:
        return None
    if pod.unschedulable:
        return Diagnosis("Unschedulable", _cut(f"{name}: {pod.unschedulable}", _placement_advice(pod, spec)))
    if pod.waiting is None:
        return None
    reason, words = pod.waiting.reason, pod.waiting.message
    if reason == "InvalidImageName":
        return Diagnosis(reason, _cut(f"{name}: {words}", "Correct runtime.image."))
    if reason in ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError"):
        advice = "Check runtime.image and runtime.imagePullSecrets, and that the nodes reach the registry."
        return Diagnosis("ImagePullFailed", _cut(f"{name}: {words or reason}", advice))
    if reason == "CreateContainerConfigError":
        advice = "Make the Secret or ConfigMap that runtime.env or runtime.envFrom names, with that key."
        return Diagnosis(reason, _cut(f"{name}: {words or reason}", advice))
    if reason in ("PodInitializing", "ContainerCreating", ""):
        return None
    return Diagnosis(reason, _cut(f"{name}: {words or reason}"))


_KNOWN = (
    (
        r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|NCCL.{0,80}[Tt]ime(d )?-?out|[Tt]ime(d )?-?out.{0,80}NCCL",
        "NCCLTimeout",
        "A rank died or the network between trainers does not carry NCCL: see the other trainers' logs, set network.socketInterface, "
        "and NCCL_DEBUG=INFO in runtime.env; trainer.processGroupTimeoutSeconds is the limit.",
    ),
    (
        r"CUDA out of memory|out of memory",
        "OutOfMemory",
        "On a trainer lower actor.ppoMaxTokenLenPerGPU or turn on actor.fsdp.paramOffload and optimizerOffload; "
        "on an engine lower rollout.gpuMemoryUtilization.",
    ),
    (
        r"[Aa]ddress already in use|port \d+ is in use|\d+ is in use",
        "PortConflict",
        "Two processes of a pod want the same port: give each of the network.*Port fields its own.",
    ),
    (
        r"(?s)reward\.function.*(no result within|was not loaded within)",
        "RewardTimeout",
        "The reward function hangs or is slow: give its own calls a limit, or raise reward.timeoutSeconds.",
    ),
    (r"No space left on device", "NoSpace", "Enlarge the workspace volume, or lower checkpoint.keepLast."),
)


def _memory_advice(role: Role, spec: Spec) -> str:
    limit = spec.runtime.resources.of(role.value).limits.get("memory", "none")
    field = f"runtime.resources.{role.value}.limits.memory (now {limit})"
    shm = f"runtime.shmSize ({spec.runtime.shm_size}) counts against that limit"
    if role is Role.ROLLOUT:
        return (
            f"Raise {field}; {shm}; on CPU the engine takes rollout.cpuKVCacheGiB more, and on a GPU a lower "
            "rollout.gpuMemoryUtilization leaves less to swap."
        )
    if role is Role.TRAINER:
        return (
            f"Raise {field}; {shm}; or lower actor.ppoMaxTokenLenPerGPU, and turn off actor.fsdp.paramOffload and "
            "optimizerOffload, which keep state in that memory."
        )
    return f"Raise {field}; reward workers (reward.workers) run in this pod; {shm}."


def _killed_advice(pod: Pod, spec: Spec) -> str:
    return (
        "If nobody killed it, the node ran out of memory, or a process beside the main one was killed for it: "
        f"see `kubectl describe pod {pod.name}` and node {pod.node or 'unknown'}. {_memory_advice(pod.role, spec)}"
    )


def _placement_advice(pod: Pod, spec: Spec) -> str:
    if "nvidia.com/gpu" in pod.unschedulable:
        field = (
            f"trainer.gpusPerNode ({spec.trainer.gpus_per_node})"
            if pod.role is Role.TRAINER
            else f"rollout.tensorParallelSize ({spec.rollout.tensor_parallel_size}) or rollout.replicas ({spec.rollout.replicas})"
        )
        return f"The job asks for {spec.devices} GPUs in all: lower {field}, or add nodes."
    if "ersistentVolumeClaim" in pod.unschedulable or "ersistentvolumeclaim" in pod.unschedulable:
        return "Make the claim that runtime.workspace or runtime.volumes names."
    if "Insufficient" in pod.unschedulable:
        return f"Lower runtime.resources.{pod.role.value}.requests, or add nodes."
    if "taint" in pod.unschedulable or "selector" in pod.unschedulable or "affinity" in pod.unschedulable:
        return "See scheduling.nodeSelector and scheduling.tolerations; status.excludedNodes are left out on purpose."
    return ""


def _words(end: Ended) -> str:
    return end.message or (end.last_word.message if end.last_word is not None else "")


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LOG_LINES:])


def _cut(text: str, advice: str = "") -> str:
    """The advice stays whole; what a process said may be long."""
    text = " ".join(text.split())
    room = _LONGEST - len(advice)
    text = text if len(text) <= room else text[: room - 3] + "..."
    if advice and advice.split(":")[0] not in text:
        return f"{_sentence(text)} {advice}"
    return text


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
