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

from so8t_torch.core import backend as backends
from so8t_torch.core import forward_mode
from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.core.tensors import expect_tensors
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
    """Return the skew matrix whose strict upper triangle, row by row, is ``coordinates``.

    Args:
        coordinates: 28 numbers per block, in radians.

    Raises:
        ShapeError: the last axis is not 28 long.
        DomainError: the dtype is not a real floating one; this and the device are checked in every function here.
    """
    _check_trailing("skew", "coordinates", coordinates, (28,))
    return charts.skew(coordinates)


def unskew(matrix: Float[Tensor, "*batch 8 8"]) -> Float[Tensor, "*batch 28"]:
    """Return the coordinates of the skew part (M − Mᵀ)/2.

    Raises:
        ShapeError: the last two axes are not 8 × 8.
    """
    _check_trailing("unskew", "matrix", matrix, (8, 8))
    return charts.unskew(matrix)


def exponential(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 8 8"]:
    """Return the rotation exp(A).

    Args:
        coordinates: 28 numbers per block, in radians; the norms of the blocks may differ by any factor.

    Returns:
        Rotations in the dtype of ``coordinates``, computed in float64 and rounded once.

    Raises:
        ShapeError: the last axis is not 28 long.

    Numerics:
        The error grows as the norm, about 4·eps(float64)·|a|: from |a| ≈ 1e14 on an angle means nothing, and far beyond
        that the answer is NaN. On devices other than a CPU, where the norms are not read back, blocks with |a| > 2¹²
        come out NaN rather than wrong.
    """
    _check_trailing("exponential", "coordinates", coordinates, (28,))
    if forward_mode.reasons(coordinates):
        return charts.exponential(coordinates)
    rotation: Tensor = autograd.exponential(coordinates)
    return rotation


def cayley(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 8 8"]:
    """Return the rotation (I − A/2)⁻¹(I + A/2), which agrees with exp(A) to second order and never turns by π.

    Args:
        coordinates: 28 numbers per block; an eigenvalue ±iλ of A becomes a rotation by 2·atan(λ/2).

    Raises:
        ShapeError: the last axis is not 28 long.
    """
    _check_trailing("cayley", "coordinates", coordinates, (28,))
    return charts.cayley(coordinates)


def logarithm(rotation: Float[Tensor, "*batch 8 8"], cut_margin: float = 1e-3) -> Float[Tensor, "*batch 28"]:
    """Return the coordinates of the skew part of the principal logarithm, angles in (−π, π).

    Args:
        rotation: rotations; also matrices near one, where it is the principal logarithm of that matrix.
        cut_margin: least distance of an angle from π, in radians, at which the answer is still given; positive.

    Raises:
        ShapeError: the last two axes are not 8 × 8.
        DomainError: an angle is nearer to π than that, an entry is not finite, or the matrix is no rotation
            (max |RᵀR − I| > 1/2). Reading it synchronises a device.
    """
    _check_trailing("logarithm", "rotation", rotation, (8, 8))
    if forward_mode.reasons(rotation):
        charts.away_from_cut(rotation, cut_margin)
        return charts.logarithm(rotation)
    return charts.logarithm(autograd.away_from_cut(rotation, cut_margin))


def apply(
    rotation: Float[Tensor, "blocks 8 8"], x: Float[Tensor, "*batch channels"], *, backend: str = "auto"
) -> Float[Tensor, "*batch channels"]:
    """Return R x on each block of eight channels.

    Args:
        rotation: one per block, or one shared by all; kept in float32 beside half-precision channels.
        x: channels, their number divisible by 8.
        backend: ``"triton"``, ``"eager"``, or ``"auto"`` for the first of these that can run.

    Returns:
        The rotated channels in the dtype of ``x``; sums are carried in float32, in float64 for float64.

    Raises:
        ShapeError: widths that do not match.
        BackendError: the requested backend cannot run this call; the text says why. ``explain_backend`` says it
            beforehand.
    """
    _check_blocks("apply", rotation, x, "x")
    chosen = backends.choose("apply", backend, _candidates(rotation, x))
    if forward_mode.reasons(rotation, x):
        return eager.rotate_plain(rotation, x)
    y: Tensor = (autograd.rotate_triton if chosen == "triton" else autograd.rotate_eager)(rotation, x)
    return y


def explain_backend(rotation: Tensor, x: Tensor) -> str:
    """Return, for each backend of ``apply``, that it can run this call or every reason why not."""
    return backends.explain(_candidates(rotation, x))


def compose(safe: Float[Tensor, "*batch 8 8"], cmd: Float[Tensor, "*batch 8 8"]) -> Float[Tensor, "*batch 8 8"]:
    """Return R_cmd R_safe: safe acts first.

    Raises:
        ShapeError: the last two axes are not 8 × 8.
    """
    _check_trailing("compose", "safe", safe, (8, 8))
    _check_trailing("compose", "cmd", cmd, (8, 8))
    return eager.compose(safe, cmd)


def bracket(a: Float[Tensor, "*batch 28"], b: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 28"]:
    """Return the coordinates of the Lie bracket AB − BA.

    Raises:
        ShapeError: the last axis is not 28 long.
    """
    _check_trailing("bracket", "a", a, (28,))
    _check_trailing("bracket", "b", b, (28,))
    return eager.bracket(a, b)


def commutator_distance(safe: Float[Tensor, "*batch 8 8"], cmd: Float[Tensor, "*batch 8 8"]) -> Float[Tensor, "*batch"]:
    """Return ‖R_cmd R_safe R_cmdᵀ R_safeᵀ − I‖_F, between 0 for rotations that commute and 4√2.

    Raises:
        ShapeError: the last two axes are not 8 × 8.
    """
    _check_trailing("commutator_distance", "safe", safe, (8, 8))
    _check_trailing("commutator_distance", "cmd", cmd, (8, 8))
    return eager.commutator_distance(safe, cmd)


def orthogonality_error(rotation: Float[Tensor, "*batch 8 8"]) -> Float[Tensor, "*batch"]:
    """Return max |RᵀR − I| of each matrix, in float64; a monitor, never a loss.

    Raises:
        ShapeError: the last two axes are not 8 × 8.
    """
    _check_trailing("orthogonality_error", "rotation", rotation, (8, 8))
    return eager.orthogonality_error(rotation)


def determinant_error(rotation: Float[Tensor, "*batch 8 8"]) -> Float[Tensor, "*batch"]:
    """Return |det R − 1| of each matrix, in float64: 2 for a reflection; a monitor, never a loss.

    Raises:
        ShapeError: the last two axes are not 8 × 8.
    """
    _check_trailing("determinant_error", "rotation", rotation, (8, 8))
    return eager.determinant_error(rotation)


def isometry_error(
    rotation: Float[Tensor, "blocks 8 8"], x: Float[Tensor, "*batch channels"]
) -> Float[Tensor, "*batch"]:
    """Return max over blocks |‖R x‖/‖x‖ − 1|, in float64; a block of zeros keeps its length and counts 0.

    Raises:
        ShapeError: widths that do not match.
    """
    _check_blocks("isometry_error", rotation, x, "x")
    return eager.isometry_error(rotation, x)


def fold_output(
    weight: Float[Tensor, "*batch outputs inputs"],
    bias: Float[Tensor, "*batch outputs"] | None,
    rotation: Float[Tensor, "blocks 8 8"],
) -> tuple[Float[Tensor, "*batch outputs inputs"], Float[Tensor, "*batch outputs"] | None]:
    """Return (R W, R b): one linear layer that equals the layer followed by the rotation.

    Args:
        weight: rows are outputs, their number divisible by 8.
        bias: added to the outputs, or ``None``.
        rotation: one per block of eight outputs, or one shared by all.

    Returns:
        Weight and bias in their own dtypes, computed in float64 and rounded once.

    Raises:
        ShapeError: widths that do not match.
    """
    _check_blocks("fold_output", rotation, weight, "weight", axis=-2)
    _check_bias("fold_output", weight, bias)
    return eager.fold_output(weight, bias, rotation)


def unfold_output(
    weight: Float[Tensor, "*batch outputs inputs"],
    bias: Float[Tensor, "*batch outputs"] | None,
    rotation: Float[Tensor, "blocks 8 8"],
) -> tuple[Float[Tensor, "*batch outputs inputs"], Float[Tensor, "*batch outputs"] | None]:
    """Return (Rᵀ W, Rᵀ b), the inverse of ``fold_output`` up to one rounding.

    Raises:
        ShapeError: widths that do not match.
    """
    _check_blocks("unfold_output", rotation, weight, "weight", axis=-2)
    _check_bias("unfold_output", weight, bias)
    return eager.fold_output(weight, bias, rotation.mT)


def fold_input(
    weight: Float[Tensor, "*batch outputs inputs"], rotation: Float[Tensor, "blocks 8 8"]
) -> Float[Tensor, "*batch outputs inputs"]:
    """Return W R: one linear layer that equals the layer preceded by the rotation.

    Raises:
        ShapeError: widths that do not match.
    """
    _check_blocks("fold_input", rotation, weight, "weight")
    return eager.fold_input(weight, rotation)


def unfold_input(
    weight: Float[Tensor, "*batch outputs inputs"], rotation: Float[Tensor, "blocks 8 8"]
) -> Float[Tensor, "*batch outputs inputs"]:
    """Return W Rᵀ, the inverse of ``fold_input`` up to one rounding.

    Raises:
        ShapeError: widths that do not match.
    """
    _check_blocks("unfold_input", rotation, weight, "weight")
    return eager.fold_input(weight, rotation.mT)


def _candidates(rotation: Tensor, x: Tensor) -> tuple[backends.Candidate, ...]:
    reasons = backends.triton_reasons(x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons += (f"its kernels take float32, bfloat16 and float16 channels, not {x.dtype}",)
    if rotation.device != x.device:
        reasons += (f"rotation is on {rotation.device}, x on {x.device}",)
    reasons += forward_mode.reasons(rotation, x)
    return backends.Candidate("triton", reasons), backends.Candidate("eager")


def _check_floating(op: str, **tensors: Tensor) -> None:
    expect_tensors(op, **tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DomainError(f"{op}: expected {name} of a real floating dtype, got {tensor.dtype}; convert it first.")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ShapeError(f"{op}: expected all tensors on one device, got {places}; move them together.")


def _check_trailing(op: str, name: str, tensor: Tensor, trailing: tuple[int, ...]) -> None:
    _check_floating(op, **{name: tensor})
    if tuple(tensor.shape[-len(trailing) :]) != trailing:
        wanted = ", ".join(map(str, trailing))
        raise ShapeError(f"{op}: expected {name} of shape (…, {wanted}), got {tuple(tensor.shape)}.")


def _check_blocks(op: str, rotation: Tensor, tensor: Tensor, name: str, axis: int = -1) -> None:
    _check_floating(op, rotation=rotation, **{name: tensor})
    if rotation.ndim != 3 or rotation.shape[1:] != (8, 8):
        raise ShapeError(f"{op}: expected rotations of shape (blocks, 8, 8), got {tuple(rotation.shape)}.")
    if tensor.ndim < -axis:
        raise ShapeError(f"{op}: expected {name} with at least {-axis} axes, got shape {tuple(tensor.shape)}.")
    channels = tensor.shape[axis]
    if channels % 8:
        raise ShapeError(
            f"{op}: expected a number of channels divisible by 8, got {channels}; rotate a layer whose width is, "
            "padding would change the model."
        )
    if rotation.shape[0] not in (1, channels // 8):
        raise ShapeError(
            f"{op}: expected {channels // 8} rotations for {channels} channels, or 1 shared by all blocks, got "
            f"{rotation.shape[0]}."
        )


def _check_bias(op: str, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    _check_floating(op, weight=weight, bias=bias)
    if bias.ndim == 0 or bias.shape[-1] != weight.shape[-2]:
        raise ShapeError(f"{op}: expected a bias of {weight.shape[-2]} outputs, got shape {tuple(bias.shape)}.")
