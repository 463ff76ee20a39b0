"""Rotations of blocks of eight channels: so(8) → SO(8), apply, compose, measure, fold.

    y = R x on each block of eight channels,   R = exp(A) or (I − A/2)⁻¹(I + A/2),   A = −Aᵀ ∈ so(8)

x: channels (…, D) with D = 8n; R: one rotation per block (n, 8, 8) or one for all (1, 8, 8); A: 28 coordinates per
block. Column operator: rows in memory are y = x Rᵀ. Order: R_cmd R_safe, safe acts first.
Cost: 64 multiply-adds per eight channels forward, 128 backward. Twin: so8t_jax/ops/rotation.py.
Derivation: docs/math/rotation.md
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.core.errors import ShapeError
from so8t_torch.ops.rotation import autograd, charts, eager

__all__ = [
    "apply",
    "bracket",
    "cayley",
    "commutator_distance",
    "compose",
    "determinant_error",
    "exponential",
    "fold_input",
    "fold_output",
    "isometry_error",
    "logarithm",
    "orthogonality_error",
    "skew",
    "unfold_input",
    "unfold_output",
    "unskew",
]


def skew(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 8 8"]:
    """Return the skew matrix whose strict upper triangle, row by row, is ``coordinates``."""
    return charts.skew(coordinates)


def unskew(matrix: Float[Tensor, "*batch 8 8"]) -> Float[Tensor, "*batch 28"]:
    """Return the coordinates of the skew part of ``matrix``."""
    return charts.unskew(matrix)


def exponential(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 8 8"]:
    """Return exp(A), a rotation."""
    return autograd.exponential(coordinates)


def cayley(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 8 8"]:
    """Return (I − A/2)⁻¹(I + A/2), a rotation without eigenvalue −1."""
    return charts.cayley(coordinates)


def logarithm(rotation: Float[Tensor, "*batch 8 8"], cut_margin: float = 1e-3) -> Float[Tensor, "*batch 28"]:
    """Return the coordinates of the principal logarithm."""
    return charts.logarithm(rotation, cut_margin)


def apply(
    rotation: Float[Tensor, "blocks 8 8"], x: Float[Tensor, "*batch channels"], *, backend: str = "auto"
) -> Float[Tensor, "*batch channels"]:
    """Return R x on each block of eight channels."""
    _check_blocks("apply", rotation, x.shape[-1])
    return autograd.rotate_eager(rotation, x)


compose = eager.compose
bracket = eager.bracket
commutator_distance = eager.commutator_distance
orthogonality_error = eager.orthogonality_error
determinant_error = eager.determinant_error


def isometry_error(rotation: Tensor, x: Tensor) -> Tensor:
    """Return the largest relative change of a block's length."""
    _check_blocks("isometry_error", rotation, x.shape[-1])
    return eager.isometry_error(rotation, x)


def fold_output(weight: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (R W, R b), the linear layer followed by the rotation."""
    _check_blocks("fold_output", rotation, weight.shape[-2])
    return eager.fold_output(weight, bias, rotation)


def unfold_output(weight: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (Rᵀ W, Rᵀ b), the inverse of ``fold_output``."""
    return fold_output(weight, bias, rotation.mT)


def fold_input(weight: Tensor, rotation: Tensor) -> Tensor:
    """Return W R, the linear layer preceded by the rotation."""
    _check_blocks("fold_input", rotation, weight.shape[-1])
    return eager.fold_input(weight, rotation)


def unfold_input(weight: Tensor, rotation: Tensor) -> Tensor:
    """Return W Rᵀ, the inverse of ``fold_input``."""
    return fold_input(weight, rotation.mT)


def _check_blocks(op: str, rotation: Tensor, channels: int) -> None:
    if rotation.ndim < 3 or rotation.shape[-2:] != (8, 8):
        raise ShapeError(f"{op}: expected rotations of shape (blocks, 8, 8), got {tuple(rotation.shape)}.")
    if channels % 8:
        raise ShapeError(f"{op}: expected a number of channels divisible by 8, got {channels}.")
    if rotation.shape[-3] not in (1, channels // 8):
        raise ShapeError(
            f"{op}: expected {channels // 8} rotations for {channels} channels, or 1 shared by all blocks; "
            f"got {rotation.shape[-3]}."
        )
