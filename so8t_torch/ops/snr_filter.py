"""A filter that forgets noise faster and writes signal faster, judged on the memory that enters a chunk of tokens.

    σ = 1.4826 · median|S − median S| + floor · mean|S|  (constant in the gradient)      r = |S| / σ
    g = σ₁((r − threshold)/temperature)                  p = mean g
    Γ ↦ Γ (1 + (gamma_boost − 1)(1 − p))                 η ↦ η (1 + (eta_boost − 1) p)
    S ↦ S (1 − λ (1 − g))                                (g = p = 1 where S = 0, and Γ and η stay as they are)

Symbols: S (…, H, K, V) the states of H heads; medians and means over the K·V entries of a head; σ its noise, 1.4826 the
ratio of the standard deviation to the median deviation of Gaussian noise; σ₁ the logistic function; r the
signal-to-noise ratio of an entry, p the share of entries that are signal; Γ ≥ 0 decay rates and η write strengths of
the C tokens of the chunk; λ in [0, 1] how far an entry of noise is cleaned away.
Everything commutes with scaling S, no head or example sees another, nothing is kept between calls, and no number goes
back to the host. Carried in float32 (float64 for float64).
Cost: two medians per head, found by selection.
Twin: so8t_jax/ops/snr_filter.py. Derivation: docs/math/snr_filter.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.core.tensors import expect_tensors

__all__ = ["importance", "signal_to_noise", "snr_filter", "statistics"]

GAUSSIAN = 1.4826
"""σ / median|X − median X| of a normal variable, 1/Φ⁻¹(¾)."""


class Filtered(NamedTuple):
    """What the tokens of the chunk work with, each in the dtype of what it replaces.

    Attributes:
        state: S (..., H, K, V), cleaned.
        decay: Γ (..., C, H), modulated.
        eta: η (..., C, H), modulated.
        signal: p (..., H), in [0, 1].
    """

    state: Tensor
    decay: Tensor
    eta: Tensor
    signal: Tensor


class Statistics(NamedTuple):
    """Signal-to-noise ratios over the entries of a head, (..., H); ``low_snr_ratio`` is the share below threshold."""

    mean_snr: Tensor
    std_snr: Tensor
    min_snr: Tensor
    max_snr: Tensor
    low_snr_ratio: Tensor


def signal_to_noise(
    state: Float[Tensor, "*batch h k v"], *, noise_floor: float = 1e-3
) -> Float[Tensor, "*batch h k v"]:
    """Return r = |S|/σ, the size of every entry in units of its head's noise.

    Args:
        state: S of every head.
        noise_floor: least noise in units of the mean of |S|, positive; it decides where half the entries are equal,
            and bounds the slope of p by 1 / (4 · temperature · noise_floor · Σ|S|).

    Returns:
        r ≥ 0 in float32 (float64 for float64), unchanged when S is scaled; 0 throughout a head whose S is 0.

    Raises:
        ShapeError: the states are not (..., H, K, V) with K and V at least 1.
        DomainError: they are not of a real floating dtype.
        ConfigError: noise_floor is not positive.

    Source: P. Rousseeuw and C. Croux, "Alternatives to the median absolute deviation" (1993), section 1.
    """
    _check("signal_to_noise", state, noise_floor)
    return _ratio(_entries(state), noise_floor).reshape(state.shape)


def statistics(
    state: Float[Tensor, "*batch h k v"], *, threshold: float = 2.0, noise_floor: float = 1e-3
) -> Statistics:
    """Return mean, standard deviation, least and largest signal-to-noise ratio of every head, and the share of noise.

    Args:
        state: S of every head.
        threshold: ratios below it count as noise.
        noise_floor: as in ``signal_to_noise``.

    Returns:
        Tensors (..., H) in float32 (float64 for float64) without a gradient; the deviation of a single entry is 0.

    Raises:
        ShapeError, DomainError, ConfigError: as ``signal_to_noise``, or the threshold is not a finite number.
    """
    _check("statistics", state, noise_floor)
    _check_threshold("statistics", threshold)
    r = _ratio(_entries(state.detach()), noise_floor)
    mean = r.mean(-1)
    spread = (r - mean[..., None]).square().mean(-1).sqrt()
    low = (r < threshold).to(r.dtype).mean(-1)
    return Statistics(mean, spread, r.amin(-1), r.amax(-1), low)


def snr_filter(
    state: Float[Tensor, "*batch h k v"],
    decay: Float[Tensor, "*batch c h"],
    eta: Float[Tensor, "*batch c h"],
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
        S, Γ and η for the chunk, and p in the dtype of S.

    Raises:
        ShapeError: the states are not (..., H, K, V), or decay or eta is not (..., C, H) for them.
        DomainError: an argument is not of a real floating dtype.
        ConfigError: an option is out of range.
    """
    expect_tensors("snr_filter", decay=decay, eta=eta)
    _check("snr_filter", state, noise_floor)
    _check_tokens(state, decay, eta)
    _check_options(threshold, temperature, gamma_boost, eta_boost, cleanup)
    entries = _entries(state)
    r = _ratio(entries, noise_floor)
    gate = torch.sigmoid((r - threshold) / temperature)
    if hard:
        # gate − gate is exactly zero, so that the sum is exactly 0 or 1
        gate = (r >= threshold).to(gate.dtype) + (gate - gate.detach())
    written = entries.detach().abs().amax(-1) != 0
    gate = torch.where(written[..., None], gate, 1.0)
    p = gate.mean(-1)
    noise, signal = (1.0 - p)[..., None, :], torch.where(written, p, 0.0)[..., None, :]
    cleaned = (entries * (1.0 - cleanup * (1.0 - gate))).reshape(state.shape)
    return Filtered(
        state=cleaned.to(state.dtype),
        decay=(decay * (1.0 + (gamma_boost - 1.0) * noise)).to(decay.dtype),
        eta=(eta * (1.0 + (eta_boost - 1.0) * signal)).to(eta.dtype),
        signal=p.to(state.dtype),
    )


def importance(
    state: Float[Tensor, "*batch h k v"],
    age: Float[Tensor, "*batch h k v"],
    *,
    weights: tuple[float, float, float] = (0.5, 0.3, 0.2),
    threshold: float = 2.0,
    age_rate: float = 0.1,
    noise_floor: float = 1e-3,
) -> Float[Tensor, "*batch h k v"]:
    """Return how much each entry matters: w₁ σ₁(r − threshold) + w₂ S²/max S² + w₃ exp(−age_rate · age).

    Args:
        state: S of every head.
        age: tokens since the entry was last written, not negative.
        weights: w, normalised to sum 1.
        threshold: r at which the first term is one half.
        age_rate: per token, not negative.
        noise_floor: as in ``signal_to_noise``.

    Returns:
        Scores in [0, 1] in float32 (float64 for float64), with max S² constant in the gradient; the second term is 0
        throughout a head whose S is 0.

    Raises:
        ShapeError: the states are not (..., H, K, V), or the ages have another shape.
        DomainError: an argument is not of a real floating dtype.
        ConfigError: weights are not three numbers ≥ 0 with a positive sum, or another option is out of range.
    """
    expect_tensors("snr_filter.importance", age=age)
    _check("importance", state, noise_floor)
    if age.shape != state.shape:
        raise ShapeError(
            f"snr_filter.importance: expected one age per entry {tuple(state.shape)}, got {tuple(age.shape)}."
        )
    if not age.is_floating_point():
        raise DomainError(f"snr_filter.importance: expected ages of a real floating dtype, got {age.dtype}.")
    if len(weights) != 3 or not all(0.0 <= w < math.inf for w in weights) or not sum(weights) > 0.0:
        raise ConfigError(f"snr_filter.importance: expected three weights ≥ 0 that are not all zero, got {weights!r}.")
    _check_threshold("importance", threshold)
    if not 0.0 <= age_rate < math.inf:
        raise ConfigError(f"snr_filter.importance: expected age_rate ≥ 0, got {age_rate!r}.")
    entries = _entries(state)
    largest = entries.detach().abs().amax(-1, keepdim=True)
    share = (entries / torch.where(largest > 0, largest, 1.0)).square()
    # the derivative of torch.sigmoid, y (1 − y), cancels where y is near one, and 1/σ is large
    certain = functional.logsigmoid(_ratio(entries, noise_floor) - threshold).exp()
    youth = torch.exp(-age_rate * age.to(entries.dtype)).reshape(entries.shape)
    total = sum(weights)
    score = (weights[0] * certain + weights[1] * share + weights[2] * youth) / total
    return score.reshape(state.shape)


def _entries(state: Tensor) -> Tensor:
    """Return the entries of every head (..., H, K·V) in the dtype that sums are carried in."""
    return state.to(accumulation_dtype(state.dtype)).flatten(-2)


def _ratio(entries: Tensor, noise_floor: float) -> Tensor:
    """Return |S|/σ of the entries (..., H, N) with σ held constant in the gradient."""
    largest = entries.detach().abs().amax(-1, keepdim=True)
    # in units of the largest entry, beside which no sum leaves the dtype
    entries = entries / torch.where(largest == 0, 1.0, largest)
    held = entries.detach()
    deviation = _median((held - _median(held)).abs())
    noise = GAUSSIAN * deviation + noise_floor * held.abs().mean(-1, keepdim=True)
    return entries.abs() / torch.where(noise == 0, 1.0, noise)


def _median(x: Tensor) -> Tensor:
    """Return the median of the last axis, the mean of the two middle entries where their number is even."""
    n = x.shape[-1]
    # the lower half with the middle: selecting it takes less than sorting everything
    lower = x.topk(n // 2 + 1, largest=False, sorted=False).values
    return lower.topk(2 - n % 2).values.mean(-1, keepdim=True)


def _check(name: str, state: Tensor, noise_floor: float) -> None:
    """Raise unless the states are real (..., H, K, V) with entries, and the floor is positive."""
    expect_tensors(f"snr_filter.{name}", state=state)
    if state.ndim < 3 or min(state.shape[-2:]) < 1:
        raise ShapeError(f"snr_filter.{name}: expected states (..., H, K, V) with K, V ≥ 1, got {tuple(state.shape)}.")
    if not state.is_floating_point():
        raise DomainError(f"snr_filter.{name}: expected states of a real floating dtype, got {state.dtype}.")
    if not 0.0 < noise_floor < math.inf:
        raise ConfigError(f"snr_filter.{name}: expected noise_floor > 0, got {noise_floor!r}.")


def _check_tokens(state: Tensor, decay: Tensor, eta: Tensor) -> None:
    """Raise unless decay and eta are real (..., C, H) for states (..., H, K, V)."""
    for name, x in (("decay", decay), ("eta", eta)):
        if x.ndim < 2 or (*x.shape[:-2], x.shape[-1]) != tuple(state.shape[:-2]):
            raise ShapeError(
                f"snr_filter: expected {name} (..., C, H) with the batch axes and heads of states "
                f"{tuple(state.shape)}, got {tuple(x.shape)}; a rate per head alone has C = 1."
            )
        if not x.is_floating_point():
            raise DomainError(f"snr_filter: expected {name} of a real floating dtype, got {x.dtype}.")


def _check_threshold(name: str, threshold: float) -> None:
    """Raise unless the threshold is a finite number."""
    if not abs(threshold) < math.inf:
        raise ConfigError(f"snr_filter.{name}: expected a finite threshold, got {threshold!r}.")


def _check_options(threshold: float, temperature: float, gamma_boost: float, eta_boost: float, cleanup: float) -> None:
    """Raise unless the options are in range."""
    _check_threshold("snr_filter", threshold)
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"snr_filter: expected a temperature > 0, got {temperature!r}.")
    if not (1.0 <= gamma_boost < math.inf and 1.0 <= eta_boost < math.inf):
        raise ConfigError(
            f"snr_filter: expected gamma_boost ≥ 1 and eta_boost ≥ 1, got {gamma_boost!r} and {eta_boost!r}."
        )
    if not 0.0 <= cleanup <= 1.0:
        raise ConfigError(f"snr_filter: expected cleanup in [0, 1], got {cleanup!r}.")
