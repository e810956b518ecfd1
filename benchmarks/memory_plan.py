"""The memory plan of examples/qwen3-8b-gsm8k-one-node.yaml on GPUs of 80 GB: arithmetic, nothing is run.

    python -m benchmarks.memory_plan

Rows are phases, cells GiB of each device: on one node of 8 GPUs, and on two, which share one copy of the model or have one each.
"""

from pathlib import Path

from grpo_worker.config import load_job
from grpo_worker.memory_plan import GIB, ModelShape, plan_memory

EXAMPLE = Path(__file__).parents[1] / "examples" / "qwen3-8b-gsm8k-one-node.yaml"
DEVICE_BYTES = int(79.1 * GIB)  # an H100's 80 GB, as its driver says
QWEN3_8B = ModelShape(8_190_735_360, 36, 4096, 12288, 4096, 1024, 151_936, 2)
LAYOUTS = {
    "8 GPUs": [],
    "2 x 8, one copy": ["trainer.nodes=2"],
    "2 x 8, a copy a node": ["trainer.nodes=2", "actor.fsdp.shardSize=8"],
}


def main() -> None:
    print("| layout | generating | updating | handing over | engine's KV cache | moments leave the device |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, overrides in LAYOUTS.items():
        plan = plan_memory(load_job(EXAMPLE, overrides).spec, QWEN3_8B, DEVICE_BYTES)
        plan.check()
        cells = [f"{phase.total / GIB:.1f}" for phase in plan.phases]
        print(
            f"| {name} | {' | '.join(cells)} | {plan.kv_cache_bytes / GIB:.1f} | {'yes' if plan.moments_leave else 'no'} |"
        )


if __name__ == "__main__":
    main()
