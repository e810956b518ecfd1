"""Log-prob and entropy of chosen tokens straight from hidden states.

Invariant: no tensor of [tokens, vocabulary] ever exists: the LM head runs over chunks of tokens, forward and
backward, and the backward pass computes a chunk's logits again instead of keeping them, the last chunk's excepted, with
which it begins: all are computed once where one chunk is enough. What is kept beside is one number a token.

With z = logits / temperature and p = softmax(z):  log-prob = z[chosen] - logsumexp(z),  H = logsumexp(z) - sum(p z),
d log-prob / dz = onehot - p,  dH / dz = -p (z - logsumexp(z) + H). The matrix product runs in the compute dtype and
the rest in float32, as in vLLM.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ChunkForward = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def _chunk_forward(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy, logsumexp), each float32 [chunk], of logits [chunk, vocabulary]."""
    z = logits.float() / temperature
    maximum = z.amax(dim=-1, keepdim=True)
    shifted = z - maximum
    exponentials = shifted.exp()
    total = exponentials.sum(dim=-1)
    log_total = total.log()
    chosen = shifted.gather(-1, targets[:, None]).squeeze(-1)
    entropy = log_total - (exponentials * shifted).sum(dim=-1) / total
    return chosen - log_total, entropy, log_total + maximum.squeeze(-1)


def _chunk_backward(
    logits: Tensor, targets: Tensor, log_sum: Tensor, grad_log_probs: Tensor, temperature: float
) -> Tensor:
    """d loss / d logits, in the dtype of the logits [chunk, vocabulary]."""
    log_p = logits.float() / temperature - log_sum[:, None]
    columns = torch.arange(logits.shape[-1], device=logits.device)
    onehot = (columns[None, :] == targets[:, None]).to(log_p.dtype)
    return ((onehot - log_p.exp()) * (grad_log_probs[:, None] / temperature)).to(logits.dtype)


def _chunk_backward_with_entropy(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor,
    temperature: float,
) -> Tensor:
    log_p = logits.float() / temperature - log_sum[:, None]
    p = log_p.exp()
    columns = torch.arange(logits.shape[-1], device=logits.device)
    onehot = (columns[None, :] == targets[:, None]).to(log_p.dtype)
    grad = (onehot - p) * grad_log_probs[:, None] - p * (log_p + entropy[:, None]) * grad_entropy[:, None]
    return (grad / temperature).to(logits.dtype)


class ChunkKernels:
    """The three elementwise kernels, fused by torch.compile where that is asked for (each logit is then read once)."""

    def __init__(self, compile: bool = False) -> None:
        def fuse(function: Any) -> Any:
            if not compile:
                return function
            compiled: Any = torch.compile(function, dynamic=True)

            def fused(logits: Tensor, *others: Any) -> Any:
                # Copies of what is one number a token: for a view that begins elsewhere in its memory it would be compiled again.
                return compiled(logits, *(each.clone() if isinstance(each, Tensor) else each for each in others))

            return fused

        self.forward: ChunkForward = fuse(_chunk_forward)
        self.backward = fuse(_chunk_backward)
        self.backward_with_entropy = fuse(_chunk_backward_with_entropy)


EAGER = ChunkKernels()


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        kernels: ChunkKernels,
    ) -> tuple[Tensor, Tensor]:
        log_probs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropy, log_sum = torch.empty_like(log_probs), torch.empty_like(log_probs)
        logits = None
        for start in range(0, len(targets), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = hidden[rows] @ weight.t()
            log_probs[rows], entropy[rows], log_sum[rows] = kernels.forward(logits, targets[rows], temperature)
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropy)
        ctx.last_logits = logits if any(ctx.needs_input_grad) else None
        ctx.temperature, ctx.chunk_tokens, ctx.kernels = temperature, chunk_tokens, kernels
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        hidden, weight, targets, log_sum, entropy = ctx.saved_tensors
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_sum)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are summed in float32: in bfloat16 the small late terms would be lost.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in reversed(range(0, len(targets), ctx.chunk_tokens)):
            rows = slice(start, start + ctx.chunk_tokens)
            logits = hidden[rows] @ weight.t() if ctx.last_logits is None else ctx.last_logits
            ctx.last_logits = None
            common = (logits, targets[rows], log_sum[rows])
            if grad_entropy is None:
                grad_logits = ctx.kernels.backward(*common, grad_log_probs[rows], ctx.temperature)
            else:
                grad_logits = ctx.kernels.backward_with_entropy(
                    *common, entropy[rows], grad_log_probs[rows], grad_entropy[rows], ctx.temperature
                )
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 4096,
    kernels: ChunkKernels = EAGER,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), float32 [tokens], of `targets` [tokens] under hidden [tokens, width] @ weight
    [vocabulary, width].T.

    Both carry gradients; the entropy's costs nothing while no loss uses it.
    """
    return _ChunkedLogProbs.apply(hidden, weight, targets, temperature, chunk_tokens, kernels)
