"""GRPO fleet: all jobs of a cluster, as the operator sees them."""

from charts.dashboards.panels import JOB, OF_JOB, Dashboard, Panel

J = "grpo_job"
SCRAPED = "No GRPOJob exists, or the operator is not scraped."
ACTIVE = f'on (namespace, grpojob) {J}_info{{{JOB}, state=~"Training|Validating|Saving"}}'

DASHBOARD = Dashboard(
    uid="grpo-fleet",
    title="GRPO fleet",
    description="All jobs: what runs, how far, what failed, and what that cost. Needs the operator's metrics alone.",
    jobs=f"{J}_info",
    questions={
        "What runs?": [
            Panel(
                "Jobs",
                "State, step, time left, reward, restarts and age of the checkpoint of each job.",
                "Time left is at the pace of the last steps.",
                {
                    "exists": f"{J}_info{{{JOB}}}",
                    "step": f"{J}_step{{{JOB}}}",
                    "of": f"{J}_total_steps{{{JOB}}}",
                    "seconds left": f"{J}_eta_seconds{{{JOB}}}",
                    "reward": f"{J}_reward{{{JOB}}}",
                    "accuracy": f"{J}_accuracy{{{JOB}}}",
                    "restarts": f"{J}_counted_restarts{{{JOB}}}",
                    "checkpoint at step": f"{J}_checkpoint_step{{{JOB}}}",
                },
                kind="table",
                width=24,
                height=8,
                empty=SCRAPED,
            ),
            Panel(
                "States",
                "State of each job over time.",
                "Training, with short times of Validating and Saving.",
                {f"{OF_JOB}: {{{{state}}}}": f"{J}_info{{{JOB}}}"},
                kind="states",
                width=16,
                height=8,
                empty=SCRAPED,
            ),
            Panel(
                "GPUs held",
                "GPUs of scheduled pods, by job.",
                "What a job that does not train holds, nobody uses.",
                {OF_JOB: f"{J}_gpus{{{JOB}}}"},
                kind="stacked",
                height=8,
                empty=SCRAPED,
            ),
            Panel(
                "Progress",
                "Finished steps, in percent of the run.",
                "It rises to 100.",
                {OF_JOB: f"100 * {J}_step{{{JOB}}} / {J}_total_steps{{{JOB}}}"},
                unit="percent",
                empty="No job has begun.",
            ),
            Panel(
                "Tokens a second and GPU",
                "Of the last step.",
                "Steady within a job.",
                {OF_JOB: f"{J}_tokens_per_second{{{JOB}}}"},
                empty="No job has finished a step.",
            ),
            Panel(
                "Pods",
                "Pods by role and phase.",
                "Pending ones wait for a node or an image.",
                {"{{role}} {{phase}}": f"sum by (role, phase) ({J}_pods{{{JOB}}})"},
                kind="stacked",
                empty=SCRAPED,
            ),
        ],
        "What needs somebody?": [
            Panel(
                "Without a step for",
                "Time since the last step of jobs that train.",
                "A few times the length of a step.",
                {OF_JOB: f"(time() - {J}_last_progress_timestamp_seconds{{{JOB}}}) and {ACTIVE}"},
                unit="s",
                empty="No job trains.",
                alerts=["GRPOJobStalled"],
            ),
            Panel(
                "Of the time until a restart",
                "The same as a share of failurePolicy.stallTimeoutSeconds, after which the operator restarts the job.",
                "Far below 1.",
                {
                    OF_JOB: f"(time() - {J}_last_progress_timestamp_seconds{{{JOB}}}) / {J}_stall_timeout_seconds{{{JOB}}} and {ACTIVE}"
                },
                unit="percentunit",
                warn_above=1,
                empty="No job trains.",
                alerts=["GRPOJobStalled"],
            ),
            Panel(
                "Coordinator silent for",
                "Time since the coordinator last answered the operator.",
                "A few seconds.",
                {OF_JOB: f"(time() - {J}_report_timestamp_seconds{{{JOB}}}) and {ACTIVE}"},
                unit="s",
                warn_above=60,
                empty="No job trains.",
                alerts=["GRPOCoordinatorUnreachable"],
            ),
            Panel(
                "Age of the checkpoint",
                "Of jobs that train: what a failure now would cost.",
                "checkpoint.saveFreq steps.",
                {OF_JOB: f"(time() - {J}_last_checkpoint_timestamp_seconds{{{JOB}}}) and {ACTIVE}"},
                unit="s",
                empty="No job that trains has a checkpoint yet.",
                alerts=["GRPOCheckpointOld", "GRPOCheckpointBehind"],
            ),
            Panel(
                "Engines missing",
                "Ready rollout pods less rollout.minReplicas.",
                "0 or more.",
                {OF_JOB: f"{J}_rollouts_ready{{{JOB}}} - {J}_rollouts_min{{{JOB}}}"},
                warn_below=0,
                empty="No job has rollout pods; with placement: Colocated engines are in the trainers' pods.",
                alerts=["GRPOEnginesBelowMinimum"],
            ),
            Panel(
                "Conditions that should not be",
                "Failed, Restarting, pods that find no node, checkpoints that lag.",
                "Nothing here.",
                {
                    f"{OF_JOB} {{{{type}}}}": f'{J}_condition{{{JOB}, type=~"Failed|Restarting", status="True"}} or '
                    f'({J}_condition{{{JOB}, type=~"Scheduled|CheckpointCurrent", status="False"}} and {ACTIVE})'
                },
                kind="states",
                empty="All is well.",
                alerts=["GRPOJobFailed", "GRPOJobNotScheduled"],
            ),
        ],
        "What failed, and what did it cost?": [
            Panel(
                "Failures",
                "Failures of pods an hour, by role, reason, what followed, and whether it counted against the budget.",
                "Preemptions do not count.",
                {
                    "{{role}} {{reason}}: {{action}} {{counted}}": f"3600 * sum by (role, reason, action, counted) (rate({J}_restarts_total[$__rate_interval]))"
                },
                kind="stacked",
                empty="No pod has failed since the operator started.",
                alerts=["GRPOJobRestartLoop"],
            ),
            Panel(
                "GPU hours lost",
                "GPU hours of work since the last checkpoint that failures threw away, since the operator started.",
                "More frequent checkpoints make it smaller.",
                {"{{role}} {{reason}}": f"sum by (role, reason) ({J}_lost_gpu_seconds_total) / 3600"},
                unit="h",
                empty="No failure has cost work on GPUs since the operator started.",
            ),
            Panel(
                "Restart budget",
                "Counted restarts since the last progress, of those that a job may have.",
                "0. At 1 the job fails.",
                {OF_JOB: f"{J}_budget_restarts{{{JOB}}} / {J}_max_restarts{{{JOB}}}"},
                unit="percentunit",
                warn_above=1,
                empty="No job was restarted.",
                alerts=["GRPOJobRestartLoop"],
            ),
            Panel(
                "Ended jobs",
                "Jobs that ended since the operator started, by result.",
                "",
                {"{{result}}": f"sum by (result) ({J}_finished_total)"},
                kind="numbers",
                empty="No job has ended since the operator started.",
            ),
            Panel(
                "Time to the first step",
                "Median and 99th percentile from a job's start to its first finished step, of a day.",
                "Image pulls and model loads make most of it.",
                {
                    f"p{number}": f"histogram_quantile(0.{number}, sum by (le) (increase({J}_time_to_first_step_seconds_bucket[1d])))"
                    for number in (50, 99)
                },
                unit="s",
                empty="No job has made its first step since the operator started.",
            ),
        ],
    },
)
