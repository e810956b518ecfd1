"""GRPO operator: does the controller itself work?"""

from charts.dashboards.panels import Dashboard, Panel, quantiles, tile

O = "grpo_operator"  # noqa: E741
SCRAPED = "The operator is not scraped: metrics.serviceMonitor, or metrics.annotations."

DASHBOARD = Dashboard(
    uid="grpo-operator",
    title="GRPO operator",
    description="Does the controller itself work? Lease, watches, queue, reconciles and what they ask of the API server.",
    questions={
        "Does it work?": [
            tile(
                "Leader",
                "Operators that lead.",
                "One.",
                {"leaders": f"sum({O}_leader)"},
                warn_below=1,
                empty=SCRAPED,
                alerts=["GRPOOperatorAbsent"],
            ),
            tile(
                "Jobs and pods",
                "That it knows.",
                "As many as `kubectl get grpojobs -A` lists.",
                {"jobs": f"max({O}_jobs)", "pods": f"max({O}_pods)"},
                empty=SCRAPED,
            ),
            tile(
                "Missed changes",
                "Age of the oldest change that a watch should have told of.",
                "0. Above 30 s it lists, above 120 s it restarts itself.",
                {"{{instance}}": f"{O}_watch_overdue_seconds"},
                unit="s",
                warn_above=30,
                empty=SCRAPED,
                alerts=["GRPOOperatorWatchStale"],
            ),
            tile(
                "Longest wait",
                "How long the job that waits longest has waited for a worker.",
                "Under a second.",
                {"seconds": f"max({O}_workqueue_oldest_seconds)"},
                unit="s",
                warn_above=60,
                empty=SCRAPED,
                alerts=["GRPOOperatorQueueGrowing"],
            ),
        ],
        "What does it do?": [
            Panel(
                "Reconciles",
                "A second, by result. moved_on: the job had changed since it was looked at, and is planned anew.",
                "Errors are rare.",
                {"{{result}}": f"sum by (result) (rate({O}_reconcile_total[$__rate_interval]))"},
                empty="Nothing was reconciled since the operator started.",
                alerts=["GRPOOperatorReconcileErrors"],
            ),
            Panel(
                "Time of a reconcile",
                "Median and 99th percentile, with its requests.",
                "Under a second.",
                quantiles(f"{O}_reconcile_duration_seconds"),
                unit="s",
                empty="Nothing was reconciled in this time.",
            ),
            Panel(
                "Queue",
                "Jobs that wait for a worker.",
                "0 mostly.",
                {"{{instance}}": f"{O}_workqueue_depth"},
                empty=SCRAPED,
            ),
        ],
        "What does it hear and ask?": [
            Panel(
                "Requests to the API server",
                "A second, by verb, resource and answer; code none: no answer.",
                "A few a job in a minute. Codes 409 are conflicts that it resolves, 403 are missing rights.",
                {
                    "{{verb}} {{resource}} {{code}}": f"sum by (verb, resource, code) (rate({O}_api_requests_total[$__rate_interval]))"
                },
                empty=SCRAPED,
                width=12,
            ),
            Panel(
                "Events of watches",
                "A second, by resource, and the time since the last of them.",
                "An idle cluster is silent.",
                {
                    "{{resource}}": f"sum by (resource) (rate({O}_watch_events_total[$__rate_interval]))",
                    "{{resource}}, seconds since": f"time() - max by (resource) ({O}_watch_last_event_timestamp_seconds)",
                },
                width=12,
                empty="No event has come yet.",
            ),
            Panel(
                "Questions to coordinators",
                "A second, by result.",
                "One in three seconds for each job that runs. Errors while pods start and end.",
                {"{{result}}": f"sum by (result) (rate({O}_status_polls_total[$__rate_interval]))"},
                empty="No coordinator was asked yet.",
                alerts=["GRPOCoordinatorUnreachable"],
            ),
            Panel(
                "Memory",
                "Resident memory of the operator's process.",
                "About 150 MB, and little more with 200 jobs.",
                {"{{instance}}": f"process_resident_memory_bytes and on (instance) {O}_leader"},
                unit="bytes",
                empty=SCRAPED,
            ),
            Panel(
                "CPU",
                "Cores that the operator's process uses.",
                "Far below one.",
                {"{{instance}}": f"rate(process_cpu_seconds_total[$__rate_interval]) and on (instance) {O}_leader"},
                empty=SCRAPED,
            ),
        ],
    },
)
