"""`status` of a GRPOJob: what the operator writes and people read.

Invariant: these models are both what the operator serialises and where the CRD's status schema comes from, so the API server never
prunes what the operator wrote. All but the keys of lists is optional: a status may be partial. Nothing decides on `state`.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from grpo_worker.config.base import Role, Section, field

State = Literal[
    "Pending", "Starting", "Training", "Validating", "Saving", "Restarting", "Suspending", "Suspended", "Succeeded", "Failed",
    "Stopping",
]  # fmt: skip
ConditionType = Literal[
    "Suspended", "Scheduled", "Ready", "Progressing", "CheckpointCurrent", "Restarting", "Succeeded", "Failed"
]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]  # RFC 3339, UTC


class Part(Section):
    """A part of the status. Made with Python names, written with camelCase names; what a newer operator added is read past."""

    model_config = ConfigDict(
        **{**Section.model_config, "extra": "ignore", "validate_by_name": True, "validate_by_alias": True}
    )


class Condition(Part):
    """One thing that is true, false or unknown of the job."""

    type: ConditionType = field(..., "What it is about.")
    status: Literal["True", "False", "Unknown"] = field(..., "Whether it holds.")
    reason: str | None = field(None, "Why, as one CamelCase word.", max_length=1024)
    message: str | None = field(None, "Why, in words.", max_length=32768)
    last_transition_time: Time | None = field(None, "When status last changed.")
    observed_generation: int | None = field(None, "metadata.generation that it was judged by.")


class Budget(Part):
    """Restarts since the last progress."""

    counted: int | None = field(
        None, "Restarts of the set or the job that count against failurePolicy.maxRestarts.", ge=0
    )
    uncounted: int | None = field(None, "Restarts that do not, such as after a preemption.", ge=0)
    rollout_counted: int | None = field(None, "Replacements of rollout pods that count.", ge=0)
    step: int | None = field(
        None, "Step at which the budget was last reset; a step beyond it resets it again.", unit="steps", ge=0
    )
    not_before: Time | None = field(None, "Back-off: no start of coordinator and trainers before this time.")
    rollout_uncounted: int | None = field(None, "Replacements of rollout pods that do not count.", ge=0)
    rollout_not_before: Time | None = field(None, "Back-off: no start of a rollout pod before this time.")
    rollout_charged_time: Time | None = field(
        None, "When a replacement was last charged; pods made before that and lost later belong to the same failure."
    )


class Progress(Part):
    """What the coordinator last reported."""

    step: int | None = field(None, "Finished steps.", unit="steps", ge=0)
    total_steps: int | None = field(None, "Steps of the whole run.", unit="steps", ge=0)
    epoch: float | None = field(None, "Passes over the training prompts.", unit="epochs", ge=0)
    total_epochs: int | None = field(None, "Passes of the whole run.", unit="epochs", ge=0)
    reward: float | None = field(None, "Mean reward of the last step.")
    accuracy: float | None = field(None, "pass@1 of the last validation.")
    policy_version: int | None = field(None, "Version of the trainer's weights.", ge=0)
    rollout_version: int | None = field(None, "Lowest version in service among the engines.", ge=0)
    eta_seconds: float | None = field(None, "Estimated time to the end.", unit="seconds", ge=0, le=None)
    tokens_per_second: float | None = field(None, "Throughput of the last step.", unit="tokens", ge=0)
    last_progress_time: Time | None = field(None, "When the last step finished.")
    report_time: Time | None = field(None, "When the coordinator reported this.")


class KeptCheckpoint(Part):
    """A complete checkpoint."""

    step: int = field(..., "Its step.", unit="steps", ge=0)
    path: str | None = field(None, "Its directory.")
    time: Time | None = field(None, "When it was complete.")


class Checkpoints(Part):
    """Complete checkpoints."""

    last_step: int | None = field(None, "Step of the newest.", unit="steps", ge=0)
    path: str | None = field(None, "Directory of the newest.")
    time: Time | None = field(None, "When the newest was complete.")
    kept: list[KeptCheckpoint] | None = field(None, "Those on disk, at most checkpoint.keepLast.")


class RoleStatus(Part):
    """Pods of one role."""

    name: Role = field(..., "The role.")
    desired: int | None = field(None, "Pods that there should be.", unit="pods", ge=0)
    ready: int | None = field(None, "Pods that are ready.", unit="pods", ge=0)
    restarts: int | None = field(None, "Replacements in the job's life.", ge=0)


class RolloutScale(Part):
    """What the scale subresource reports."""

    replicas: int | None = field(None, "Rollout pods that exist.", unit="pods", ge=0)
    selector: str | None = field(None, "Label selector of the rollout pods.")


class Summary(Part):
    """Ready of desired pods, for the columns of `kubectl get`."""

    trainers: str | None = field(None, "Trainer pods, e.g. 1/1.")
    rollouts: str | None = field(None, "Rollout pods, e.g. 2/2.")


class Failure(Part):
    """One failed pod and what was done about it."""

    time: Time | None = field(None, "When it was seen.")
    pod: str | None = field(None, "Name of the pod.")
    pod_uid: str | None = field(None, "UID of the pod; a failure is acted on once.")
    role: Role | None = field(None, "Role of the pod.")
    exit_code: int | None = field(None, "Exit code; absent when the container never ran or nobody knows.")
    reason: str | None = field(None, "Why, as one CamelCase word.")
    message: str | None = field(None, "Why, in the words of the process, the kubelet or the scheduler.")
    action: str | None = field(None, "What followed: RestartPod, RestartSet, RestartJob, FailJob.")
    counted: bool | None = field(None, "Whether it counted against the budget.")


class ExcludedNode(Part):
    """A node that the job's pods keep away from."""

    name: str = field(..., "Name of the node.")
    until: Time | None = field(None, "When it may be used again.")


class GRPOJobStatus(Part):
    """Written by the operator; read by people, never by a decision but for attempt, budget, failures and stopRequestedTime."""

    state: State | None = field(None, "One word for people; conditions say it precisely.")
    message: str | None = field(None, "One line for people.", max_length=32768)
    observed_generation: int | None = field(None, "metadata.generation that this status is of.")
    conditions: list[Condition] | None = field(None, "Standing of the job, one entry a type.", map_key="type")
    attempt: int | None = field(
        None,
        "Generation of the coordinator and trainer pods; grows with each restart of the set and each resume.",
        ge=0,
    )
    rollout_attempt: int | None = field(
        None, "Rollout pods of an earlier attempt are left over from a restart of the whole job.", ge=0
    )
    complete_attempt: int | None = field(
        None,
        "The newest attempt whose coordinator and trainer pods all existed: one that is missing since was lost.",
        ge=0,
    )
    restarts: int | None = field(None, "Counted restarts of the set or the job in the job's life.", ge=0)
    uncounted_restarts: int | None = field(None, "Restarts that did not count, such as after preemptions.", ge=0)
    budget: Budget | None = field(None, "Restarts since the last progress.")
    progress: Progress | None = field(None, "What the coordinator last reported.")
    checkpoints: Checkpoints | None = field(None, "Complete checkpoints.")
    roles: list[RoleStatus] | None = field(None, "Pods by role.", map_key="name")
    rollout: RolloutScale | None = field(None, "For `kubectl scale` and autoscalers.")
    summary: Summary | None = field(None, "For the columns of `kubectl get`.")
    failures: list[Failure] | None = field(None, "The last ten, newest first.", max_length=10)
    excluded_nodes: list[ExcludedNode] | None = field(None, "Nodes with failed hardware.", map_key="name")
    start_time: Time | None = field(None, "When the operator first started the job.")
    completion_time: Time | None = field(None, "When the job succeeded or failed.")
    stop_requested_time: Time | None = field(
        None, "When the coordinator was asked to save and stop (suspend, deadline)."
    )
    suspended_seconds: float | None = field(
        None,
        "Time spent suspended since startTime; activeDeadlineSeconds leaves it out.",
        unit="seconds",
        ge=0,
        le=None,
    )

    def document(self) -> dict[str, Any]:
        """What is written to the API server."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)
