"""A filter that keeps the modes of a fast-weight memory that hold its energy, in the basis of unfolded zeta zeros.

    Q_n = polar factor of zeta.basis(n),  Q_nᵀ Q_n = I        S′ = Q_kᵀ S Q_v
    e_j = ‖S′_j,:‖₂  ("row")  or  |S′_jj|  ("diag")          ρ_j = e_j / mean_i e_i     (ρ_j = 1 where S = 0)
    m_j = σ((ρ_j − threshold)/temperature)                   S ↦ S − w Q_k ((1 − m) ∘ S′) Q_vᵀ

Symbols: S (H, K, V) the states of H heads, keys by values; Q_k, Q_v the bases of both sides; m the gate of each mode,
σ the logistic function; w (H,) how far each head goes from S to the state Q_k (m ∘ S′) Q_vᵀ (without w: all the way).
It is the identity where m = 1, never increases ‖S‖_F for w in [0, 1], and commutes with scaling S.
Cost: 2 K²V + 2 K V² products per head. Derivation: docs/math/resonance.md.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from so8t_jax.ops import zeta

__all__ = ["basis", "resonance", "transform"]

Energy = Literal["row", "diag"]


class Resonance(NamedTuple):
    """What the filter found and did.

    Attributes:
        state: the filtered states (H, K, V).
        energy: e_j of every head (H, K).
        gate: m_j of every head (H, K), in [0, 1].
    """

    state: Array
    energy: Array
    gate: Array


def basis(n: int) -> Float[Array, "n n"]:
    """Return the orthonormal matrix nearest to the cosines and sines of the unfolded zeta zeros.

    Args:
        n: at least 1.

    Returns:
        Q, the polar factor of ``zeta.basis(n)``: UVᵀ of its singular value decomposition.

    Source: N. Higham, Functions of Matrices (2008), theorem 8.4.
    """
    u, _, vt = jnp.linalg.svd(zeta.basis(n))
    return u @ vt


def transform(
    state: Float[Array, "h k v"], key_basis: Float[Array, "k k"], value_basis: Float[Array, "v v"]
) -> Float[Array, "h k v"]:
    """Return S′ = Q_kᵀ S Q_v, the same memory in the coordinates of the bases.

    Args:
        state: S of every head.
        key_basis: Q_k, orthonormal.
        value_basis: Q_v, orthonormal.
    """
    return jnp.einsum("ki,hkv,vj->hij", key_basis, state, value_basis)


def resonance(
    state: Float[Array, "h k v"],
    key_basis: Float[Array, "k k"],
    value_basis: Float[Array, "v v"],
    blend: Float[Array, " h"] | None = None,
    *,
    threshold: float = 0.1,
    temperature: float = 0.05,
    energy: Energy = "row",
    hard: bool = False,
) -> Resonance:
    """Return the states with the modes of little energy attenuated.

    Args:
        state: S of every head.
        key_basis: Q_k, orthonormal.
        value_basis: Q_v, orthonormal.
        blend: w in [0, 1] of every head: 0 leaves S as it is, 1 or None filters it fully.
        threshold: relative energy at which a mode passes by half; −∞ lets all pass.
        temperature: width of the transition in units of relative energy, positive.
        energy: ``"row"``: norm of the mode's row of S′; ``"diag"``: its diagonal entry, for K = V.
        hard: gates are 0 or 1 in value, with the gradient of the soft ones.

    Returns:
        The filtered states, the energies and the gates.
    """
    modes = transform(state, key_basis, value_basis)
    if energy == "row":
        found = _row_norms(modes)
    else:
        diagonal = jnp.diagonal(modes, axis1=1, axis2=2)
        found = jnp.sign(diagonal) * diagonal
    mean = found.mean(axis=-1, keepdims=True)
    relative = jnp.where(mean > 0, found / jnp.where(mean > 0, mean, 1.0), 1.0)
    removed = jax.nn.sigmoid((threshold - relative) / temperature)
    if hard:
        removed = (relative < threshold).astype(removed.dtype) + (removed - jax.lax.stop_gradient(removed))
    noise = transform(removed[:, :, None] * modes, key_basis.T, value_basis.T)
    if blend is not None:
        noise = blend[:, None, None] * noise
    return Resonance(state - noise, found, 1.0 - removed)


def _row_norms(modes: Float[Array, "h k v"]) -> Float[Array, "h k"]:
    """Return the norms of rows, with gradient 0 at a row of zeros, whatever the scale of the state."""
    largest = jax.lax.stop_gradient(jnp.abs(modes).max(axis=(1, 2), initial=0.0))[:, None]
    unit = jnp.where(largest > 0, largest, 1.0)
    square = ((modes / unit[:, :, None]) ** 2).sum(-1)
    return unit * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
