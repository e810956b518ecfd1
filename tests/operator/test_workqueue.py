import asyncio

import pytest

from grpo_operator.control.workqueue import WorkQueue, work

pytestmark = pytest.mark.asyncio


async def get(queue: WorkQueue[str]) -> str | None:
    return await asyncio.wait_for(queue.get(), 5)


async def test_a_key_added_many_times_waits_once():
    queue: WorkQueue[str] = WorkQueue()
    for key in ("a", "b", "a", "a"):
        queue.add(key)
    assert len(queue) == 2
    assert [await get(queue), await get(queue)] == ["a", "b"]
    assert len(queue) == 0


async def test_a_key_added_while_worked_on_is_worked_on_once_more_and_not_beside_itself():
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    await get(queue)
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0, "nobody else may have it now"
    queue.done("a")
    assert len(queue) == 1
    assert await get(queue) == "a"


async def test_workers_never_work_on_one_key_at_once_and_do_work_on_several_keys_at_once():
    queue: WorkQueue[str] = WorkQueue()
    now: list[str] = []
    together = set()
    calls = {"a": 0, "b": 0}
    everything = asyncio.Event()

    async def reconcile(key: str) -> float | None:
        assert key not in now
        now.append(key)
        together.add(len(now))
        for _ in range(3):
            await asyncio.sleep(0)
        now.remove(key)
        calls[key] += 1
        if calls[key] < 50:
            queue.add(key)
        elif min(calls.values()) >= 50:
            everything.set()
        return None

    queue.add("a")
    queue.add("b")
    workers = [asyncio.create_task(work(queue, reconcile)) for _ in range(4)]
    await asyncio.wait_for(everything.wait(), 10)
    queue.close()
    await asyncio.wait_for(asyncio.gather(*workers), 5)
    assert together == {1, 2}


async def test_the_earliest_timer_wins_and_an_add_replaces_it():
    loop, queue = asyncio.get_running_loop(), WorkQueue[str]()
    started = loop.time()
    queue.add_after("a", 30)
    queue.add_after("a", 0.05)
    queue.add_after("a", 30)
    assert await get(queue) == "a"
    assert 0.04 < loop.time() - started < 3
    queue.done("a")
    queue.add_after("a", 0.02)
    queue.add("a")
    assert await get(queue) == "a"
    queue.done("a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.1)


async def test_pauses_after_failures_double_up_to_the_limit_and_success_forgets_them():
    queue: WorkQueue[str] = WorkQueue(first_pause_seconds=1.0, longest_pause_seconds=10.0)
    pauses = [queue.failed("a") for _ in range(6)]
    for pause, least in zip(pauses, (1, 2, 4, 8, 10, 10), strict=True):
        assert least <= pause <= least * 1.3
    queue.succeeded("a")
    assert queue.failed("a") <= 1.3


async def test_a_key_that_fails_comes_back_and_does_not_hold_up_the_others(caplog):
    queue: WorkQueue[str] = WorkQueue(first_pause_seconds=0.01)
    done: list[str] = []
    both = asyncio.Event()

    async def reconcile(key: str) -> float | None:
        done.append(key)
        if key == "bad" and done.count("bad") < 3:
            raise ValueError("not yet")
        if done.count("bad") == 3 and "good" in done:
            both.set()
        return None

    queue.add("bad")
    queue.add("good")
    worker = asyncio.create_task(work(queue, reconcile))
    await asyncio.wait_for(both.wait(), 5)
    assert done.index("good") < 2
    assert "bad: not yet" in caplog.text
    queue.close()
    await asyncio.wait_for(worker, 5)


async def test_closing_lets_running_work_end_and_starts_no_other():
    queue: WorkQueue[str] = WorkQueue()
    started, release, done = asyncio.Event(), asyncio.Event(), []

    async def reconcile(key: str) -> float | None:
        started.set()
        await release.wait()
        done.append(key)
        return 0.0

    queue.add("a")
    queue.add("b")
    worker = asyncio.create_task(work(queue, reconcile))
    await asyncio.wait_for(started.wait(), 5)
    queue.close()
    queue.add("c")
    release.set()
    await asyncio.wait_for(worker, 5)
    assert done == ["a"]


async def test_ages_are_those_of_the_oldest():
    queue: WorkQueue[str] = WorkQueue()
    assert queue.oldest_waiting_seconds() == 0.0
    queue.add("a")
    await asyncio.sleep(0.05)
    queue.add("b")
    assert queue.oldest_waiting_seconds() >= 0.04
    await get(queue)
    assert queue.oldest_waiting_seconds() < 0.04
    assert queue.longest_working_seconds() >= 0.0
