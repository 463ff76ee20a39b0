"""Gradient of the sign–log matrix product on the CPU: two GEMMs, and the ladder where the forward was rejected.

    w_ikj = s_a s_b s_c exp(A_ik + B_kj − C_ij),  Σ_k w_ikj = 1      Ā_ik = Σ_j g_ij w_ikj,  B̄_kj = Σ_i g_ij w_ikj
    W = g / S,   Ā = E ∘ (W Fᵀ),   B̄ = F ∘ (Eᵀ W)

Symbols as in rescaling.py; S is saved by the forward, from whichever rung, and +∞ where it is lost in the floor of
the first: those outputs weigh nothing here and are added afterwards in float64, by GEMMs where its range suffices,
else term by term. Above the floor a lost factor would have weighed at most u. g is scaled to at most 1 where it is
larger, so that nothing overflows on any rung.
Derivation: docs/math/lns.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from so8t_torch.ops.lns import ladder, rescaling
from so8t_torch.ops.lns.ladder import Entries
from so8t_torch.ops.lns.rescaling import Operands

LEAST_SCALE = 2.0**-40
"""Below this size of g its products with small factors could leave the range; g is scaled up first."""


def matmul(g: Tensor, x: Operands, scaled: Tensor, log_c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of A (batch, M, K) and B (batch, K, N) for g = ∂/∂C (batch, M, N)."""
    lowest, highest = torch.aminmax(g)
    scale = _scale(float(torch.maximum(-lowest, highest)))
    g = g if scale == 1.0 else g * scale
    weight = torch.div(g, scaled)
    da, db = torch.empty_like(x.log_a), torch.empty_like(x.log_b)
    for part, left, right in rescaling.panels(x, rescaling.shifts(x.log_a, -1), rescaling.shifts(x.log_b, -2)):
        torch.mul(torch.matmul(weight, right.mT), left, out=da[..., part])
        torch.matmul(left.mT, weight, out=db[..., part, :]).mul_(right)
    if not bool(scaled.amax() < math.inf):
        rejected = (scaled == math.inf).nonzero()
        rejected = rejected[log_c[rejected.unbind(1)] != -math.inf]
        for index in rejected[:, 0].unique().tolist():
            _, i, j = rejected[rejected[:, 0] == index].unbind(1)
            _add_rejected(g[index, i, j], x.item(index), Entries(i, j, i == i), da[index], db[index])
    if scale != 1.0:
        da.div_(scale)
        db.div_(scale)
    return da, db


def _scale(size: float) -> float:
    """Return a power of two that takes the largest |g| below 1, and out of the reach of underflow."""
    if LEAST_SCALE <= size <= 1.0 or not 0.0 < size < math.inf:
        return 1.0
    return math.ldexp(1.0, min(max(-math.frexp(size)[1], -120), 120))


def _add_rejected(g: Tensor, x: Operands, rejected: Entries, da: Tensor, db: Tensor) -> None:
    """Add the part of the rejected outputs (n) of one batch item to the gradients, in float64."""
    if x.log_a.dtype != torch.float64 and rejected.worth_a_product(x):
        rows, columns, row, column = rejected.frame(x)
        part = x.block(rows, columns, torch.float64)
        found = rescaling.rescale(part)
        total = found.total[row, column]
        accepted = total.abs() > found.bound.expand_as(found.total)[row, column]
        weight = torch.zeros_like(found.total)
        weight[row[accepted], column[accepted]] = g[accepted] / total[accepted]
        for terms, left, right in rescaling.panels(part, found.shift_a, found.shift_b):
            da[:, terms].index_add_(0, rows, (weight @ right.mT).mul_(left).to(da.dtype))
            db[terms].index_add_(1, columns, (left.mT @ weight).mul_(right).to(db.dtype))
        g, rejected = g[~accepted], rejected.where(~accepted)
    done = 0
    for (i, j), total, _, _, share in ladder.streamed(x, rejected):
        weight = torch.where(total == 0, 0.0, g[done : done + i.numel()] / total)
        done += i.numel()
        share = share.mul_(weight[:, None]).to(da.dtype)
        da.index_add_(0, i, share)
        db.mT.index_add_(0, j, share)
