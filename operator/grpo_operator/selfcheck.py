"""`python -m grpo_operator selfcheck`: does what is installed work? For `helm test` and for people.

Invariant: nothing is stored: jobs are tried by dry run.
"""

import asyncio
import logging
from typing import Any

import aiohttp

from grpo_operator.api import GRPOJOBS, Api, ApiError

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0


async def run(namespace: str, readyz_url: str, wait_seconds: float) -> int:
    """Exit code. Raises NoCluster."""
    found = []
    async with Api() as api:
        found += await _check_crd(api, namespace)
    if readyz_url:
        found += await _check_ready(readyz_url, wait_seconds)
    for problem in found:
        logger.error("%s", problem)
    if not found:
        logger.info(
            "All is well: a sound GRPOJob is accepted, a broken one refused%s.",
            ", the operator is ready" if readyz_url else "",
        )
    return 1 if found else 0


def sound_job(namespace: str) -> dict[str, Any]:
    """The smallest job that makes sense."""
    return {
        "apiVersion": GRPOJOBS.api_version,
        "kind": GRPOJOBS.kind,
        "metadata": {"generateName": "selfcheck-", "namespace": namespace},
        "spec": {
            "suspend": True,
            "model": {"path": "demo/model"},
            "data": {"trainFiles": ["demo/train.parquet"], "trainBatchSize": 16},
            "reward": {"function": "gsm8k"},
            "actor": {"ppoMiniBatchSize": 16},
        },
    }


async def _check_crd(api: Api, namespace: str) -> list[str]:
    sound, broken = sound_job(namespace), sound_job(namespace)
    broken["spec"]["data"]["trainBatchSize"] = -1
    try:
        await api.create(sound, dry_run=True)
    except ApiError as error:
        if error.not_found:
            return [f"The CRD {GRPOJOBS.name} is not installed, or there is no namespace {namespace}: {error.message}"]
        return [f"A sound GRPOJob is refused: {error}"]
    try:
        await api.create(broken, dry_run=True)
    except ApiError as error:
        return (
            [] if error.status == 422 else [f"A broken GRPOJob is refused for another reason than its mistake: {error}"]
        )
    return [
        "A GRPOJob with data.trainBatchSize -1 is accepted: the installed CRD has no rules. Upgrade the CRD with the chart."
    ]


async def _check_ready(url: str, wait_seconds: float) -> list[str]:
    said = "no answer"
    try:
        async with (
            asyncio.timeout(wait_seconds),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
        ):
            while True:
                try:
                    async with session.get(url) as response:
                        said = (await response.text())[:500]
                        if response.status == 200:
                            return []
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    said = str(error) or "no answer in time"
                await asyncio.sleep(PAUSE_SECONDS)
    except TimeoutError:
        return [f"The operator is not ready after {wait_seconds:g} s: {url}: {said}"]
