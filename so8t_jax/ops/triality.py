"""The three eight-dimensional representations of Spin(8), by octonions.

    A(xy) = (B x) y + x (C y)   for all octonions x, y      L₊: A ↦ B,   L₋: A ↦ C
    g(xy) = (g₊x)(g₋y)          g = exp A,  g₊ = exp(L₊A),  g₋ = exp(L₋A)

Symbols: xy is the octonion product on ℝ⁸ = span(1, e₁ … e₇) with e_i e_{i+1} = e_{i+3} (indices mod 7); A, B, C are
skew 8×8 matrices, each given by 28 coordinates (strict upper triangle, row-major); V, S₊, S₋ are the spaces on
which g, g₊, g₋ act. B and C exist and are unique for every A, so L₊ and L₋ are fixed 28×28 matrices; here they are
found by solving the 56 unknowns of the defining equation.
Cost: the two constants once at import (one 512×56 least-squares problem); then 2·28² products and three
exponentials per element. Derivation: docs/math/triality.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from so8t_jax.ops import rotation

__all__ = [
    "apply",
    "left_spinor",
    "octonion_conjugate",
    "octonion_product",
    "representations",
    "right_spinor",
]


def _product_table() -> np.ndarray:
    """Return c[k, i, j] with e_i e_j = Σ_k c[k, i, j] e_k, from the rule e_i e_{i+1} = e_{i+3}."""
    table = np.zeros((8, 8, 8))
    table[0, 0, 0] = 1.0
    for i in range(1, 8):
        table[i, 0, i] = table[i, i, 0] = 1.0
        table[0, i, i] = -1.0
        triple = (i, i % 7 + 1, (i + 2) % 7 + 1)
        for a, b, c in (triple, triple[1:] + triple[:1], triple[2:] + triple[:2]):
            table[c, a, b], table[c, b, a] = 1.0, -1.0
    return table


def _skew_basis() -> np.ndarray:
    """Return the 28 matrices with +1 at (i, j), i < j, and −1 at (j, i), row-major."""
    basis = np.zeros((28, 8, 8))
    for k, (i, j) in enumerate(zip(*np.triu_indices(8, 1), strict=True)):
        basis[k, i, j], basis[k, j, i] = 1.0, -1.0
    return basis


def _solve_triality(table: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return L₊ and L₋ (28, 28): the solution of A(e_i e_j) = (B e_i) e_j + e_i (C e_j) for every basis element A."""
    left = np.einsum("kaj,nai->nkij", table, basis)
    right = np.einsum("kia,naj->nkij", table, basis)
    outer = np.einsum("nka,aij->nkij", basis, table)
    unknowns = np.concatenate([left, right]).reshape(56, 512).T
    solution = np.linalg.lstsq(unknowns, outer.reshape(28, 512).T, rcond=None)[0]
    # The entries are 0 or ±1/2; rounding to halves removes the solver's last bits, adding 0 the sign of zeros.
    halves = np.round(2.0 * solution) / 2.0 + 0.0
    return halves[:28], halves[28:]


_PRODUCT = _product_table()
_LEFT, _RIGHT = _solve_triality(_PRODUCT, _skew_basis())


def octonion_product(x: Float[Array, " 8"], y: Float[Array, " 8"]) -> Float[Array, " 8"]:
    """Return the octonion product xy.

    Args:
        x: coefficients of 1, e₁ … e₇.
        y: the same.

    Returns:
        Coefficients of xy. Neither commutative nor associative; |xy| = |x| |y|.

    Source: J. Baez, "The octonions", Bull. Amer. Math. Soc. 39 (2002), section 2.
    """
    return jnp.einsum("kij,i,j->k", jnp.asarray(_PRODUCT, x.dtype), x, y)


def octonion_conjugate(x: Float[Array, " 8"]) -> Float[Array, " 8"]:
    """Return x̄: the imaginary coefficients change sign, so that x x̄ = |x|²."""
    return jnp.concatenate([x[:1], -x[1:]])


def left_spinor(coordinates: Float[Array, " 28"]) -> Float[Array, " 28"]:
    """Return L₊A, the generator that acts on the left factor: A(xy) = (L₊A x) y + x (L₋A y).

    Args:
        coordinates: A, strict upper triangle, row-major, in radians.

    Returns:
        Coordinates of L₊A, in the same order.
    """
    return jnp.asarray(_LEFT, coordinates.dtype) @ coordinates


def right_spinor(coordinates: Float[Array, " 28"]) -> Float[Array, " 28"]:
    """Return L₋A, the generator that acts on the right factor: A(xy) = (L₊A x) y + x (L₋A y).

    Args:
        coordinates: A, strict upper triangle, row-major, in radians.

    Returns:
        Coordinates of L₋A, in the same order.
    """
    return jnp.asarray(_RIGHT, coordinates.dtype) @ coordinates


def representations(coordinates: Float[Array, " 28"]) -> Float[Array, "3 8 8"]:
    """Return one element of Spin(8) in its three representations: exp(A), exp(L₊A), exp(L₋A).

    Args:
        coordinates: A, strict upper triangle, row-major, in radians.

    Returns:
        Rotations of V, S₊ and S₋, in this order. A turn by 2π in a coordinate plane is +1 on V and −1 on S₊, S₋.
    """
    generators = (coordinates, left_spinor(coordinates), right_spinor(coordinates))
    return jnp.stack([rotation.exponential(generator) for generator in generators])


def apply(coordinates: Float[Array, "n 28"], x: Float[Array, " d"]) -> Float[Array, " d"]:
    """Rotate every block of 24 channels, a vector and two spinors, by one element of Spin(8).

    Args:
        coordinates: one element of so(8) per block.
        x: d = 24 n channels; block k holds v, s₊, s₋ of eight channels each.

    Returns:
        (g v, g₊ s₊, g₋ s₋) per block: the trilinear form ⟨v, s₊ s₋⟩ is unchanged.
    """
    blocks = x.reshape(-1, 3, 8)
    return jnp.einsum("nrij,nrj->nri", jax.vmap(representations)(coordinates), blocks).reshape(x.shape)
