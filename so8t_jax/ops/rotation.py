"""Rotations of blocks of eight channels: so(8) → SO(8), apply, compose, measure, fold.

    y = R x on each block of eight channels,   R = exp(A) or (I − A/2)⁻¹(I + A/2),   A = −Aᵀ ∈ so(8)

Symbols: A is a skew 8×8 matrix given by 28 coordinates a (strict upper triangle, row by row, radians); R ∈ SO(8); x a
vector of 8n channels, rotated by n rotations (n, 8, 8) or by one for all (1, 8, 8). Column operator: R_cmd R_safe
means that safe acts first. Everything here is ONE example; batch with ``jax.vmap``.
Cost: 64 multiply-adds per eight channels. Derivation: docs/math/rotation.md.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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

ROW, COLUMN = np.triu_indices(8, 1)
ROOTS, ROOT_ITERATIONS, ATANH_TERMS = 3, 16, 14


def skew(coordinates: Float[Array, " 28"]) -> Float[Array, "8 8"]:
    """Return the skew matrix whose strict upper triangle, row by row, is ``coordinates``."""
    upper = jnp.zeros((8, 8), coordinates.dtype).at[ROW, COLUMN].set(coordinates)
    return upper - upper.T


def unskew(matrix: Float[Array, "8 8"]) -> Float[Array, " 28"]:
    """Return the coordinates of the skew part (M − Mᵀ)/2."""
    return ((matrix - matrix.T) / 2)[ROW, COLUMN]


def exponential(coordinates: Float[Array, " 28"]) -> Float[Array, "8 8"]:
    """Return the rotation exp(A)."""
    return jax.scipy.linalg.expm(skew(coordinates))


def cayley(coordinates: Float[Array, " 28"]) -> Float[Array, "8 8"]:
    """Return the rotation (I − A/2)⁻¹(I + A/2), which agrees with exp(A) to second order and never turns by π."""
    half = skew(coordinates) / 2
    identity = jnp.eye(8, dtype=half.dtype)
    return jnp.linalg.solve(identity - half, identity + half)


def logarithm(rotation: Float[Array, "8 8"], cut_margin: float = 1e-3) -> Float[Array, " 28"]:
    """Return the coordinates of the skew part of the principal logarithm: log R = 2ᵏ⁺¹ atanh((S − I)(S + I)⁻¹).

    Args:
        rotation: a rotation, or a matrix near one.
        cut_margin: least distance of an angle from π, in radians, at which the answer is still given.

    Returns:
        28 coordinates; all NaN where an angle is nearer to π than ``cut_margin``, for there is no principal value.
    """
    identity = jnp.eye(8, dtype=rotation.dtype)
    nearest = jnp.linalg.svd(jax.lax.stop_gradient(rotation) + identity, compute_uv=False)[-1]
    S = rotation
    for _ in range(ROOTS):
        S = _square_root(S)
    C = jnp.linalg.solve(S + identity, S - identity)
    square, power, total = C @ C, C, C
    for k in range(1, ATANH_TERMS):
        power = power @ square
        total = total + power / (2 * k + 1)
    log = unskew(2.0 ** (ROOTS + 1) * total)
    return jnp.where(nearest > 2 * math.sin(cut_margin / 2), log, jnp.nan)


def _square_root(matrix: Float[Array, "8 8"]) -> Float[Array, "8 8"]:
    """Return the principal square root by the Denman–Beavers iteration."""

    def step(_: Array, roots: tuple[Array, Array]) -> tuple[Array, Array]:
        Y, Z = roots
        return (Y + jnp.linalg.inv(Z)) / 2, (Z + jnp.linalg.inv(Y)) / 2

    # a loop, so that one step is compiled and not all of them
    return jax.lax.fori_loop(0, ROOT_ITERATIONS, step, (matrix, jnp.eye(8, dtype=matrix.dtype)))[0]


def apply(rotation: Float[Array, "blocks 8 8"], x: Float[Array, " channels"]) -> Float[Array, " channels"]:
    """Return R x on each block of eight channels."""
    blocks = x.reshape(-1, 8)
    R = jnp.broadcast_to(rotation, (blocks.shape[0], 8, 8)).astype(x.dtype)
    return jnp.einsum("kij,kj->ki", R, blocks).reshape(-1)


def compose(safe: Float[Array, "8 8"], cmd: Float[Array, "8 8"]) -> Float[Array, "8 8"]:
    """Return R_cmd R_safe: safe acts first."""
    return cmd @ safe


def bracket(a: Float[Array, " 28"], b: Float[Array, " 28"]) -> Float[Array, " 28"]:
    """Return the coordinates of the Lie bracket AB − BA."""
    A, B = skew(a), skew(b)
    return unskew(A @ B - B @ A)


def commutator_distance(safe: Float[Array, "8 8"], cmd: Float[Array, "8 8"]) -> Float[Array, ""]:
    """Return ‖R_cmd R_safe R_cmdᵀ R_safeᵀ − I‖_F; where it is 0 its gradient is taken as 0."""
    excess = cmd @ safe @ cmd.T @ safe.T - jnp.eye(8, dtype=safe.dtype)
    square = jnp.sum(excess**2)
    # the square root is differentiated only where it is not zero, so that no 0/0 enters the gradient
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def orthogonality_error(rotation: Float[Array, "8 8"]) -> Float[Array, ""]:
    """Return max |RᵀR − I|, in float64."""
    R = rotation.astype(jnp.float64)
    return jnp.max(jnp.abs(R.T @ R - jnp.eye(8, dtype=R.dtype)))


def determinant_error(rotation: Float[Array, "8 8"]) -> Float[Array, ""]:
    """Return |det R − 1|, in float64."""
    return jnp.abs(jnp.linalg.det(rotation.astype(jnp.float64)) - 1)


def isometry_error(rotation: Float[Array, "blocks 8 8"], x: Float[Array, " channels"]) -> Float[Array, ""]:
    """Return max over blocks |‖R x‖/‖x‖ − 1|, in float64; a block of zeros keeps its length and counts 0."""
    x = x.astype(jnp.float64)
    before, after = (jnp.linalg.norm(v.reshape(-1, 8), axis=1) for v in (x, apply(rotation.astype(jnp.float64), x)))
    ratio = after / jnp.where(before == 0, 1.0, before)
    return jnp.max(jnp.where(before == 0, 0.0, jnp.abs(ratio - 1)))


def fold_output(
    weight: Float[Array, "outputs inputs"], bias: Float[Array, " outputs"] | None, rotation: Float[Array, "blocks 8 8"]
) -> tuple[Float[Array, "outputs inputs"], Float[Array, " outputs"] | None]:
    """Return (R W, R b): one linear layer that equals the layer followed by the rotation."""
    folded = jax.vmap(lambda column: apply(rotation, column), in_axes=1, out_axes=1)(weight)
    return folded, None if bias is None else apply(rotation, bias)


def unfold_output(
    weight: Float[Array, "outputs inputs"], bias: Float[Array, " outputs"] | None, rotation: Float[Array, "blocks 8 8"]
) -> tuple[Float[Array, "outputs inputs"], Float[Array, " outputs"] | None]:
    """Return (Rᵀ W, Rᵀ b), the inverse of ``fold_output``."""
    return fold_output(weight, bias, jnp.swapaxes(rotation, 1, 2))


def fold_input(
    weight: Float[Array, "outputs inputs"], rotation: Float[Array, "blocks 8 8"]
) -> Float[Array, "outputs inputs"]:
    """Return W R: one linear layer that equals the layer preceded by the rotation."""
    return jax.vmap(lambda row: apply(jnp.swapaxes(rotation, 1, 2), row))(weight)


def unfold_input(
    weight: Float[Array, "outputs inputs"], rotation: Float[Array, "blocks 8 8"]
) -> Float[Array, "outputs inputs"]:
    """Return W Rᵀ, the inverse of ``fold_input``."""
    return fold_input(weight, jnp.swapaxes(rotation, 1, 2))
