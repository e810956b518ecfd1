"""GRPO throughput: where does the time go?"""

from charts.dashboards.panels import JOB, OF_JOB, Dashboard, Panel, quantiles

C, R, T = "grpo_coordinator", "grpo_rollout", "grpo_trainer"
BY_JOB = "sum by (namespace, grpojob)"
SAVES = ', part="save_checkpoint"'


def rate(metric: str, more: str = "") -> str:
    return f"rate({metric}{{{JOB}{more}}}[$__rate_interval])"


DASHBOARD = Dashboard(
    uid="grpo-throughput",
    title="GRPO throughput",
    description="Where does the time go? Parts of a step, tokens, and what stands still.",
    jobs=f"{C}_step",
    questions={
        "How fast is it?": [
            Panel(
                "Time of a step",
                "Median and 99th percentile of the time of a step.",
                "Steady. Validation and checkpoints make some steps longer.",
                quantiles(f"{C}_step_seconds", JOB),
                unit="s",
            ),
            Panel(
                "Tokens a second and GPU",
                "Prompt and response tokens of the step, by its time and the job's GPUs.",
                "Compare it with docs/benchmarks.md for your model's size.",
                {OF_JOB: f"{C}_tokens_per_second{{{JOB}}}"},
            ),
            Panel(
                "Trained",
                "Prompts and tokens a second that were trained on.",
                "Steady.",
                {
                    f"{OF_JOB} prompts": rate(f"{C}_trained_prompts_total"),
                    f"{OF_JOB} tokens": rate(f"{C}_trained_tokens_total"),
                },
            ),
        ],
        "Where does the time go?": [
            Panel(
                "Step by part",
                "Share of the time of the parts of a step, one after the other.",
                "Generation and update take most of it. With maxStaleness above 0, gen is only what the trainer waits for samples.",
                {
                    f"{OF_JOB} {{{{part}}}}": f"{rate(f'{C}_step_part_seconds_total')} / ignoring (part) group_left ()"
                    f" {rate(f'{C}_step_seconds_sum')}"
                },
                unit="percentunit",
                kind="stacked",
                width=16,
                height=9,
            ),
            Panel(
                "What stands still",
                "Share of the time in which the trainer, and the engines in the mean, have nothing to do.",
                "Without overlap (maxStaleness 0) they work in turn, so both shares make about 1. With overlap the smaller one is near 0.",
                {
                    f"{OF_JOB} trainer": f"1 - clamp_max({BY_JOB} ({rate(f'{T}_operation_seconds_total')}), 1)",
                    f"{OF_JOB} engines": f"1 - clamp_max(avg by (namespace, grpojob) ({rate(f'{R}_busy_seconds_total')}), 1)",
                },
                unit="percentunit",
                height=9,
            ),
            Panel(
                "Trainer by operation",
                "Share of the time in each of the trainer's operations.",
                "Update takes most of it.",
                {f"{OF_JOB} {{{{operation}}}}": rate(f"{T}_operation_seconds_total")},
                unit="percentunit",
                kind="stacked",
            ),
            Panel(
                "Checkpoint stall",
                "Share of the time in which training waits for a checkpoint.",
                "Under a percent: saves go on beside the training.",
                {
                    OF_JOB: f"{rate(f'{C}_step_part_seconds_total', SAVES)} / ignoring (part) {rate(f'{C}_step_seconds_sum')}"
                },
                unit="percentunit",
                empty="No checkpoint was saved in a step yet.",
            ),
            Panel(
                "Start",
                "Seconds of the last start, by part.",
                "Most of it is the model's load, compilation, and the first step.",
                {f"{OF_JOB} {{{{part}}}}": f'{C}_startup_seconds{{{JOB}, part!="total"}}'},
                unit="s",
                kind="stacked",
            ),
        ],
        "How well does the trainer use its GPUs?": [
            Panel(
                "MFU",
                "Model FLOPs of the update over what the devices can do.",
                "0.3 to 0.4 without recomputation on H100 is good.",
                {OF_JOB: f"{C}_mfu_ratio{{{JOB}}}"},
                unit="percentunit",
                empty="Absent on CPU, for devices whose peak is not known, for float32 and for mixtures of experts.",
            ),
            Panel(
                "Packing",
                "Real tokens of the token budget of micro-batches, and the busiest rank's work over the mean.",
                "Close to 1, both.",
                {
                    f"{OF_JOB} efficiency": f"{C}_packing_efficiency_ratio{{{JOB}}}",
                    f"{OF_JOB} imbalance": f"{C}_rank_imbalance_ratio{{{JOB}}}",
                },
            ),
            Panel(
                "Trainer memory",
                "Peak device memory of the last step, worst rank.",
                "Below the device's memory with some room.",
                {OF_JOB: f"{T}_max_memory_allocated_bytes{{{JOB}}}"},
                unit="bytes",
                empty="Absent on CPU.",
            ),
            Panel(
                "Memory of colocated devices",
                "Planned and measured memory of each phase.",
                "Measured stays below planned.",
                {f"{OF_JOB} {{{{phase}}}} {{{{number}}}}": f"{C}_device_memory_bytes{{{JOB}}}"},
                unit="bytes",
                empty="Only with placement: Colocated on GPUs.",
            ),
            Panel(
                "Trained tokens, rank 0's count",
                "Tokens a second that went through updates, without generation.",
                "As fast as the update allows.",
                {OF_JOB: rate(f"{T}_tokens_total")},
            ),
        ],
        "How well do the engines use theirs?": [
            Panel(
                "Generated tokens",
                "Sampled tokens a second, by all engines, and those in delivered samples.",
                "The same. What is missing was aborted and is generated again.",
                {
                    f"{OF_JOB} sampled": f"{BY_JOB} ({rate('vllm:generation_tokens_total')})",
                    f"{OF_JOB} delivered": f"{BY_JOB} ({rate(f'{R}_generated_tokens_total')})",
                    f"{OF_JOB} prompts": f"{BY_JOB} ({rate('vllm:prompt_tokens_total')})",
                },
            ),
            Panel(
                "Queue",
                "Sequences in the engines' batches, and waiting for room in them.",
                "A long queue is normal at the start of a step; a queue that never empties asks for more engines.",
                {
                    f"{OF_JOB} running": f"{BY_JOB} (vllm:num_requests_running{{{JOB}}})",
                    f"{OF_JOB} waiting": f"{BY_JOB} (vllm:num_requests_waiting{{{JOB}}})",
                },
            ),
            Panel(
                "KV cache",
                "Share of the KV cache that is used, fullest engine, and preemptions a second.",
                "Preemptions stay rare: each costs a sequence's prefill again. Else raise gpuMemoryUtilization or lower maxNumSeqs.",
                {
                    f"{OF_JOB} used": f"max by (namespace, grpojob) (vllm:kv_cache_usage_perc{{{JOB}}})",
                    f"{OF_JOB} preemptions": f"{BY_JOB} ({rate('vllm:num_preemptions_total')})",
                },
                unit="percentunit",
            ),
            Panel(
                "Prefix cache",
                "Share of prompt tokens that the prefix cache had.",
                "About (n - 1) / n: the samples of a group share their prompt.",
                {
                    OF_JOB: f"{BY_JOB} ({rate('vllm:prefix_cache_hits_total')}) / {BY_JOB} ({rate('vllm:prefix_cache_queries_total')})"
                },
                unit="percentunit",
                empty="rollout.enablePrefixCaching is off, or nothing is generated now.",
            ),
            Panel(
                "Engines",
                "Engines in service, with the newest weights, and the number with which a run starts.",
                "In service stays at or above the minimum, but in the moment of a weight sync.",
                {
                    f"{OF_JOB} in service": f"{C}_rollouts_in_service{{{JOB}}}",
                    f"{OF_JOB} minimum": f"{C}_rollouts_min{{{JOB}}}",
                    f"{OF_JOB} {{{{kind}}}} {{{{state}}}}": f"{C}_members{{{JOB}}}",
                },
                alerts=["GRPOEnginesBelowMinimum"],
            ),
        ],
        "How do weights get to the engines?": [
            Panel(
                "Weight sync by part",
                "Seconds of the last version: gathered in the trainer (publish), pulled, applied, and generation stood still (pause).",
                "Well under a tenth of a step.",
                {f"{OF_JOB} {{{{part}}}}": f"{C}_weight_sync_seconds{{{JOB}}}"},
                unit="s",
                alerts=["GRPOWeightSyncSlow"],
            ),
            Panel(
                "Bytes",
                "Of the last version over all engines; and a second into each engine.",
                "The model's size times the engines.",
                {
                    f"{OF_JOB} version": f"{C}_weight_sync_bytes{{{JOB}}}",
                    f"{OF_JOB} a second": f"{BY_JOB} ({rate(f'{R}_weight_sync_bytes_total')})",
                },
                unit="bytes",
            ),
            Panel(
                "Syncs of an engine",
                "Median and 99th percentile of an engine's sync from begin to end.",
                "Steady.",
                quantiles(f"{R}_weight_sync_seconds", f'{JOB}, part="total"'),
                unit="s",
            ),
            Panel(
                "Versions",
                "Newest published version, and the oldest that an engine serves.",
                "They move together.",
                {
                    f"{OF_JOB} published": f"{C}_policy_version{{{JOB}}}",
                    f"{OF_JOB} served": f"min by (namespace, grpojob) ({R}_weight_version{{{JOB}}})",
                },
            ),
            Panel(
                "Failed syncs",
                "Syncs a minute that failed, by reason.",
                "None.",
                {
                    f"{OF_JOB} {{{{reason}}}}": f"60 * sum by (namespace, grpojob, reason) ({rate(f'{R}_weight_sync_failures_total')})"
                },
                empty="No sync has failed.",
                alerts=["GRPOWeightSyncFailing"],
            ),
        ],
        "Does anything fill up?": [
            Panel(
                "Free disk",
                "Share of the run's and the checkpoints' file systems that is free.",
                "Room for two checkpoints at least.",
                {f"{OF_JOB} {{{{directory}}}}": f"{C}_disk_free_bytes{{{JOB}}} / {C}_disk_size_bytes{{{JOB}}}"},
                unit="percentunit",
                warn_below=0.1,
                alerts=["GRPODiskFilling"],
            ),
            Panel(
                "Process memory",
                "Resident memory of each process.",
                "Steady after the first steps.",
                {f"{OF_JOB} {{{{role}}}} {{{{index}}}}": f'process_resident_memory_bytes{{{JOB}, role!=""}}'},
                unit="bytes",
                empty="The pods are not scraped.",
            ),
            Panel(
                "Checkpoint",
                "Step of the newest complete checkpoint beside the step of the run; and its age.",
                "At most checkpoint.saveFreq behind.",
                {
                    f"{OF_JOB} step": f"{C}_step{{{JOB}}}",
                    f"{OF_JOB} saved": f"{C}_checkpoint_step{{{JOB}}}",
                    f"{OF_JOB} age, minutes": f"(time() - {C}_checkpoint_timestamp_seconds{{{JOB}}}) / 60",
                },
                alerts=["GRPOCheckpointBehind", "GRPOCheckpointOld"],
            ),
        ],
    },
)
