"""Gradient of the sign–log matrix product on the CPU: two GEMMs, and the ladder where the forward was rejected.

    w_ikj = s_a s_b s_c exp(A_ik + B_kj − C_ij),  Σ_k w_ikj = 1      Ā_ik = Σ_j g_ij w_ikj,  B̄_kj = Σ_i g_ij w_ikj
    W = g / S,   Ā = E ∘ (W Fᵀ),   B̄ = F ∘ (Eᵀ W)

Symbols as in ladder.py; S is saved by the forward, +∞ where it was rejected, so that those outputs weigh nothing here
and are added afterwards in float64: by GEMMs where its range suffices, else term by term. The acceptance test bounds
what a lost factor would have weighed by u. g is scaled to at most 1 where it is larger, so that nothing overflows.
Derivation: docs/math/lns.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from so8t_torch.ops.lns import ladder
from so8t_torch.ops.lns.ladder import Operands

LEAST_SCALE = 2.0**-40
"""Below this size of g its products with small factors could leave the range; g is scaled up first."""


def matmul(g: Tensor, x: Operands, scaled: Tensor, log_c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of A (batch, M, K) and B (batch, K, N) for g = ∂/∂C (batch, M, N)."""
    size = float(torch.linalg.vector_norm(g, math.inf))
    usual = LEAST_SCALE <= size <= 1.0 or not 0.0 < size < math.inf
    scale = 1.0 if usual else math.ldexp(1.0, max(-math.frexp(size)[1], -126))
    weight = torch.div(g, scaled) if scale == 1.0 else torch.mul(g, scale).div_(scaled)
    left, right = ladder.factors(x, ladder.shifts(x.log_a, -1), ladder.shifts(x.log_b, -2))
    da = torch.matmul(weight, right.mT).mul_(left)
    db = torch.matmul(left.mT, weight).mul_(right)
    if scale != 1.0:
        da.div_(scale)
        db.div_(scale)
    if bool(scaled.amax() == math.inf):
        for index in range(g.shape[0]):
            rejected = (scaled[index] == math.inf) & (log_c[index] != -math.inf)
            _climb(g[index], x.item(index), rejected, da[index], db[index])
    return da, db


def _climb(g: Tensor, x: Operands, rejected: Tensor, da: Tensor, db: Tensor) -> None:
    """Add the part of the rejected outputs (M, N) of one batch item to the gradients, in float64."""
    if x.log_a.dtype != torch.float64 and ladder.worth_a_product(rejected):
        rows, columns = rejected.any(1).nonzero().squeeze(1), rejected.any(0).nonzero().squeeze(1)
        part = ladder.rescale(x.block(rows, columns, torch.float64))
        accepted = (part.total.abs() > part.bound) & rejected[rows][:, columns]
        weight = torch.where(accepted, g[rows][:, columns] / part.total, 0.0)
        da.index_add_(0, rows, (weight @ part.right.mT).mul_(part.left).to(da.dtype))
        db.index_add_(1, columns, (part.left.mT @ weight).mul_(part.right).to(db.dtype))
        i, j = accepted.nonzero(as_tuple=True)
        rejected[rows[i], columns[j]] = False
    columns_first = torch.zeros_like(db.mT, memory_format=torch.contiguous_format)
    for (i, j), total, _, _, weight in ladder.streamed(x, rejected):
        part_of_g = torch.where(total == 0, 0.0, g[i, j] / total)
        terms = weight.mul_(part_of_g[:, None]).to(da.dtype)
        da.index_add_(0, i, terms)
        columns_first.index_add_(0, j, terms)
    db.add_(columns_first.mT)
