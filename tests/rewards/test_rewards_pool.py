# ruff: noqa: ASYNC220, ASYNC221, ASYNC240  (blocking the loop, and owning a real parent, is what is tested)
"""The pool against real worker processes: whatever one sample does, every sample gets its outcome."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_worker.errors import DataError, RetryableError, UsageError
from grpo_worker.rewards.base import RewardInput, RewardResult
from grpo_worker.rewards.pool import PoolClosedError, RewardOutcome, RewardPool, memory_share

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(40)]

Make = Callable[..., RewardInput]
LIMIT_SECONDS = 1.0


def misbehaving(folder: Path, workers: int = 1, **keywords: Any) -> RewardPool:
    return RewardPool("misbehaving:misbehave", {"folder": str(folder)}, workers, LIMIT_SECONDS, 60.0, **keywords)


async def score(pool: RewardPool, sample: RewardInput) -> RewardOutcome:
    return (await pool.score_many([sample]))[0]


def workers_of(pool: RewardPool) -> list[object]:
    """The processes: one that was lost has been replaced by another."""
    return [slot.worker for slot in pool._slots]


def has_ended(pid: int, within_seconds: float = 10.0) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(process):
        return bool(select.select([process], [], [], within_seconds)[0])


def kinds(outcomes: Sequence[RewardOutcome]) -> list[str | float]:
    """Of each outcome the score, or the kind of its failure."""
    found: list[str | float] = []
    for outcome in outcomes:
        assert (outcome.result is None) != (outcome.failure is None)
        found += [outcome.result.score] if outcome.result else []
        found += [outcome.failure.kind] if outcome.failure else []
    return found


@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        ("raise", "exception", "RuntimeError: the verifier is broken"),
        ("sys.exit", "exception", "SystemExit: 3"),
        ("not a word", "exception", "could not convert string to float"),
        ("nan", "invalid", "the score is nan"),
        ("inf", "invalid", "the score is inf"),
        ("text", "invalid", "not a number: str '1.0'"),
        ("none", "invalid", "NoneType"),
        ("no score", "invalid", "no 'score' (keys: acc)"),
        ("loop", "timeout", "no result within 1 s (reward.timeoutSeconds)"),
        ("sleep", "timeout", "no result within 1 s"),
        ("regex", "timeout", "no result within 1 s"),
        ("os._exit", "crash", "exited with code 7, twice, on this sample"),
        ("segfault", "crash", "was killed by SIGSEGV, twice, on this sample"),
        ("fork and crash", "crash", "exited with code 7"),
    ],
)
async def test_a_failure_is_an_outcome_and_the_samples_around_it_are_scored(
    user_folder: Path, sample: Make, word: str, kind: str, message: str
) -> None:
    async with misbehaving(user_folder) as pool:
        warm_up = [sample(str(n)) for n in range(20)]  # fast calls: from here on many are sent ahead
        await pool.score_many(warm_up)
        workers = workers_of(pool)
        outcomes = await pool.score_many(
            [*(sample(str(n)) for n in range(30)), sample(word), *(sample(str(n)) for n in range(30))]
        )
        failed = outcomes.pop(30)
        assert [outcome.result for outcome in outcomes] == [RewardResult(float(n)) for n in (*range(30), *range(30))]
        assert failed.result is None
        assert failed.failure is not None
        assert failed.failure.kind == kind
        assert message in failed.failure.message
        assert (workers_of(pool) == workers) == (kind not in ("timeout", "crash"))


async def test_many_failures_among_many_samples_on_several_workers(user_folder: Path, sample: Make) -> None:
    words = [str(n) for n in range(200)]
    expected: list[str | float] = [float(n) for n in range(200)]
    for place, (word, kind) in {10: ("loop", "timeout"), 11: ("segfault", "crash"), 90: ("nan", "invalid"),
                                120: ("os._exit", "crash"), 199: ("sleep", "timeout")}.items():  # fmt: skip
        words[place], expected[place] = word, kind
    async with misbehaving(user_folder, workers=2) as pool:
        assert kinds(await pool.score_many([sample(word) for word in words])) == expected


async def test_a_sample_that_crashed_by_bad_luck_is_scored_by_a_fresh_worker(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder) as pool:
        outcomes = await pool.score_many([sample("1"), sample("crash once"), sample("2")])
        assert kinds(outcomes) == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("word", ["print", "fork"])
async def test_what_user_code_prints_and_forks_does_not_reach_the_protocol(
    user_folder: Path, sample: Make, word: str
) -> None:
    async with misbehaving(user_folder) as pool:
        workers = workers_of(pool)
        assert kinds(await pool.score_many([sample(word), sample("2")])) == [1.0, 2.0]
        assert workers_of(pool) == workers


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_worker.rewards.pool._FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr("grpo_worker.rewards.pool._LONGEST_PAUSE_SECONDS", 0.1)


async def test_a_call_is_made_again_when_the_function_asks_for_it(
    user_folder: Path, sample: Make, impatient: None
) -> None:
    heard: list[str] = []
    async with misbehaving(user_folder, retry_seconds=20.0, on_refusal=heard.append) as pool:
        workers = workers_of(pool)
        outcomes = await pool.score_many([sample("busy 3"), sample("2"), sample("busy 1")])
        assert kinds(outcomes) == [1.0, 2.0, 1.0]
        assert [outcome.refusals for outcome in outcomes] == [3, 0, 1]
        assert workers_of(pool) == workers
    assert heard == ["the judge answered 503"]  # once, not for each sample


async def test_who_waits_for_another_try_holds_no_worker(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder, retry_seconds=20.0) as pool:
        busy = asyncio.ensure_future(score(pool, sample("busy 1")))
        while not (user_folder / "busy 1").exists():
            await asyncio.sleep(0.01)
        assert kinds(await pool.score_many([sample(str(n)) for n in range(20)])) == list(range(20))
        assert not busy.done()  # its pause is half a second or more
        assert kinds([await busy]) == [1.0]


@pytest.mark.parametrize("retry_seconds", [0.0, 0.5])
async def test_a_judge_that_stays_away_fails_the_sample_at_the_bound(
    user_folder: Path, sample: Make, impatient: None, retry_seconds: float
) -> None:
    async with misbehaving(user_folder, retry_seconds=retry_seconds) as pool:
        started = asyncio.get_running_loop().time()
        outcome = await score(pool, sample("busy"))
        waited = asyncio.get_running_loop().time() - started
        assert kinds([outcome]) == ["unavailable"]
        assert outcome.failure is not None
        assert "reward.retrySeconds): the judge answered 503" in outcome.failure.message
        assert waited >= retry_seconds
        calls = len((user_folder / "busy").read_text())
        assert calls == outcome.refusals
        assert calls == 1 if not retry_seconds else 4 < calls < 30  # ever further apart


async def test_closing_ends_the_wait_for_another_try(user_folder: Path, sample: Make) -> None:
    pool = misbehaving(user_folder, retry_seconds=1000.0)
    await pool.start()
    busy = asyncio.ensure_future(score(pool, sample("busy")))
    while not (user_folder / "busy").exists():
        await asyncio.sleep(0.01)
    await asyncio.wait_for(pool.close(), 5.0)
    with pytest.raises(PoolClosedError):
        await busy


async def test_a_memory_limit_turns_a_runaway_into_an_exception(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder, memory_limit_bytes=1 << 30) as pool:
        outcome, after = await pool.score_many([sample("memory"), sample("1")])
    assert outcome.failure is not None
    assert (outcome.failure.kind, "MemoryError" in outcome.failure.message) == ("exception", True)
    assert after.result == RewardResult(1.0)


@pytest.mark.parametrize(
    ("files", "workers", "expected"),
    [
        ({"memory.max": "17179869184\n"}, 2, 4 << 30),
        ({"memory.max": "17179869184\n"}, 64, 1 << 30),
        ({"memory/memory.limit_in_bytes": "8589934592\n"}, 1, 4 << 30),
    ],
)
async def test_workers_share_half_of_the_containers_memory(
    tmp_path: Path, files: dict[str, str], workers: int, expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_share(workers, tmp_path) == expected


async def test_without_a_limit_it_is_half_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_share(1, tmp_path) == memory_share(1, tmp_path / "none") == max(machine // 2, 1 << 30)


async def test_what_a_killed_verifier_started_in_a_session_of_its_own_ends_with_it(
    user_folder: Path, sample: Make
) -> None:
    async with misbehaving(user_folder) as pool:
        outcome = await score(pool, sample("leave a session"))
        assert outcome.failure is not None and outcome.failure.kind == "timeout"
        assert has_ended(int((user_folder / "session").read_text()))


async def test_the_jobs_token_is_not_in_a_workers_environment(
    user_folder: Path, sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_JOB_TOKEN", "secret")
    async with misbehaving(user_folder) as pool:
        assert kinds([await score(pool, sample("token"))]) == [0.0]


async def test_a_sample_that_cannot_be_pickled_fails_alone(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder) as pool:
        bad, good = await pool.score_many([sample("1", function=lambda: None), sample("2")])
    assert bad.failure is not None
    assert (bad.failure.kind, "cannot be sent to a worker" in bad.failure.message) == ("exception", True)
    assert good.result == RewardResult(2.0)


async def test_a_verifiers_child_is_killed_with_it(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder) as pool:
        outcome = await score(pool, sample("child and hang"))
        assert kinds([outcome]) == ["timeout"]
        assert has_ended(int((user_folder / "child").read_text()))


async def test_close_ends_workers_and_the_children_they_left(user_folder: Path, sample: Make) -> None:
    pool = misbehaving(user_folder, workers=2)
    await pool.start()
    outcome = await score(pool, sample("leave a child"))
    assert outcome.result is not None
    child = int(outcome.result.extra["child"])
    hanging = asyncio.ensure_future(score(pool, sample("sleep")))
    await score(pool, sample("1"))  # the other worker answers, so the first one has been sent its sample
    await asyncio.wait_for(pool.close(), 5.0)
    with pytest.raises(PoolClosedError):
        await hanging
    with pytest.raises(PoolClosedError):
        await score(pool, sample("1"))
    assert has_ended(child)
    await pool.close()  # once more is no error


async def test_a_caller_that_gives_up_takes_nothing_from_the_others(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder) as pool:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.score_many([sample("sleep"), *(sample("5") for _ in range(50))]), 0.2)
        assert kinds(await pool.score_many([sample("1"), sample("2")])) == [1.0, 2.0]


async def test_the_event_loop_goes_on_while_verifiers_hang(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder) as pool:
        scoring = asyncio.ensure_future(score(pool, sample("regex")))
        turns = 0
        while not scoring.done():
            await asyncio.wait([scoring], timeout=0.01)
            turns += 1
        assert kinds([scoring.result()]) == ["timeout"]
        assert turns > 10


async def test_a_reply_that_waited_for_a_busy_event_loop_is_not_a_timeout(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder) as pool:
        scoring = asyncio.ensure_future(score(pool, sample("1")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # sent
        subprocess.run(
            [sys.executable, "-c", f"import time; time.sleep({2 * LIMIT_SECONDS})"], check=True
        )  # blocks the loop
        assert kinds([await scoring]) == [1.0]


@pytest.mark.parametrize(
    ("text", "name", "parts"),
    [
        ("x = 1\n", "bad:reward", ["has no function 'reward'"]),
        (
            "raise RuntimeError('no licence server')\n",
            "bad:reward",
            ["importing bad failed", "bad.py", "no licence server"],
        ),
        ("import os\nos._exit(9)\n", "bad:reward", ["exited with code 9 while it loaded the function"]),
        ("import ctypes\nctypes.string_at(0)\n", "bad:reward", ["killed by SIGSEGV while it loaded"]),
        ("import sys\nsys.exit('stop')\n", "bad:reward", ["SystemExit: stop"]),
    ],
)
async def test_a_function_that_does_not_load_fails_the_start_with_its_reason(
    user_folder: Path, text: str, name: str, parts: list[str]
) -> None:
    (user_folder / "bad.py").write_text(text)
    with pytest.raises(DataError) as error:
        await RewardPool(name, {}, 2, LIMIT_SECONDS, 60.0).start()
    assert str(error.value).startswith("reward.function: 'bad:reward'")
    for part in parts:
        assert part in str(error.value)


async def test_a_function_that_loads_forever_fails_the_start_at_its_limit(user_folder: Path) -> None:
    (user_folder / "slow.py").write_text("while True:\n    pass\n")
    with pytest.raises(DataError, match=r"was not loaded within 0\.5 s.*failurePolicy\.startupTimeoutSeconds"):
        await RewardPool("slow:reward", {}, 2, LIMIT_SECONDS, 0.5).start()


async def test_when_no_worker_starts_any_more_the_callers_are_told(user_folder: Path, sample: Make) -> None:
    async with misbehaving(user_folder) as pool:
        (user_folder / "misbehaving.py").write_text("raise RuntimeError('the disk is gone')\n")
        outcomes = asyncio.gather(*(score(pool, sample(word)) for word in ("loop", "1")), return_exceptions=True)
        timeout, stuck = await outcomes
        assert isinstance(timeout, RewardOutcome)
        assert kinds([timeout]) == ["timeout"]
        assert isinstance(stuck, RetryableError)
        assert "the disk is gone" in str(stuck)
        with pytest.raises(RetryableError):
            await score(pool, sample("1"))


@pytest.mark.parametrize(
    ("workers", "timeout", "startup", "field"),
    [
        (0, 1.0, 1.0, "reward.workers"),
        (1, 0.0, 1.0, "reward.timeoutSeconds"),
        (1, 1.0, -1.0, "failurePolicy.startupTimeoutSeconds"),
    ],
)
async def test_limits_have_to_be_above_zero(workers: int, timeout: float, startup: float, field: str) -> None:
    with pytest.raises(UsageError, match=field):
        RewardPool("gsm8k", {}, workers, timeout, startup)


async def test_thousands_of_fast_samples_keep_their_order_and_use_all_workers(user_folder: Path, sample: Make) -> None:
    async with RewardPool("misbehaving:echo", {}, 2, LIMIT_SECONDS, 60.0) as pool:
        outcomes = await pool.score_many([sample(str(n)) for n in range(5000)])
        assert kinds(outcomes) == [float(n) for n in range(5000)]
        assert len({outcome.result.extra["pid"] for outcome in outcomes if outcome.result}) == 2


async def test_math_workers_load_side_by_side_and_score(sample: Make) -> None:
    async with RewardPool("math", {}, 2, 30.0, 60.0) as pool:
        outcomes = await pool.score_many([sample(r"\boxed{\frac12}", "0.5"), sample(r"\boxed{2}", "3")])
        assert kinds(outcomes) == [1.0, 0.0]


PARENT = """
import asyncio, sys
from grpo_worker.rewards.base import RewardInput
from grpo_worker.rewards.pool import RewardPool

async def main():
    pool = RewardPool("misbehaving:echo", {}, 1, 60, 60)
    hanging = RewardPool("misbehaving:misbehave", {}, 1, 60, 60)
    await asyncio.gather(pool.start(), hanging.start())
    call = asyncio.ensure_future(hanging.score_many([RewardInput("", sys.argv[1], "")]))
    await pool.score_many([RewardInput("", "1", "")])
    print("hanging", flush=True)
    await call

asyncio.run(main())
"""


@pytest.mark.parametrize("word", ["sleep", "regex"])
async def test_workers_die_with_their_parent_even_in_the_middle_of_a_call(user_folder: Path, word: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, word], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) == 2
    watched = [os.pidfd_open(pid) for pid in children]
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate(timeout=10)
    for process in watched:
        with os.fdopen(process):
            assert select.select([process], [], [], 10.0)[0]


async def test_a_worker_imports_nothing_heavy() -> None:
    code = "import sys, grpo_worker.rewards.worker; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = ("torch", "transformers", "numpy", "sympy", "math_verify", "reasoning_gym", "asyncio", "pydantic")
    run = subprocess.run([sys.executable, "-c", code % (heavy,)], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
