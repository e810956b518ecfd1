"""Takes the coordinator's word into the status: steps, reward, checkpoints; and gives the restart budget back on progress.

Invariant: what a coordinator says while it starts does not replace what is known; a step is never invented. Numbers that are not finite
are left out, since JSON has none.
"""

import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, TypeGuard

from grpo_operator import clock
from grpo_operator.labels import Role
from grpo_operator.planning.draft import Draft
from grpo_operator.planning.policies import budget
from grpo_worker.config.status import Checkpoints, KeptCheckpoint, Progress


def observe(draft: Draft) -> None:
    """Before any policy: what is decided may depend on it."""
    document = draft.report
    if document is not None and draft.seen.report is not None:
        if draft.trains:
            draft.update(progress=_progress(document, clock.text(draft.seen.report.read)))
        _take_checkpoints(draft, document)
    _hear_last_word(draft)
    step = draft.status.progress.step if draft.status.progress is not None else None
    if step is not None:
        draft.update(budget=budget.progressed(draft.budget, step))
    if nodes := draft.status.excluded_nodes:
        kept = [node for node in nodes if (until := clock.parse(node.until)) is None or until > draft.now]
        draft.update(excluded_nodes=kept)


def _progress(document: Mapping[str, Any], read: str) -> Progress:
    last = clock.from_unix(document.get("last_progress_time"))
    serving = [
        version
        for member in _mappings(document.get("members"))
        if member.get("role") == Role.ROLLOUT.value
        and member.get("in_service")
        and (version := _whole(member.get("weight_version"))) is not None
    ]
    return Progress(
        **_reached(document),
        total_epochs=_whole(document.get("total_epochs")),
        rollout_version=min(serving, default=None),
        eta_seconds=_real(document.get("eta_seconds"), 0.0),
        tokens_per_second=_real(document.get("tokens_per_second"), 0.0),
        last_progress_time=clock.text(last) if last is not None else None,
        report_time=read,
    )


def _reached(document: Mapping[str, Any]) -> dict[str, Any]:
    """How far the run is: what `/status` and a last word both tell."""
    return {
        "step": _whole(document.get("step")),
        "total_steps": _whole(document.get("total_steps")),
        "epoch": _real(document.get("epoch"), 0.0),
        "reward": _real(document.get("reward")),
        "accuracy": _real(document.get("accuracy")),
        "policy_version": _whole(document.get("policy_version")),
    }


def _take_checkpoints(draft: Draft, document: Mapping[str, Any]) -> None:
    """`checkpoint` is the newest; `checkpoints`, where the worker tells it, all that are kept."""
    on_disk = [_checkpoint(item) for item in _mappings(document.get("checkpoints"))]
    kept = sorted((item for item in on_disk if _is_own(item, draft)), key=lambda item: item.step)
    newest = _checkpoint(document.get("checkpoint"))
    if not _is_own(newest, draft):
        newest = kept[-1] if kept else None
    if newest is None:
        return
    before = draft.status.checkpoints or Checkpoints()
    if not kept:
        kept = [item for item in before.kept or [] if item.step < newest.step] + [newest]
    kept = kept[-draft.spec.checkpoint.keep_last :]
    if before.last_step is None:
        draft.normal("CheckpointSaved", f"The first checkpoint: step {newest.step}, {newest.path}.")
    draft.update(checkpoints=Checkpoints(last_step=newest.step, path=newest.path, time=newest.time, kept=kept))


def _is_own(found: KeptCheckpoint | None, draft: Draft) -> TypeGuard[KeptCheckpoint]:
    """Not an older run's, which this one leaves alone."""
    if found is None or draft.spec.checkpoint.resume != "never":
        return found is not None
    saved, begun = clock.parse(found.time), clock.parse(draft.status.start_time)
    return saved is None or begun is None or saved >= begun


def _hear_last_word(draft: Draft) -> None:
    """The coordinator's termination message is later than its last report: the save of a suspend may be in it alone."""
    coordinator = draft.coordinator
    end = coordinator.ended if coordinator is not None else None
    word = end.last_word if end is not None else None
    if end is None or word is None or word.step is None:
        return
    progress = draft.status.progress or Progress()
    if word.step >= (progress.step or 0):
        told = {**_reached(word.progress), "step": word.step}
        draft.update(
            progress=progress.model_copy(update={name: value for name, value in told.items() if value is not None})
        )
    path, known = word.checkpoint, draft.status.checkpoints or Checkpoints()
    if path is None or PurePosixPath(path).name == PurePosixPath(draft.spec.checkpoint.resume).name:
        return  # what the run began with is not its own
    step = _step_of(path, word.step)
    if step > (known.last_step if known.last_step is not None else -1):
        saved = KeptCheckpoint(step=step, path=path, time=clock.text(end.finished or draft.now))
        kept = [*(known.kept or []), saved][-draft.spec.checkpoint.keep_last :]
        draft.update(checkpoints=Checkpoints(last_step=step, path=path, time=saved.time, kept=kept))


def _step_of(path: str, otherwise: int) -> int:
    """Checkpoint directories end in their step; a run that crashed is some steps past its last."""
    digits = re.search(r"(\d+)/?$", path)
    return int(digits.group(1)) if digits else otherwise


def _checkpoint(raw: object) -> KeptCheckpoint | None:
    if not isinstance(raw, Mapping) or (step := _whole(raw.get("step"))) is None:
        return None
    time = clock.from_unix(raw.get("time"))
    path = raw.get("path")
    return KeptCheckpoint(
        step=step, path=path if isinstance(path, str) else None, time=clock.text(time) if time is not None else None
    )


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _real(value: object, least: float = -math.inf) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        return None
    return float(value)
