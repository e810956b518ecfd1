"""From `rollout.agent` and `rollout.agentOptions` to the agent's function.

Invariant: a name, an option or a signature that cannot work is refused here, before the first prompt.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, cast

from grpo_worker.coordinator.agents.episode import Episode
from grpo_worker.errors import DataError
from grpo_worker.functions import check_signature, load_function

FIELDS = ("rollout.agent", "rollout.agentOptions")
Agent = Callable[[Episode], Awaitable[None]]


def load_agent(name: str, options: Mapping[str, Any]) -> Agent:
    """The agent with its options bound. Raises DataError."""
    function = load_function(name, FIELDS[0])
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)):
        raise DataError(f"{FIELDS[0]}: {name!r} is not async. Write `async def agent(episode): ...`.")
    check_signature(
        inspect.signature(function),
        1,
        (),
        options,
        name=name,
        fields=FIELDS,
        advice="Write `async def agent(episode): ...`;",
    )
    return cast(Agent, partial(function, **options))
