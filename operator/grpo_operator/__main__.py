"""`python -m grpo_operator`: the operator's command line.

Invariant: what keeps the operator from working is said in one line with what to do, and ends in an exit code that is not 0.
"""

import argparse
import asyncio
import logging
import sys
import time
from pathlib import Path
from typing import Any

from grpo_operator import selfcheck
from grpo_operator.api import ApiError, NoCluster
from grpo_operator.control.lease import LeaseLost
from grpo_operator.loops import new_event_loop
from grpo_operator.process import CannotStart, Ended, Process
from grpo_operator.settings import Settings
from grpo_operator.token import TokenKeyError, read_key
from grpo_worker.logs import JsonFormatter

logger = logging.getLogger("grpo_operator")

EXIT_STARTED_ANEW = 1  # the kubelet's part
EXIT_NOT_PREPARED = 78  # somebody has to change something


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    _set_up_logging(options.log_format, options.verbose)
    try:
        if options.command == "selfcheck":
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                return runner.run(selfcheck.run(options.namespace, options.readyz_url, options.wait_seconds))
        if not options.worker_image:
            logger.error(
                "--worker-image is missing: the image of jobs that name none, such as registry.example.com/grpo-worker:0.1.0."
            )
            return EXIT_NOT_PREPARED
        key = read_key(options.token_key_file)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_operate(_settings(options), key))
    except (CannotStart, NoCluster, TokenKeyError) as error:
        logger.error("%s", error)
        return EXIT_NOT_PREPARED
    except (LeaseLost, Ended, ApiError) as error:
        logger.error("Ending, to be started anew: %s", error)
        return EXIT_STARTED_ANEW
    logger.info("Ended.")
    return 0


async def _operate(settings: Settings, key: bytes) -> None:
    await Process(settings, key).run()


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        worker_image=options.worker_image,
        worker_image_pull_policy=options.worker_image_pull_policy,
        namespaces=_names(options.namespaces),
        operator_namespace=options.operator_namespace,
        metrics_namespaces=_names(options.metrics_namespaces),
        scrape_annotations=options.scrape_annotations,
        metrics_port=options.metrics_port,
        lease_namespace=options.lease_namespace or options.operator_namespace,
        lease_name=options.lease_name,
        workers=options.workers,
        poll_seconds=options.poll_seconds,
        resync_seconds=options.resync_seconds,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m grpo_operator", description="Runs GRPOJob objects on Kubernetes.")
    add = parser.add_argument
    add("--namespaces", default="", metavar="A,B", help="namespaces to work in (default: all)")
    add("--worker-image", default="", help="image of jobs whose spec.runtime.image is not set")
    add("--worker-image-pull-policy", default="IfNotPresent", choices=["IfNotPresent", "Always", "Never"])
    add(
        "--token-key-file",
        type=Path,
        default=Path("/etc/grpo-operator/token-key"),
        help="file with the secret that the tokens of jobs are derived from (default: %(default)s)",
    )
    add("--metrics-port", type=int, default=8080, help="port of /metrics, /healthz and /readyz (default: %(default)s)")
    add("--operator-namespace", default="grpo-system", help="where this operator runs (default: %(default)s)")
    add("--metrics-namespaces", default="", metavar="A,B", help="namespaces that may scrape the pods of jobs")
    add("--scrape-annotations", action="store_true", help="prometheus.io/scrape and so on, on the pods of jobs")
    add("--lease-namespace", default="", help="default: the operator's namespace")
    add("--lease-name", default="grpo-operator", help="default: %(default)s")
    add("--workers", type=_positive(int), default=8, help="jobs worked on at a time (default: %(default)s)")
    add(
        "--poll-seconds",
        type=_positive(float),
        default=3.0,
        help="between two questions for a job's progress (default: %(default)s)",
    )
    add(
        "--resync-seconds",
        type=_positive(float),
        default=300.0,
        help="each job is looked at so often (default: %(default)s)",
    )
    add("--log-format", choices=["text", "json"], default="text")
    add("--verbose", action="store_true", help="kopf's own messages too")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    check = commands.add_parser(
        "selfcheck", help="ask an installed operator and CRD whether they work (for `helm test`)"
    )
    check.add_argument("--namespace", default="default", help="where a GRPOJob is tried without being stored")
    check.add_argument("--readyz-url", default="", help="the operator's /readyz")
    check.add_argument(
        "--wait-seconds", type=_positive(float), default=60.0, help="limit for --readyz-url (default: %(default)s)"
    )
    return parser


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> int | float:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    parse.__name__ = kind.__name__
    return parse


def _set_up_logging(form: str, verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S")
    text.converter = time.gmtime
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("kopf").setLevel(logging.DEBUG if verbose else logging.WARNING)
    # Said once at each start: kopf runs in a thread, and this process takes the signals.
    logging.getLogger("kopf._core.reactor.running").addFilter(
        lambda record: "OS signals are ignored" not in record.getMessage()
    )


if __name__ == "__main__":
    sys.exit(main())
