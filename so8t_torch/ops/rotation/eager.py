"""Rotations acting on channels, in plain PyTorch: apply, compose, measure, fold.

    y_k = R_k x_k  on block k of eight channels

Sums are carried in float32, in float64 for float64 input. Folding is carried in float64 and rounded once; no dense
D×D matrix is ever formed. Derivation: docs/math/rotation.md
"""

from __future__ import annotations

import torch
from torch import Tensor

from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops.rotation import charts


def apply_plain(rotation: Tensor, x: Tensor) -> Tensor:
    """Return R x per block by one batched product; every derivative of it exists."""
    wide = accumulation_dtype(x.dtype)
    y = torch.einsum("nij,...nj->...ni", rotation.to(wide).expand(x.shape[-1] // 8, 8, 8), x.to(wide).unflatten(-1, (-1, 8)))
    return y.flatten(-2).to(x.dtype)


def compose(safe: Tensor, cmd: Tensor) -> Tensor:
    """Return R_cmd R_safe."""
    dtype = torch.promote_types(safe.dtype, cmd.dtype)
    wide = accumulation_dtype(dtype)
    return (cmd.to(wide) @ safe.to(wide)).to(dtype)


def bracket(a: Tensor, b: Tensor) -> Tensor:
    """Return the coordinates of AB − BA."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = accumulation_dtype(dtype)
    AB = charts.skew(a.to(wide)) @ charts.skew(b.to(wide))
    return charts.unskew(AB - AB.mT).to(dtype)


def commutator_distance(safe: Tensor, cmd: Tensor) -> Tensor:
    """Return the Frobenius norm of R_c R_s R_cᵀ R_sᵀ − I."""
    dtype = torch.promote_types(safe.dtype, cmd.dtype)
    s, c = safe.double(), cmd.double()
    commutator = c @ s @ c.mT @ s.mT
    identity = torch.eye(8, dtype=commutator.dtype, device=commutator.device)
    return torch.linalg.matrix_norm(commutator - identity).to(dtype)


def orthogonality_error(rotation: Tensor) -> Tensor:
    """Return the largest entry of |RᵀR − I| of each matrix."""
    R = rotation.double()
    return (R.mT @ R - torch.eye(8, dtype=R.dtype, device=R.device)).abs().amax((-2, -1))


def determinant_error(rotation: Tensor) -> Tensor:
    """Return |det R − 1| of each matrix."""
    return (torch.linalg.det(rotation.double()) - 1).abs()


def isometry_error(rotation: Tensor, x: Tensor) -> Tensor:
    """Return the largest relative change of a block's length; a block of zeros keeps its length."""
    blocks = x.double().unflatten(-1, (-1, 8))
    before = torch.linalg.vector_norm(blocks, dim=-1)
    after = torch.linalg.vector_norm(torch.einsum("nij,...nj->...ni", rotation.double().expand(blocks.shape[-2], 8, 8), blocks), dim=-1)
    return torch.where(before == 0, 0.0, (after / before - 1).abs()).amax(-1)


def fold_output(weight: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (R W, R b): rows 8k … 8k+7 of W are multiplied by R_k."""
    R = rotation.double()
    W = (R @ weight.double().unflatten(-2, (-1, 8))).flatten(-3, -2).to(weight.dtype)
    if bias is None:
        return W, None
    return W, (R @ bias.double().unflatten(-1, (-1, 8, 1))).flatten(-3).to(bias.dtype)


def fold_input(weight: Tensor, rotation: Tensor) -> Tensor:
    """Return W R: columns 8k … 8k+7 of W are multiplied by R_k from the right."""
    W = weight.double().unflatten(-1, (-1, 8)).transpose(-3, -2)
    return (W @ rotation.double()).transpose(-3, -2).flatten(-2).to(weight.dtype)
