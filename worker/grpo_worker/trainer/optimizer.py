"""AdamW over sharded parameters: global-norm clipping, skipped non-finite updates, states that may live on the host.

Invariant: an update with a non-finite gradient norm changes nothing, and where the states rest between updates changes
no bit of the result. Parameters of one dimension (norms, biases) have no weight decay.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo_worker.config.actor import Optim
from grpo_worker.trainer.distributed import Ranks
from grpo_worker.trainer.model import PolicyModel, named_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    skipped: bool


class PolicyOptimizer:
    """`step` applies and clears the gradients that backward passes left."""

    def __init__(self, model: PolicyModel, options: Optim, ranks: Ranks, offload: bool) -> None:
        self.options = options
        self.ranks = ranks
        self.offload = offload
        self.parameters: dict[str, nn.Parameter] = dict(named_parameters(model))
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        others = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        on_cuda = _local(next(iter(self.parameters.values()))).device.type == "cuda"
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=options.lr,
            betas=(options.betas[0], options.betas[1]),
            eps=options.eps,
            fused=True if on_cuda else None,
            foreach=None if on_cuda else True,
        )
        # The states exist from the start: loading a checkpoint then writes into them, whatever was run before.
        for parameter in self.parameters.values():
            device = parameter.device if on_cuda else "cpu"
            self.adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS},
            }
        if self.offload:
            self.rest()

    def step(self, lr: float) -> StepResult:
        """One update at rate `lr`. Collective."""
        gradients = [_local(p.grad) for p in self.parameters.values() if p.grad is not None]
        norm = self._global_norm(gradients)
        skipped = not math.isfinite(norm)
        if not skipped:
            if norm > self.options.clip_grad:
                torch._foreach_mul_(gradients, self.options.clip_grad / (norm + CLIP_EPSILON))
            self._move(None, pin=False)  # where they were at rest
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            if self.offload:
                self.rest()
        self.forget_gradients()
        return StepResult(norm, skipped)

    def forget_gradients(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def rest(self) -> None:
        """States to the host, where they wait in page-locked memory for the next step."""
        self._move(torch.device("cpu"), pin=self.ranks.device.type == "cuda")

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The live state tensors by parameter name; writing into them is loading."""
        return {name: dict(self.adamw.state[parameter]) for name, parameter in self.parameters.items()}

    def _global_norm(self, gradients: list[Tensor]) -> float:
        """L2 norm over all parameters. Each element is in one shard of each replica.

        Summed over replicas too: one collective of all ranks gives all of them the same bits, so replicas never drift apart.
        """
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        squares = norms.double().square().sum()
        if self.ranks.world_size > 1:
            squares = squares.to(self.ranks.device)
            dist.all_reduce(squares)
            squares /= self.ranks.replicas
        return math.sqrt(float(squares))

    def _move(self, device: torch.device | None, pin: bool) -> None:
        """To `device`, or to where the parameters are; what is there stays as it is."""
        anything = False
        for parameter in self.parameters.values():
            state = self.adamw.state[parameter]
            target = device or _local(parameter).device
            for name in MOMENTS:
                local = _local(state[name])
                if local.device == target:
                    continue
                if pin:
                    moved = torch.empty(local.shape, dtype=local.dtype, device=target, pin_memory=True)
                    moved.copy_(local, non_blocking=True)
                else:
                    moved = local.to(target, non_blocking=True)
                _set_local(state[name], moved)
                anything = True
        if anything and self.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _set_local(tensor: Tensor, local: Tensor) -> None:
    assert isinstance(tensor, DTensor)
    tensor._local_tensor = local
