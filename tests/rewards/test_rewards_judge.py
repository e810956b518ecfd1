"""Judges behind a real HTTP server that is slow, busy, broken or lying, and functions that are async."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from grpo_worker.errors import DataError
from grpo_worker.rewards.base import RewardInput
from grpo_worker.rewards.lookup import PARTS, resolve
from grpo_worker.rewards.pool import RewardOutcome, RewardPool

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

MODULE = """
import asyncio
from grpo_worker.rewards.base import RewardResult

async def waits(sample, seconds=0.0):
    await asyncio.sleep(float(sample.data.get("seconds", seconds)))
    if sample.response == "raise":
        raise RuntimeError("no verdict")
    return {"score": float(sample.response), "acc": 1.0}

async def as_in_verl(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)

async def blocks(sample):
    import time
    time.sleep(600)
"""


class Judge:
    """Scores a response by itself; words of it say how it behaves."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.tries: Counter[str] = Counter()
        self.under_way = self.most = 0
        self.url = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.keys.add(request.headers.get("Authorization"))
        return await self._answer(
            str(body["messages"][0]["content"]).rpartition("Answer to judge:\n")[2].split("\n")[0]
        )

    async def score(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return web.json_response({"score": float(body["response"]), "acc": float(body["ground_truth"] == "12")})

    async def _answer(self, response: str) -> web.StreamResponse:
        self.tries[response] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            word, _, rest = response.partition(" ")
            if word == "wait":
                await asyncio.sleep(float(rest.split()[0]))
            if word == "busy" and self.tries[response] < 3:
                return web.Response(status=int(rest), text="not now")
            if word == "refuse":
                return web.Response(status=400, text="no such model")
            if word == "html":
                return web.Response(text="<html>")
            if word == "empty":
                return web.json_response({"choices": []})
            if word == "chat":
                return web.json_response({"choices": [{"message": {"content": "It is fine."}}]})
            content = f"Score: 0.1 at first.\nScore: {response.split()[-1]}"
            usage = {"prompt_tokens": 30, "completion_tokens": 7}
            return web.json_response({"choices": [{"message": {"content": content}}], "usage": usage})
        finally:
            self.under_way -= 1


@pytest_asyncio.fixture
async def judge() -> AsyncIterator[Judge]:
    judge = Judge()
    app = web.Application(client_max_size=1 << 24)
    app.add_routes([web.post("/v1/chat/completions", judge.chat), web.post("/score", judge.score)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    judge.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
    yield judge
    await runner.cleanup()


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "async_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def sample(response: str, **data: Any) -> RewardInput:
    return RewardInput("1+11=", response, "12", data)


def pool(function: str, options: dict[str, Any] | None = None, **keywords: Any) -> RewardPool:
    settings: dict[str, Any] = {
        "workers": 1,
        "timeout_seconds": 5.0,
        "startup_timeout_seconds": 60.0,
        "concurrency": 64,
    }
    return RewardPool(function, options or {}, **(settings | keywords))


def told(outcome: RewardOutcome) -> float | str:
    if outcome.result:
        return outcome.result.score
    assert outcome.failure is not None
    return f"{outcome.failure.kind}: {outcome.failure.message}"


async def test_a_judge_is_asked_for_many_responses_at_a_time(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    options = {"url": f"{judge.url}/v1", "model": "m", "parameters": {"temperature": 0}}
    async with pool("judge", options, concurrency=300) as asked:
        outcomes = await asked.score_many([sample(f"wait 1 0.{n:03}") for n in range(600)])
    assert [told(outcome) for outcome in outcomes] == [n / 1000 for n in range(600)]
    assert judge.most == 300
    assert outcomes[0].result and outcomes[0].result.extra == {"prompt_tokens": 30.0, "completion_tokens": 7.0}
    assert judge.keys == {"Bearer sesame"}
    first = judge.asked[0]
    assert (first["model"], first["temperature"]) == ("m", 0) and "1+11=" in first["messages"][0]["content"]


async def test_what_a_judge_does_not_say_is_no_score(judge: Judge) -> None:
    async with pool("judge", {"url": judge.url + "/v1/", "model": "m"}) as asked:
        outcomes = await asked.score_many([sample(word) for word in ("refuse", "html", "empty", "chat", "0.5")])
    words = [told(outcome) for outcome in outcomes]
    assert words[4] == 0.5
    for word, part in zip(
        words, ("answers 400: no such model", "not JSON: '<html>'", "no answer: {\"choices\": []}", "no score: 'It is fine.'"),
        strict=False,
    ):  # fmt: skip
        assert str(word).startswith("invalid: ") and part in str(word)


async def test_a_judge_that_is_busy_is_asked_again_and_one_that_is_gone_is_given_up(judge: Judge) -> None:
    options = {"url": f"{judge.url}/v1", "model": "m"}
    async with pool("judge", options, retry_seconds=30.0) as asked:
        busy, fine = await asked.score_many([sample("busy 503"), sample("0.25")])
    assert (told(busy), busy.refusals, told(fine)) == (503.0, 2, 0.25)
    gone = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    async with pool("judge", gone, retry_seconds=0.2) as asked:
        (outcome,) = await asked.score_many([sample("1")])
    assert str(told(outcome)).startswith("unavailable: ") and "127.0.0.1:9" in str(told(outcome))


async def test_a_call_that_takes_too_long_fails_alone(judge: Judge) -> None:
    async with pool("judge", {"url": f"{judge.url}/v1", "model": "m"}, timeout_seconds=1.0) as asked:
        slow, fast = await asked.score_many([sample("wait 30 0.5"), sample("0.75")])
        assert told(slow) == "timeout: no result within 1 s (reward.timeoutSeconds)"
        assert told(fast) == 0.75
        assert told((await asked.score_many([sample("0.5")]))[0]) == 0.5


async def test_a_service_answers_with_a_score(judge: Judge) -> None:
    async with pool("remote", {"url": f"{judge.url}/score"}) as asked:
        (outcome,) = await asked.score_many([sample("0.5", when="today")])
    assert outcome.result is not None and (outcome.result.score, outcome.result.accuracy) == (0.5, 1.0)


async def test_async_functions_run_side_by_side_and_each_call_ends_as_its_own(tmp_path: Path) -> None:
    async with pool("async_module:waits") as asked:
        outcomes = await asked.score_many([sample("1", seconds=0.5), sample("raise"), sample("2"), sample("x")])
    words = [told(outcome) for outcome in outcomes]
    assert (words[0], words[2]) == (1.0, 2.0)
    assert "exception: " in str(words[1]) and "no verdict" in str(words[1])
    assert "could not convert string to float" in str(words[3])


async def test_an_async_function_of_verls_signature() -> None:
    async with pool("async_module:as_in_verl") as asked:
        assert [told(each) for each in await asked.score_many([sample("12"), sample("13")])] == [1.0, 0.0]


async def test_an_event_loop_that_stands_still_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_worker.rewards.pool._LOOP_SECONDS", 0.5)
    async with pool("async_module:blocks", timeout_seconds=0.2) as asked:
        (outcome,) = await asked.score_many([sample("1")])
    assert str(told(outcome)).startswith("timeout: ")


async def test_parts_may_be_async_and_plain(judge: Judge) -> None:
    part = {"options": {}, "weight": 1.0, "sources": []}
    parts = [
        part | {"name": "right", "function": "gsm8k"},
        part
        | {"name": "style", "function": "judge", "weight": 0.5, "options": {"url": f"{judge.url}/v1", "model": "m"}},
    ]
    async with pool(PARTS, {"parts": parts}) as asked:
        (outcome,) = await asked.score_many([sample("12")])
    assert outcome.result is not None and outcome.result.score == 1.0 + 0.5 * 12
    assert outcome.result.extra == {
        "right": 1.0,
        "style": 12.0,
        "style/prompt_tokens": 30.0,
        "style/completion_tokens": 7.0,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "m"}, "url: missing, or not http"),
        ({"url": "judge:80", "model": "m"}, "url: missing, or not http"),
        ({"url": "http://x", "model": "m", "pattern": "a("}, "pattern"),
        ({"url": "http://x", "model": "m", "pattern": "no group"}, "one group has to be the score"),
        ({"url": "http://x", "model": "m", "template": "{answer}"}, "template: KeyError('answer')"),
        ({"url": "http://x"}, "model"),
    ],
)
async def test_options_of_a_judge_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve("judge", options)
    assert words in str(caught.value), json.dumps(str(caught.value))
