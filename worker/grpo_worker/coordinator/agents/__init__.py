"""Rollouts by a person's own agent (`rollout.agent`): several turns, tools, environments."""

from grpo_worker.coordinator.agents.episode import Episode, NoRoomError, Turn

__all__ = ["Episode", "NoRoomError", "Turn"]
