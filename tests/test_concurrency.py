"""An exclusive holder is alone, newcomers do not starve it, and a weight update passes those who only wait."""

import asyncio

from grpo_worker.concurrency import Gate


async def entered(event: asyncio.Event, expected: bool) -> None:
    for _ in range(5):  # let every task that can run, run
        await asyncio.sleep(0)
    assert event.is_set() is expected


class Holder:
    """A task that enters and stays until it is told to leave."""

    def __init__(self, context: object) -> None:
        self.inside, self.leave = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._hold(context))

    async def _hold(self, context: object) -> None:
        async with context:  # type: ignore[attr-defined]
            self.inside.set()
            await self.leave.wait()

    async def end(self) -> None:
        self.leave.set()
        await self.task


def test_an_exclusive_holder_waits_for_all_and_keeps_newcomers_out() -> None:
    async def scene() -> None:
        gate = Gate()
        first, second = Holder(gate.shared()), Holder(gate.shared())
        await entered(second.inside, True)
        exclusive = Holder(gate.exclusive())
        await entered(exclusive.inside, False)
        newcomer = Holder(gate.shared())
        await entered(newcomer.inside, False)
        update = Holder(gate.shared(pass_waiting=True))
        await entered(update.inside, True)
        for holder in (first, second, update):
            await holder.end()
        await entered(exclusive.inside, True)
        late_update = Holder(gate.shared(pass_waiting=True))
        await entered(late_update.inside, False)
        await entered(newcomer.inside, False)
        await exclusive.end()
        await entered(newcomer.inside, True)
        await entered(late_update.inside, True)
        await newcomer.end()
        await late_update.end()

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_an_exclusive_holder_that_gives_up_lets_newcomers_in() -> None:
    async def scene() -> None:
        gate = Gate()
        first = Holder(gate.shared())
        await entered(first.inside, True)
        exclusive = Holder(gate.exclusive())
        await entered(exclusive.inside, False)
        newcomer = Holder(gate.shared())
        exclusive.task.cancel()
        await entered(newcomer.inside, True)
        await first.end()
        await newcomer.end()
        last = Holder(gate.exclusive())
        await entered(last.inside, True)
        await last.end()

    asyncio.run(asyncio.wait_for(scene(), 10))
