"""`spec.trainer`, `checkpoint`, `failurePolicy`, `network`: how the run is laid out, kept and restarted."""

from typing import Annotated, Literal

from pydantic import Field

from grpo_worker.config.base import LARGEST_SEED, Role, Section, field

ExitCode = Annotated[int, Field(ge=1, le=255)]
Word = Annotated[str, Field(min_length=1, max_length=128)]


class Trainer(Section):
    """Ranks, length and logging of the run."""

    gpus_per_node: int = field(
        1,
        "Trainer processes of a node, one GPU each (on CPU: processes).",
        verl="trainer.n_gpus_per_node",
        ge=1,
        le=128,
    )
    nodes: int = field(1, "Trainer nodes.", verl="trainer.nnodes", ge=1, le=1000)
    total_epochs: int = field(15, "Passes over the training prompts.", verl="trainer.total_epochs", unit="epochs", ge=1)
    total_steps: int | None = field(
        None,
        "Stop after so many steps, when that comes before totalEpochs.",
        verl="trainer.total_training_steps",
        unit="steps",
        ge=1,
    )
    test_freq: int = field(
        5, "Validate after every so many steps; 0 is never.", verl="trainer.test_freq", unit="steps", ge=0
    )
    val_before_train: bool = field(True, "Validate the starting model.", verl="trainer.val_before_train")
    loggers: list[Literal["console", "jsonl", "tensorboard", "wandb"]] = field(
        lambda: ["console", "jsonl"], "Where metrics go.", verl="trainer.logger", max_length=4
    )
    project_name: str = field("grpo", "Project in wandb.", verl="trainer.project_name", min_length=1)
    experiment_name: str | None = field(
        None,
        "Run's name in wandb and TensorBoard; default metadata.name.",
        verl="trainer.experiment_name",
        min_length=1,
    )
    rollout_dump: bool = field(
        False,
        "Keep every trajectory, as rollouts/train-STEP.parquet in the run's directory.",
        verl="trainer.rollout_data_dir",
    )
    log_samples: int = field(
        8,
        "Completions kept at each validation, for the report.",
        verl="trainer.log_val_generations",
        unit="completions",
        ge=0,
    )
    seed: int = field(1, "Seed of the trainer.", ge=0, le=LARGEST_SEED)
    process_group_timeout_seconds: float = field(600.0, "Limit of one collective between ranks.", unit="seconds", gt=0)


class Checkpoint(Section):
    """Where and how often state is saved."""

    path: str = field(
        "checkpoints",
        "Directory, shared by coordinator and trainer; a relative path is below the run's directory.",
        verl="trainer.default_local_dir",
        min_length=1,
    )
    save_freq: int = field(
        20,
        "Save after every so many steps, and at the end; 0 saves at the end alone.",
        verl="trainer.save_freq",
        unit="steps",
        ge=0,
    )
    keep_last: int = field(3, "Complete checkpoints that are kept.", verl="trainer.max_actor_ckpt_to_keep", ge=1)
    resume: str = field(
        "auto",
        "auto goes on from the newest whole checkpoint; never starts anew; or the directory of one checkpoint.",
        verl="trainer.resume_mode",
        min_length=1,
    )


class FailureRule(Section):
    """Says what follows when a pod ends badly. An empty list of a criterion matches everything; all criteria have to match."""

    name: str | None = field(None, "Name in messages and in the status.", min_length=1, max_length=63)
    roles: list[Role] = field(list, "Roles of the pod.", max_length=3)
    exit_codes: list[ExitCode] = field(
        list, "Exit codes of the container, e.g. 137; operations.md lists ours.", max_length=32
    )
    pod_conditions: list[Word] = field(
        list,
        "Types of pod conditions that are True, e.g. DisruptionTarget (preempted, evicted, drained).",
        max_length=16,
    )
    reasons: list[Word] = field(
        list, "Reasons: of the process's last word, or of Kubernetes, e.g. OOMKilled, Evicted, NodeLost.", max_length=32
    )
    action: Literal["RestartPod", "RestartSet", "RestartJob", "FailJob"] = field(
        ...,
        "RestartPod replaces a rollout pod alone; RestartSet restarts coordinator and trainers from the last checkpoint and "
        "keeps the engines; RestartJob restarts all pods; FailJob ends the job.",
    )
    count: bool = field(True, "Whether a restart counts against maxRestarts.")


class FailurePolicy(Section):
    """What a supervisor does when a process dies."""

    max_restarts: int = field(
        3, "Restarts of a role without progress between them before the job fails.", ge=0, le=1000
    )
    backoff_seconds: float = field(
        2.0, "Wait before the first restart; doubles with each, up to 60.", unit="seconds", ge=0, le=60
    )
    stall_timeout_seconds: float = field(
        3600.0, "A job without a finished step for so long is restarted.", unit="seconds", gt=0
    )
    startup_timeout_seconds: float = field(1800.0, "Limit until trainer and engines are ready.", unit="seconds", gt=0)
    rules: list[FailureRule] = field(
        list,
        "What follows which failure; the first rule that matches wins, before the defaults in operations.md.",
        cluster=True,
        max_length=32,
    )


class RDMA(Section):
    """RDMA devices of trainer and rollout pods."""

    resource: str = field(
        ...,
        "Extended resource of the device plug-in, e.g. rdma/hca_shared_devices_a.",
        min_length=1,
        max_length=253,
        pattern=r"^[A-Za-z0-9.-]+/[A-Za-z0-9_.-]+$",
    )
    count: int = field(1, "Devices of each pod.", unit="devices", ge=1, le=128)


Transport = Literal["auto", "store", "nccl", "ipc"]


class Network(Section):
    """Ports and limits between the processes."""

    coordinator_port: int = field(
        0, "Port of the coordinator (status, metrics); 0 is any free one under `grpo run`.", ge=0, le=65535
    )
    trainer_port: int = field(0, "Port of trainer rank 0.", ge=0, le=65535)
    weight_sync_port: int = field(0, "Port of the weight snapshot, on trainer rank 0.", ge=0, le=65535)
    rollout_port: int = field(0, "Port of a rollout server; replica i takes port + i under `grpo run`.", ge=0, le=65535)
    rendezvous_port: int = field(
        0, "Port of the trainer ranks' rendezvous, on node 0.", verl="MASTER_PORT", ge=0, le=65535
    )
    heartbeat_seconds: float = field(1.0, "Time between two heartbeats of a process.", unit="seconds", ge=0.01)
    member_timeout_seconds: float = field(
        30.0, "A process without a heartbeat for so long is lost.", unit="seconds", gt=0
    )
    weight_sync_timeout_seconds: float = field(300.0, "Limit of one weight sync to one engine.", unit="seconds", gt=0)
    weight_sync: Transport = field(
        "auto",
        "How weights go to the engines. store: each pulls them over TCP through host memory. nccl: the trainer broadcasts them to all "
        "engines at once, device to device (Gloo where there are no GPUs). ipc: each trainer rank hands them to the engine on its own device, "
        "with placement Colocated. By nccl and ipc an engine that joins, and a version that fails, go by store. "
        "auto: ipc with placement Colocated; else nccl once each process is seen to have GPUs of its own, and store where it has not.",
    )
    weight_sync_streams: int = field(4, "TCP streams of one pull.", ge=1, le=64)
    request_timeout_seconds: float = field(3600.0, "Limit of one operation of the trainer.", unit="seconds", gt=0)
    socket_interface: str | None = field(
        None,
        "Network interface of NCCL and Gloo (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), e.g. eth0; default their own choice.",
        min_length=1,
        max_length=64,
    )
    rdma: RDMA | None = field(
        None, "RDMA devices that trainer and rollout pods ask for; adds the IPC_LOCK capability.", cluster=True
    )
