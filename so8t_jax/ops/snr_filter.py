"""A filter that forgets noise faster and writes signal faster, judged on the memory that enters a chunk of tokens.

    σ = 1.4826 · median|S − median S| + floor · mean|S|  (constant in the gradient)      r = |S| / σ
    g = σ₁((r − threshold)/temperature)                  p = mean g
    Γ ↦ Γ (1 + (gamma_boost − 1)(1 − p))                 η ↦ η (1 + (eta_boost − 1) p)
    S ↦ S (1 − λ (1 − g))                                (g = p = 1 where S = 0, and Γ and η stay as they are)

Symbols: S (H, K, V) the states of H heads; medians and means over the K·V entries of a head; σ its noise, 1.4826 the
ratio of the standard deviation to the median deviation of Gaussian noise; σ₁ the logistic function; r the
signal-to-noise ratio of an entry, p the share of entries that are signal; Γ ≥ 0 decay rates and η write strengths of
the C tokens of the chunk; λ in [0, 1] how far an entry of noise is cleaned away.
Everything commutes with scaling S, and no head or example sees another.
Cost: two medians per head. Derivation: docs/math/snr_filter.md.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["importance", "signal_to_noise", "snr_filter", "statistics"]

GAUSSIAN = 1.4826
"""σ / median|X − median X| of a normal variable, 1/Φ⁻¹(¾)."""


class Filtered(NamedTuple):
    """What the tokens of the chunk work with.

    Attributes:
        state: S (H, K, V), cleaned.
        decay: Γ (C, H), modulated.
        eta: η (C, H), modulated.
        signal: p (H,), in [0, 1].
    """

    state: Array
    decay: Array
    eta: Array
    signal: Array


class Statistics(NamedTuple):
    """Signal-to-noise ratios over the entries of a head, (H,) each; ``low_snr_ratio`` is the share below threshold."""

    mean_snr: Array
    std_snr: Array
    min_snr: Array
    max_snr: Array
    low_snr_ratio: Array


def signal_to_noise(state: Float[Array, "h k v"], *, noise_floor: float = 1e-3) -> Float[Array, "h k v"]:
    """Return r = |S|/σ, the size of every entry in units of its head's noise.

    Args:
        state: S of every head.
        noise_floor: least noise in units of the mean of |S|, positive; it decides where half the entries are equal,
            and bounds the slope of p by 1 / (4 · temperature · noise_floor · Σ|S|).

    Returns:
        r ≥ 0, unchanged when S is scaled; 0 throughout a head whose S is 0.

    Source: P. Rousseeuw and C. Croux, "Alternatives to the median absolute deviation" (1993), section 1.
    """
    largest = jax.lax.stop_gradient(jnp.abs(state).max(axis=(1, 2), keepdims=True))
    # in units of the largest entry, beside which no sum leaves the dtype
    state = state / jnp.where(largest == 0, 1.0, largest)
    middle = jnp.median(state, axis=(1, 2), keepdims=True)
    deviation = jnp.median(jnp.abs(state - middle), axis=(1, 2), keepdims=True)
    noise = GAUSSIAN * deviation + noise_floor * jnp.abs(state).mean(axis=(1, 2), keepdims=True)
    noise = jax.lax.stop_gradient(noise)
    # sign(S)·S has the slope 0 at S = 0, jax gives |S| the slope 1
    return jnp.sign(state) * state / jnp.where(noise == 0, 1.0, noise)


def statistics(state: Float[Array, "h k v"], *, threshold: float = 2.0, noise_floor: float = 1e-3) -> Statistics:
    """Return mean, standard deviation, least and largest signal-to-noise ratio of every head, and the share of noise.

    Args:
        state: S of every head.
        threshold: ratios below it count as noise.
        noise_floor: as in ``signal_to_noise``.
    """
    r = jax.lax.stop_gradient(signal_to_noise(state, noise_floor=noise_floor)).reshape(state.shape[0], -1)
    return Statistics(r.mean(1), r.std(1), r.min(1), r.max(1), (r < threshold).mean(1, dtype=r.dtype))


def snr_filter(
    state: Float[Array, "h k v"],
    decay: Float[Array, "c h"],
    eta: Float[Array, "c h"],
    *,
    threshold: float = 2.0,
    temperature: float = 0.25,
    gamma_boost: float = 2.0,
    eta_boost: float = 1.5,
    cleanup: float = 0.0,
    hard: bool = False,
    noise_floor: float = 1e-3,
) -> Filtered:
    """Return decay rates and write strengths for a chunk, and the state cleaned of noise.

    Args:
        state: S of every head as it enters the chunk; zero before anything was written: then p = 1, and
            nothing is changed.
        decay: Γ of every token of the chunk and head, not negative.
        eta: η of every token of the chunk and head.
        threshold: r at which an entry counts half as signal.
        temperature: width of the transition in units of r, positive.
        gamma_boost: factor of Γ for a head that is all noise, at least 1.
        eta_boost: factor of η for a head that is all signal, at least 1.
        cleanup: λ in [0, 1].
        hard: entries are signal or noise in value, with the gradient of the soft gate.
        noise_floor: as in ``signal_to_noise``.

    Returns:
        S, Γ and η for the chunk, and p.
    """
    r = signal_to_noise(state, noise_floor=noise_floor)
    gate = jax.nn.sigmoid((r - threshold) / temperature)
    if hard:
        gate = (r >= threshold).astype(gate.dtype) + (gate - jax.lax.stop_gradient(gate))
    written = (state != 0).any(axis=(1, 2))
    gate = jnp.where(written[:, None, None], gate, 1.0)
    p = gate.mean(axis=(1, 2))
    return Filtered(
        state=state * (1.0 - cleanup * (1.0 - gate)),
        decay=decay * (1.0 + (gamma_boost - 1.0) * (1.0 - p[None])),
        eta=eta * (1.0 + (eta_boost - 1.0) * jnp.where(written, p, 0.0)[None]),
        signal=p,
    )


def importance(
    state: Float[Array, "h k v"],
    age: Float[Array, "h k v"],
    *,
    weights: tuple[float, float, float] = (0.5, 0.3, 0.2),
    threshold: float = 2.0,
    age_rate: float = 0.1,
    noise_floor: float = 1e-3,
) -> Float[Array, "h k v"]:
    """Return how much each entry matters: w₁ σ₁(r − threshold) + w₂ S²/max S² + w₃ exp(−age_rate · age).

    Args:
        state: S of every head.
        age: tokens since the entry was last written, not negative.
        weights: w, normalised to sum 1.
        threshold: r at which the first term is one half.
        age_rate: per token, not negative.
        noise_floor: as in ``signal_to_noise``.

    Returns:
        Scores in [0, 1], with max S² constant in the gradient; the second term is 0 throughout a head whose S is 0.
    """
    signal, energy, youth = (w / sum(weights) for w in weights)
    largest = jax.lax.stop_gradient(jnp.abs(state).max(axis=(1, 2), keepdims=True))
    share = (state / jnp.where(largest > 0, largest, 1.0)) ** 2
    certain = jnp.exp(jax.nn.log_sigmoid(signal_to_noise(state, noise_floor=noise_floor) - threshold))
    return signal * certain + energy * share + youth * jnp.exp(-age_rate * age)
