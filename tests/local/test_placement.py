"""Which processes a job has on a machine, and what each gets of it."""

import os
from typing import Any

import pytest

from grpo_worker.config import Spec, job_from_document
from grpo_worker.errors import ConfigError
from grpo_worker.local.placement import Machine, Process, place


def spec(**sections: Any) -> Spec:
    return job_from_document(
        {
            "apiVersion": "grpo.dev/v1alpha1",
            "kind": "GRPOJob",
            "metadata": {"name": "job"},
            "spec": {
                "model": {"path": "m"},
                "data": {"trainFiles": ["t.parquet"]},
                "reward": {"function": "gsm8k"},
                **sections,
            },
        }
    ).spec


def placed(cores: int = 8, gpus: tuple[str, ...] = (), **sections: Any) -> dict[str, Process]:
    return {process.name: process for process in place(spec(**sections), Machine(cores, gpus))}


def test_a_job_has_a_coordinator_trainer_nodes_and_engines() -> None:
    processes = placed(trainer={"nodes": 2}, rollout={"replicas": 3})
    assert {name: process.role for name, process in processes.items()} == {
        "coordinator": "coordinator", "trainer-0": "trainer", "trainer-1": "trainer",
        "rollout-0": "rollout", "rollout-1": "rollout", "rollout-2": "rollout",
    }  # fmt: skip
    assert [processes[f"trainer-{node}"].environment["NODE_RANK"] for node in (0, 1)] == ["0", "1"]
    assert [processes[f"rollout-{index}"].environment["GRPO_REPLICA_INDEX"] for index in range(3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("gpus", "per_node", "replicas", "parallel", "trainer", "rollouts"),
    [
        ("0", 1, 1, 1, "0", ["0"]),  # one GPU runs a whole job
        ("0,1", 1, 1, 1, "0", ["1"]),
        ("0,1,2,3", 2, 2, 1, "0,1", ["2", "3"]),
        ("0,1,2,3", 2, 1, 2, "0,1", ["2,3"]),
        ("0,1,2,3", 1, 2, 2, "0", ["1,2", "3,0"]),
        ("4,5", 2, 2, 1, "4,5", ["4", "5"]),  # too few: they share
        ("4", 2, 1, 2, "4", ["4"]),
        ("GPU-a,GPU-b", 1, 1, 1, "GPU-a", ["GPU-b"]),
    ],
)
def test_trainer_ranks_take_the_first_gpus_and_engines_the_next(
    gpus: str, per_node: int, replicas: int, parallel: int, trainer: str, rollouts: list[str]
) -> None:
    processes = placed(
        gpus=tuple(gpus.split(",")),
        trainer={"gpusPerNode": per_node},
        rollout={"replicas": replicas, "tensorParallelSize": parallel},
    )
    visible = {name: process.environment["CUDA_VISIBLE_DEVICES"] for name, process in processes.items()}
    assert visible["coordinator"] == ""
    assert visible["trainer-0"] == trainer
    assert [visible[f"rollout-{index}"] for index in range(replicas)] == rollouts


@pytest.mark.parametrize(
    ("ranks", "parallel", "rollouts"),
    [(1, 1, ["0"]), (4, 1, ["0", "1", "2", "3"]), (4, 2, ["0,1", "2,3"]), (4, 4, ["0,1,2,3"])],
)
def test_colocated_engines_have_the_ranks_gpus_in_the_ranks_order(
    ranks: int, parallel: int, rollouts: list[str]
) -> None:
    processes = placed(
        gpus=("0", "1", "2", "3", "4"),
        placement="Colocated",
        trainer={"gpusPerNode": ranks},
        rollout={"tensorParallelSize": parallel},
    )
    visible = {name: process.environment["CUDA_VISIBLE_DEVICES"] for name, process in processes.items()}
    assert visible.pop("trainer-0") == ",".join(map(str, range(ranks)))
    assert visible.pop("coordinator") == ""
    assert visible == {f"rollout-{index}": gpus for index, gpus in enumerate(rollouts)}


def test_colocated_ranks_do_not_share_a_gpu_with_each_other() -> None:
    with pytest.raises(ConfigError, match=r"a GPU for each trainer rank, 2 in all, and this machine has 1"):
        placed(gpus=("0",), placement="Colocated", trainer={"gpusPerNode": 2})
    placed(gpus=(), placement="Colocated", trainer={"gpusPerNode": 2})


def test_on_cpu_no_process_sees_a_gpu() -> None:
    processes = placed(gpus=("0", "1"), runtime={"device": "cpu"})
    assert {process.environment["CUDA_VISIBLE_DEVICES"] for process in processes.values()} == {""}


def test_a_gpu_that_is_asked_for_and_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda, but this machine has no GPU"):
        placed(runtime={"device": "cuda"})


def test_nccl_needs_gpus_of_their_own() -> None:
    rollout = {"replicas": 2, "tensorParallelSize": 2}
    asked: dict[str, Any] = {"network": {"weightSync": "nccl"}, "rollout": rollout}
    placed(gpus=("0", "1", "2", "3", "4"), **asked)
    placed(gpus=(), **asked)  # over Gloo
    with pytest.raises(
        ConfigError, match=r"network.weightSync: nccl needs .* 5 in all, and this machine has 4: they would share"
    ):
        placed(gpus=("0", "1", "2", "3"), **asked)


@pytest.mark.parametrize(
    ("cores", "ranks", "replicas", "staleness", "threads"),
    [
        (8, 1, 1, 0, 8),  # they take turns
        (8, 1, 1, 1, 4),  # they overlap
        (8, 2, 1, 0, 4),
        (8, 1, 4, 0, 2),
        (8, 2, 2, 1, 2),
        (2, 2, 4, 1, 1),
    ],
)
def test_cores_are_shared_by_what_runs_at_a_time(
    cores: int, ranks: int, replicas: int, staleness: int, threads: int
) -> None:
    processes = placed(cores, trainer={"gpusPerNode": ranks}, rollout={"replicas": replicas, "maxStaleness": staleness})
    assert processes["trainer-0"].environment["OMP_NUM_THREADS"] == str(threads)
    assert processes["rollout-0"].environment["OMP_NUM_THREADS"] == str(threads)
    assert processes["coordinator"].environment["OMP_NUM_THREADS"] == "1"


def test_threads_that_the_document_names_win() -> None:
    assert placed(runtime={"cpuThreads": 3})["rollout-0"].environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("visible", "gpus"), [("", ()), ("2, 3", ("2", "3")), ("GPU-x", ("GPU-x",))])
def test_the_machine_has_the_gpus_that_this_process_may_see(
    visible: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Machine.here() == Machine(len(os.sched_getaffinity(0)), gpus)
