"""The cross-entropy of a dense head without its logits, whose gradient is made where the logits are.

    loss = Σ_n log Σ_v exp(z_nv) − z_n,y(n),  z = H Wᵀ        G = softmax(z) − onehot(y):   dH = G W,  dW = Gᵀ H

Tokens go through the head in chunks, and a chunk's logits become its G in place: three products of matrices as with
whole logits, none of them twice, and a few megabytes instead of (N, V) numbers three times over.

Symbols: H hidden states (N, D), W the weight of the head (V, D), y targets (N,); n runs over targets that count.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from so8t_torch.core import forward_mode
from so8t_torch.core.errors import TrainingError
from so8t_torch.core.pages import allocate
from so8t_torch.core.precision import accumulation_dtype, autocast_dtype, without_autocast

__all__ = ["head_loss", "is_plain"]

CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at once: 64 MB in float32."""


def is_plain(head: nn.Module, hidden: Tensor) -> bool:
    """Return whether a head is a linear map and nothing else: not quantised, adapted, in shards, traced or watched.

    Nor in float16: a scale of the loss that keeps small gradients would come after G had lost them.

    Args:
        head: module from hidden states to logits.
        hidden: what it is given.
    """
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter or head.bias is not None:
        return False
    watched = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    narrow = (autocast_dtype(hidden) or hidden.dtype) == torch.float16
    traced = torch.compiler.is_compiling() or forward_mode.reasons(hidden, head.weight)
    return not (narrow or watched or traced or "forward" in vars(head))


def head_loss(
    hidden: Float[Tensor, "*batch d"], weight: Float[Tensor, "v d"], targets: Int[Tensor, "*batch"], ignore: int
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy in float32 (float64 for float64), for one backward pass.

    Args:
        hidden: H.
        weight: W.
        targets: y.
        ignore: the target that counts for nothing.

    Raises:
        TrainingError: in a second backward pass, or one with a graph of its own.
    """
    kind = autocast_dtype(hidden) or hidden.dtype
    rows, matrix = hidden.flatten(0, -2).to(kind), weight.to(kind)
    with without_autocast(hidden.device):
        # inside of a function of autograd gradients are off
        wanted = torch.is_grad_enabled()
        return _HeadLoss.apply(rows, matrix, targets.flatten(), ignore, wanted)


class _HeadLoss(torch.autograd.Function):
    """The sum over chunks, which keeps its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore: int, wanted: bool) -> Tensor:
        sums = accumulation_dtype(hidden.dtype)
        total = hidden.new_zeros((), dtype=sums)
        dhidden = torch.empty_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        dweight = _zeros(weight, sums) if wanted and ctx.needs_input_grad[1] else None
        size = max(1, CHUNK_ELEMENTS // len(weight))
        for first in range(0, len(hidden), size):
            places = slice(first, first + size)
            kept = (targets[places] != ignore)[:, None]
            aims = torch.where(kept, targets[places, None], 0)
            rows = torch.where(kept, hidden[places], 0.0)
            scores = _scores(rows, weight).to(sums)
            peak = scores.amax(1, keepdim=True)
            aimed = scores.gather(1, aims) - peak
            share = scores.sub_(peak).exp_()
            norm = share.sum(1, keepdim=True)
            total += torch.where(kept, norm.log() - aimed, 0.0).sum()
            if dhidden is None and dweight is None:
                continue
            share.mul_(kept / norm)
            # at the target p − 1 without cancellation
            share.scatter_(1, aims, torch.where(kept, torch.expm1(aimed - norm.log()), 0.0))
            slope = share.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(slope, weight, out=dhidden[places])
            if dweight is not None:
                dweight = _added(dweight, slope, rows)
        ctx.found, ctx.kind = (dhidden, dweight), weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None or torch.is_grad_enabled():
            got = "a second" if ctx.found is None else "one that is to be differentiated"
            raise TrainingError(f"head_loss: expected one plain backward pass, got {got}; ask for logits, too.")
        # handed on, not copied
        (dhidden, dweight), ctx.found = ctx.found, None
        scaled = (None if part is None else part.mul_(grad).to(ctx.kind) for part in (dhidden, dweight))
        return *scaled, None, None, None


def _scores(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows · weightᵀ."""
    if rows.device.type != "cpu":
        return rows @ weight.mT
    return torch.mm(rows, weight.mT, out=allocate((len(rows), len(weight)), rows.dtype))


def _zeros(weight: Tensor, kind: torch.dtype) -> Tensor:
    """Return zeros for the gradient of the head."""
    if weight.device.type != "cpu":
        return torch.zeros_like(weight, dtype=kind)
    return allocate(tuple(weight.shape), kind).zero_()


def _added(total: Tensor, slope: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of the gradient so far and a chunk's, in the dtype of the sum."""
    if total.dtype == slope.dtype:
        return total.addmm_(slope.mT, rows)
    return total.add_(slope.mT @ rows)
