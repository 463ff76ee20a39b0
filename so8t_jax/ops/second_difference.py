"""The mean squared second difference of a trajectory along its tokens (the PET penalty), and its schedule.

    Δ²h_t = h_{t+1} − 2 h_t + h_{t−1}        v_t = 1 where m_{t−1} = m_t = m_{t+1} ≠ 0, else 0
    E(h, m) = Σ_t v_t · mean_d ρ(Δ²h_{t,d})    PET = Σ_b E(h_b, m_b) / max(1, Σ_{b,t} v_{b,t})

Symbols: h is one sequence of T hidden states of width D, m its mask: 0 for padding, else a number shared by the tokens
of one sequence (a plain 0/1 mask, or the segment ids of a packed row). ρ(u) = u², or with δ > 0 Huber's
c (2u − c), c = clip(u, −δ, δ): u² up to δ, then 2δ|u| − δ². The gradient is the same stencil again,
∂E/∂h = (2/D) Δ²(v c). A linear trajectory costs 0; h_t = e^{iωt} costs (2 − 2 cos ω)² per token.
Cost: 4 T D operations. Derivation: docs/math/second_difference.md.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

__all__ = ["centres", "energy", "schedule_weight", "second_difference"]


def centres(mask: Shaped[Array, " t"]) -> Bool[Array, " t"]:
    """Return where a second difference exists: the token and both its neighbours belong to one sequence.

    Args:
        mask: 0 for padding, else equal numbers for the tokens of one sequence.

    Returns:
        True at t where m_{t−1} = m_t = m_{t+1} ≠ 0; False at both ends.
    """
    inner = (mask[1:-1] != 0) & (mask[:-2] == mask[1:-1]) & (mask[1:-1] == mask[2:])
    return jnp.zeros(mask.shape, bool).at[1:-1].set(inner)


def energy(
    h: Float[Array, "t d"],
    mask: Shaped[Array, " t"],
    *,
    norm: Literal["mean", "sum"] = "mean",
    delta: float = 0.0,
) -> Float[Array, ""]:
    """Return Σ_t v_t · norm_d ρ(Δ²h_{t,d}) of one sequence; what the mask excludes does not enter, finite or not.

    Args:
        h: hidden states; computed in float32, or float64 for float64.
        mask: 0 for padding, else equal numbers for the tokens of one sequence.
        norm: ``"mean"`` or ``"sum"`` over the D channels; the mean makes a weight independent of the width.
        delta: Huber's threshold in units of h; 0 means the plain square.

    Returns:
        The energy, 0 where T < 3. Divide a sum over sequences by the number of ``centres``.
    """
    h = h.astype(_accumulation(h.dtype))
    bend = jnp.where(centres(mask)[1:-1, None], h[2:] - 2.0 * h[1:-1] + h[:-2], 0.0)
    inner = jnp.clip(bend, -delta, delta) if delta > 0.0 else bend
    total = jnp.sum(inner * (2.0 * bend - inner))
    return total / h.shape[-1] if norm == "mean" else total


def second_difference(
    h: Float[Array, "b t d"],
    mask: Shaped[Array, "b t"],
    *,
    norm: Literal["mean", "sum"] = "mean",
    delta: float = 0.0,
    scale_free: bool = False,
    scale_floor: float = 1e-12,
) -> Float[Array, ""]:
    """Return the PET penalty of one batch of sequences; padding on either side changes nothing.

    Args:
        h: hidden states of B sequences, which share one denominator.
        mask: 0 for padding, else equal numbers for the tokens of one sequence.
        norm: ``"mean"`` or ``"sum"`` over the D channels.
        delta: Huber's threshold in units of h; 0 means the plain square.
        scale_free: divide by the mean of norm_d h² over unmasked tokens, held constant in the gradient; without it
            the penalty can be lowered by shrinking h.
        scale_floor: least value of that mean, in units of h².

    Returns:
        Σ_b E_b / max(1, number of centres).
    """
    total = jnp.sum(jax.vmap(lambda x, m: energy(x, m, norm=norm, delta=delta))(h, mask))
    penalty = total / jnp.maximum(1, jnp.sum(jax.vmap(centres)(mask))).astype(total.dtype)
    if not scale_free:
        return penalty
    square = _mean_square(h, mask) * (h.shape[-1] if norm == "sum" else 1)
    return penalty / jnp.maximum(jax.lax.stop_gradient(square), scale_floor)


def schedule_weight(
    progress: Float[Array, ""],
    *,
    boundaries: tuple[float, ...] = (0.2, 0.6),
    weights: tuple[float, ...] = (0.01, 0.05, 0.1),
) -> Float[Array, ""]:
    """Return the weight of the penalty at a fraction of training: constant on each phase, the last one for ever.

    Args:
        progress: optimiser steps done over steps planned; beyond 1 the last weight stays.
        boundaries: increasing fractions at which the next phase begins; the boundary belongs to the phase it opens.
        weights: one per phase, one more than boundaries.

    Returns:
        The weight; NaN progress gives NaN.

    Raises:
        ValueError: boundaries do not increase within (0, 1), or weights do not match them.
    """
    increasing = all(a < b for a, b in pairwise((0.0, *boundaries, 1.0)))
    if not increasing or len(weights) != len(boundaries) + 1 or not all(0.0 <= w < math.inf for w in weights):
        raise ValueError(
            f"expected increasing boundaries within (0, 1) and one finite weight ≥ 0 per phase, "
            f"got {boundaries!r} and {weights!r}"
        )
    phase = jnp.searchsorted(jnp.asarray(boundaries, progress.dtype), progress, side="right")
    return jnp.where(jnp.isnan(progress), jnp.nan, jnp.asarray(weights, progress.dtype)[phase])


def _mean_square(h: Float[Array, "b t d"], mask: Shaped[Array, "b t"]) -> Float[Array, ""]:
    """Return the mean of h² over unmasked tokens and channels, 0 without any."""
    inside = mask != 0
    h = h.astype(_accumulation(h.dtype))
    tokens = jnp.maximum(1, jnp.sum(inside)).astype(h.dtype)
    return jnp.sum(jnp.where(inside[..., None], h, 0.0) ** 2) / (tokens * h.shape[-1])


def _accumulation(dtype: jnp.dtype) -> jnp.dtype:
    """Return float64 for float64 and float32 for every other floating dtype."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)
