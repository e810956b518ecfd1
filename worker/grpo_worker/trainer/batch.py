"""From the ragged arrays of a `TrainBatch` to the tensors of one micro-batch.

Invariant: a response token's log-prob is read at the position before it; every per-token value travels with its index
into the message's flat response arrays, so results return to their places whatever the packing was.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grpo_worker.errors import DataError
from grpo_worker.protocol.messages import Array, TrainBatch
from grpo_worker.trainer.attention import Segments

RESPONSE_FIELDS = (
    "response_mask", "old_log_probs", "rollout_log_probs", "ref_log_probs", "advantages", "is_weights",
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """A decoded `TrainBatch`. Offsets are the exclusive prefix sums of the lengths, `[sequences + 1]`."""

    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    token_ids: np.ndarray
    token_offsets: np.ndarray
    response_offsets: np.ndarray
    response_mask: np.ndarray  # float32 [response tokens]
    values: dict[str, np.ndarray]  # the other response_* arrays that were given, float32 [response tokens]
    mini_batch_sequences: list[int]

    @property
    def count(self) -> int:
        return len(self.prompt_lengths)

    @property
    def response_tokens(self) -> int:
        return int(self.response_offsets[-1])

    @property
    def lengths(self) -> list[int]:
        return (self.prompt_lengths + self.response_lengths).tolist()

    def prompt(self, i: int) -> np.ndarray:
        start = self.token_offsets[i]
        return self.token_ids[start : start + self.prompt_lengths[i]]

    @classmethod
    def of(cls, batch: TrainBatch) -> "Sequences":
        """Raises DataError when the arrays do not fit together."""
        prompts = batch.prompt_lengths.numpy().astype(np.int64)
        responses = batch.response_lengths.numpy().astype(np.int64)
        token_ids = batch.token_ids.numpy()
        if len(prompts) != len(responses) or len(prompts) == 0:
            raise DataError(f"batch: {len(prompts)} prompt_lengths and {len(responses)} response_lengths")
        if prompts.min() < 1 or responses.min() < 1:
            raise DataError("batch: each sequence needs at least one prompt token and one response token")
        if int((prompts + responses).sum()) != len(token_ids):
            raise DataError(f"batch: {len(token_ids)} token_ids, the lengths sum to {int((prompts + responses).sum())}")
        total = int(responses.sum())
        arrays: dict[str, np.ndarray] = {}
        for name in RESPONSE_FIELDS:
            array: Array | None = getattr(batch, name)
            if array is None:
                continue
            values = array.numpy()
            if len(values) != total:
                raise DataError(f"batch.{name}: {len(values)} values for {total} response tokens")
            arrays[name] = values.astype(np.float32)
        if batch.mini_batch_sequences and sum(batch.mini_batch_sequences) != len(prompts):
            raise DataError(f"batch.mini_batch_sequences: {batch.mini_batch_sequences} for {len(prompts)} sequences")
        return cls(
            prompt_lengths=prompts,
            response_lengths=responses,
            token_ids=token_ids,
            token_offsets=_offsets(prompts + responses),
            response_offsets=_offsets(responses),
            response_mask=arrays.pop("response_mask", np.ones(total, dtype=np.float32)),
            values=arrays,
            mini_batch_sequences=list(batch.mini_batch_sequences) or [len(prompts)],
        )


def stand_in(lengths: Sequence[tuple[int, int]]) -> TrainBatch:
    """Of sequences with these numbers of prompt and response tokens, all of them token 0."""
    prompts, responses = zip(*lengths, strict=True)
    return TrainBatch(
        prompt_lengths=Array.of(list(prompts), "int32"),
        response_lengths=Array.of(list(responses), "int32"),
        token_ids=Array.of([0] * sum(map(sum, lengths)), "int32"),
    )


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass. Packed: one row of all tokens, `[1, tokens]`; padded: `[sequences, longest]`."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None  # padded only, 1 at real tokens
    segments: Segments | None  # packed only
    lengths: tuple[int, ...]  # tokens of each sequence
    predict_index: torch.Tensor  # int64 [response tokens]: flat position whose hidden state predicts the token
    targets: torch.Tensor  # int64 [response tokens]
    seq_ids: torch.Tensor  # int64 [response tokens]: 0-based within the micro-batch
    response_index: np.ndarray  # int64 [response tokens]: place in the message's flat response arrays
    empty: bool = False  # padding: its loss is zero


def collate(
    sequences: Sequences, members: Sequence[int], packed: bool, device: torch.device, share_prompts: bool = False
) -> MicroBatch:
    """The micro-batch of `members`. An empty list makes a two-token stand-in, so that this rank joins the
    collectives.

    Args:
        share_prompts: of packed neighbours with the same prompt the prompt is there once.
    """
    if not len(members):
        ids = [np.array([0, 0], dtype=np.int32)]
        prompt_lengths, response_index = [1], np.zeros(0, dtype=np.int64)
    else:
        ids = [sequences.token_ids[sequences.token_offsets[i] : sequences.token_offsets[i + 1]] for i in members]
        prompt_lengths = [int(sequences.prompt_lengths[i]) for i in members]
        spans = [np.arange(sequences.response_offsets[i], sequences.response_offsets[i + 1]) for i in members]
        response_index = np.concatenate(spans)
    lengths = [len(row) for row in ids]
    targets = np.concatenate([row[p:] for row, p in zip(ids, prompt_lengths, strict=True)])
    seq_ids = np.repeat(np.arange(len(lengths)), [n - p for p, n in zip(prompt_lengths, lengths, strict=True)])

    row = None
    if packed:
        runs = (
            neighbours_with_one_prompt(sequences, members)
            if share_prompts and len(members)
            else [[i] for i in members or [0]]
        )
        numbers = iter(range(len(ids)))
        row = _Row(ids, prompt_lengths, [[next(numbers) for _ in run] for run in runs])
        input_ids, position_ids, predict = row.input_ids[None], row.position_ids[None], row.predict
        attention_mask = None
    else:
        width = max(lengths)
        predict = np.concatenate(
            [s * width + np.arange(p - 1, n - 1) for s, (p, n) in enumerate(zip(prompt_lengths, lengths, strict=True))]
        )
        input_ids = np.zeros((len(ids), width), dtype=np.int64)
        attention_mask = np.zeros((len(ids), width), dtype=np.int64)
        for number, values in enumerate(ids):
            input_ids[number, : len(values)] = values
            attention_mask[number, : len(values)] = 1
        position_ids = np.broadcast_to(np.arange(width), input_ids.shape)

    def put(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(array)).to(dtype), device)

    return MicroBatch(
        input_ids=put(input_ids),
        position_ids=put(position_ids),
        attention_mask=None if attention_mask is None else put(attention_mask),
        segments=None if row is None else row.segments(put),
        lengths=tuple(lengths),
        predict_index=put(predict),
        targets=put(targets),
        seq_ids=put(seq_ids),
        response_index=response_index,
        empty=not len(members),
    )


def neighbours_with_one_prompt(
    sequences: Sequences, members: Sequence[int], max_tokens: int = sys.maxsize
) -> list[list[int]]:
    """`members` in runs that have the same prompt, each of at most `max_tokens` with the prompt counted once."""
    runs: list[list[int]] = []
    tokens = 0
    for i in members:
        prompt, response = int(sequences.prompt_lengths[i]), int(sequences.response_lengths[i])
        same = bool(runs) and np.array_equal(sequences.prompt(runs[-1][-1]), sequences.prompt(i))
        if same and tokens + response <= max_tokens:
            runs[-1].append(i)
            tokens += response
        else:
            runs.append([i])
            tokens = prompt + response
    return runs


class _Row:
    """Sequences packed into one row; of those in a run the first one's prompt serves all, as a segment before them."""

    def __init__(self, ids: list[np.ndarray], prompt_lengths: list[int], runs: list[list[int]]) -> None:
        self._pieces: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []  # of each segment
        self._end = 0
        positions, predict = [], []
        for run in runs:
            prompt = prompt_lengths[run[0]]
            places = np.arange(self._end, self._end + prompt)
            shared = prompt if len(run) > 1 else 0  # tokens that are a segment of their own
            if shared:
                self._segment(ids[run[0]][:shared], places[:0])
                positions.append(np.arange(shared))
            for number in run:
                tokens = ids[number]
                first = self._end + prompt - shared  # of the response
                self._segment(tokens[shared:], places[:shared])
                positions.append(np.arange(shared, len(tokens)))
                predict.append(np.concatenate([places[-1:], np.arange(first, first + len(tokens) - prompt - 1)]))
        self.input_ids = np.concatenate(self._pieces)
        self.position_ids, self.predict = np.concatenate(positions), np.concatenate(predict)

    def _segment(self, tokens: np.ndarray, before: np.ndarray) -> None:
        """At the end of the row; its keys are those `before` and its own."""
        self._pieces.append(tokens)
        self._keys.append(np.concatenate([before, np.arange(self._end, self._end + len(tokens))]))
        self._end += len(tokens)

    def segments(self, put: Callable[..., torch.Tensor]) -> Segments:
        lengths, key_lengths = (tuple(map(len, parts)) for parts in (self._pieces, self._keys))
        cu_lengths = put(_offsets(np.array(lengths)), torch.int32)
        if key_lengths == lengths:
            return Segments(lengths, cu_lengths, lengths, cu_lengths, None)
        cu_keys = put(_offsets(np.array(key_lengths)), torch.int32)
        return Segments(lengths, cu_lengths, key_lengths, cu_keys, put(np.concatenate(self._keys)))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """By way of page-locked memory: from other memory the copy would wait until the GPU has done all that it was given so far."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
