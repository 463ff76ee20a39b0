"""Gates on the rank channels of a mixer: soft, straight-through, or samples of a binary concrete variable.

    soft:             g = σ(z)
    straight_through: g = [z ≥ 0],                 ∂g/∂z := σ'(z)
    binary_concrete:  g = σ((z + ℓ)/τ) in training, with ℓ = log u − log(1 − u), u uniform on (0, 1)
    hard:             g = [z + ℓ ≥ 0],             ∂g/∂z := the slope of the soft value
    floor: the min_rank channels of a token with the largest z + ℓ have g ≥ ½, g = 1 where hard
    active: channels from active_rank on have g = 0

Symbols: z logits, one per token and channel; σ the logistic function; ℓ logistic noise; τ temperature.
P(g ≥ ½) = σ(z) for a sample at any temperature, so that σ(z) is the probability that a channel is open.
Cost: one sort of the channels of a token where there is a floor. Derivation: docs/math/rank_gate.md.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["effective_rank", "l1", "logistic", "rank_gate", "temperature"]


def rank_gate(
    logits: Float[Array, "*t r"],
    noise: Float[Array, "*t r"] | None = None,
    *,
    mode: Literal["soft", "straight_through", "binary_concrete"] = "soft",
    temperature: float = 1.0,
    hard: bool | None = None,
    training: bool = True,
    min_rank: int = 0,
    active_rank: int | None = None,
) -> Float[Array, "*t r"]:
    """Return the gate of every token and channel, in [0, 1].

    Args:
        logits: z.
        noise: ℓ, for the samples of ``binary_concrete`` in training; the values of ``logistic``.
        mode: which gate.
        temperature: τ > 0 of ``binary_concrete``.
        hard: gates are exactly 0 or 1, with the gradient of the soft ones. By default straight-through gates are, and
            binary concrete ones in evaluation, where the threshold takes the place of the sample.
        training: sample, or threshold.
        min_rank: channels that are open at every token.
        active_rank: channels that may be open, the first ones; all by default.
    """
    z = logits.astype(_accumulation(logits.dtype))
    score = z if noise is None else z + noise.astype(z.dtype)
    soft = jax.nn.sigmoid(score / temperature if mode == "binary_concrete" else score)
    channel = jax.lax.broadcasted_iota(int, z.shape, z.ndim - 1)
    active = channel < (z.shape[-1] if active_rank is None else active_rank)
    kept = _largest(jnp.where(active, score, -jnp.inf), min_rank)
    if _exact(mode, hard, training):
        value = ((score >= 0) | kept).astype(z.dtype)
        # soft − soft is exactly zero, so that the sum is exactly 0 or 1
        gates = value + (soft - jax.lax.stop_gradient(soft))
    else:
        gates = jnp.where(kept, jnp.maximum(soft, 0.5), soft)
    return jnp.where(active, gates, 0.0).astype(logits.dtype)


def logistic(uniform: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return log u − log(1 − u), logistic noise from uniform numbers.

    Args:
        uniform: u in [0, 1]; 0 gives −∞, which closes a gate, 1 gives +∞.
    """
    u = uniform.astype(_accumulation(uniform.dtype))
    return (jnp.log(u) - jnp.log(1.0 - u)).astype(uniform.dtype)


def temperature(progress: Float[Array, "*shape"], *, start: float, end: float) -> Float[Array, "*shape"]:
    """Return start^(1−p) · end^p with p = min(max(progress, 0), 1): a schedule of equal ratios.

    Args:
        progress: share of the schedule that is over.
        start: temperature at 0, positive.
        end: temperature at 1 and after, positive.
    """
    p = jnp.clip(progress, 0.0, 1.0)
    return jnp.exp((1.0 - p) * jnp.log(start) + p * jnp.log(end)).astype(progress.dtype)


def effective_rank(gates: Float[Array, "t r"]) -> Float[Array, ""]:
    """Return the mean over tokens of Σ_r g_r.

    Args:
        gates: of every token and channel.
    """
    g = gates.astype(_accumulation(gates.dtype))
    return (g.sum() / g.shape[0]).astype(gates.dtype)


def l1(gates: Float[Array, "t r"]) -> Float[Array, ""]:
    """Return the mean of |g| over tokens and channels.

    Args:
        gates: of every token and channel.
    """
    return jnp.abs(gates.astype(_accumulation(gates.dtype))).mean().astype(gates.dtype)


def _exact(mode: str, hard: bool | None, training: bool) -> bool:
    """Return whether gates are exactly 0 or 1."""
    if hard is not None:
        return hard
    return mode == "straight_through" or (mode == "binary_concrete" and not training)


def _largest(score: Float[Array, "*t r"], count: int) -> Bool[Array, "*t r"]:
    """Return where the ``count`` largest scores of each row are, the first ones among equal scores."""
    order = jnp.argsort(-score, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count


def _accumulation(dtype: jnp.dtype) -> jnp.dtype:
    """Return float64 for float64 and float32 for every other dtype."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)
