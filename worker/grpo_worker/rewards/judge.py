"""Judges behind HTTP: a model that speaks OpenAI's chat API, or a service that answers with a score.

Invariant: what a judge does not say is no score: an answer without a number, a refusal and a damaged reply are failures that name what came
back, and "not now" (429, 5xx, no connection) is asked again later by the pool, for `reward.retrySeconds`.
"""

import asyncio
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import aiohttp

from grpo_worker.rewards.base import InvalidRewardError, RewardInput, RewardResult, TryAgain, as_result

PROMPT = """You judge an answer to a question.

Question:
{prompt}

Right answer:
{ground_truth}

Answer to judge:
{response}

Give a score from 0 (wrong) to 1 (right). End with a line "Score: NUMBER"."""
PATTERN = r"Score:\s*([-+]?\d+(?:\.\d+)?)"
CONNECTIONS = 1024
SHOWN_CHARACTERS = 300

_sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}


def check_options(**options: Any) -> None:
    """Raises ValueError for options that no call could use."""
    if not str(options.get("url") or "").startswith(("http://", "https://")):
        raise ValueError("url: missing, or not http:// or https://")
    try:
        if re.compile(options.get("pattern", PATTERN)).groups != 1:
            raise ValueError("pattern: one group has to be the score")
        options.get("template", PROMPT).format(prompt="", response="", ground_truth="", data={})
    except (re.error, KeyError, IndexError) as error:
        raise ValueError(f"pattern or template: {error!r}") from error


async def judge(
    sample: RewardInput,
    *,
    url: str,
    model: str,
    template: str = PROMPT,
    pattern: str = PATTERN,
    key_variable: str = "OPENAI_API_KEY",
    parameters: Mapping[str, Any] | None = None,
) -> RewardResult:
    """The number that `pattern` finds last in what the judge says; `extra` counts its tokens.

    Args:
        url: the API's base, e.g. http://judge:8000/v1.
        template: of the question, with {prompt}, {response}, {ground_truth} and {data}.
        key_variable: environment variable that holds the API key, if there is one.
        parameters: further ones of the request, e.g. {"temperature": 0, "max_tokens": 512}.
    """
    question = template.format(
        prompt=sample.prompt, response=sample.response, ground_truth=sample.ground_truth, data=sample.data
    )
    key = os.environ.get(key_variable)
    reply = await _post(
        f"{url.rstrip('/')}/chat/completions",
        {"model": model, "messages": [{"role": "user", "content": question}], **(parameters or {})},
        {"Authorization": f"Bearer {key}"} if key else {},
    )
    try:
        said = str(reply["choices"][0]["message"]["content"])
    except (LookupError, TypeError) as error:
        raise InvalidRewardError(f"the judge's reply has no answer: {json.dumps(reply)[:SHOWN_CHARACTERS]}") from error
    scores = re.findall(pattern, said)
    if not scores:
        raise InvalidRewardError(f"the judge gave no score: {said[-SHOWN_CHARACTERS:]!r}")
    usage = reply.get("usage") or {}
    extra = {name: float(usage[name]) for name in ("prompt_tokens", "completion_tokens") if name in usage}
    return RewardResult(float(scores[-1]), extra=extra)


async def remote(
    sample: RewardInput, *, url: str, headers: Mapping[str, str] | None = None, key_variable: str = "REWARD_API_KEY"
) -> RewardResult:
    """What the service at `url` answers to the sample as JSON (prompt, response, ground_truth, data): a number, or an object with `score`."""
    key = os.environ.get(key_variable)
    body = {
        "prompt": sample.prompt,
        "response": sample.response,
        "ground_truth": sample.ground_truth,
        "data": sample.data,
    }
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    return as_result(await _post(url, body, {**authorization, **(headers or {})}))


async def _post(url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
    """The reply's JSON. Raises TryAgain, InvalidRewardError."""
    loop = asyncio.get_running_loop()
    if loop not in _sessions:
        _sessions[loop] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS), timeout=aiohttp.ClientTimeout(total=None)
        )
    text = json.dumps(body, default=str)
    try:
        async with _sessions[loop].post(
            url, data=text, headers={"Content-Type": "application/json", **headers}
        ) as response:
            said = await response.text(errors="replace")
            status = response.status
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        raise TryAgain(f"{url}: {error}") from error
    if status == 429 or status >= 500:
        raise TryAgain(f"{url} answers {status}: {said[:SHOWN_CHARACTERS]}")
    if status >= 400:
        raise InvalidRewardError(f"{url} answers {status}: {said[:SHOWN_CHARACTERS]}")
    try:
        return json.loads(said)
    except ValueError as error:
        raise InvalidRewardError(f"{url} answers what is not JSON: {said[:SHOWN_CHARACTERS]!r}") from error
