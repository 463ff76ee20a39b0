"""Gates on the rank channels of a mixer: soft, straight-through, or samples of a binary concrete variable.

    soft:             g = σ(z)
    straight_through: g = [z ≥ 0],                 ∂g/∂z := σ'(z)
    binary_concrete:  g = σ((z + ℓ)/τ) in training, with ℓ = log u − log(1 − u), u uniform on (0, 1)
    hard:             g = [z + ℓ ≥ 0],             ∂g/∂z := the slope of the soft value
    floor: the min_rank channels of a token with the largest z + ℓ have g ≥ ½, g = 1 where hard
    active: channels from active_rank on have g = 0

Symbols: z logits, one per token and channel; σ the logistic function; ℓ logistic noise; τ temperature.
P(g ≥ ½) = σ(z) for a sample at any temperature, so that σ(z) is the probability that a channel is open. No number
goes back to the host. Computed in float32 (float64 for float64).
Cost: one sort of the channels of a token where there is a floor.
Twin: so8t_jax/ops/rank_gate.py. Derivation: docs/math/rank_gate.md.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none

__all__ = ["effective_rank", "l1", "logistic", "rank_gate", "temperature"]

Mode = Literal["soft", "straight_through", "binary_concrete"]


def rank_gate(
    logits: Float[Tensor, "*t r"],
    noise: Float[Tensor, "*t r"] | None = None,
    *,
    mode: Mode = "soft",
    temperature: float = 1.0,
    hard: bool | None = None,
    training: bool = True,
    min_rank: int = 0,
    active_rank: int | None = None,
) -> Float[Tensor, "*t r"]:
    """Return the gate of every token and channel, in [0, 1].

    Args:
        logits: z.
        noise: ℓ, for the samples of ``binary_concrete`` in training; the values of ``logistic``.
        mode: which gate.
        temperature: τ > 0 of ``binary_concrete``.
        hard: gates are exactly 0 or 1, with the gradient of the soft ones. By default straight-through gates are, and
            binary concrete ones in evaluation, where the threshold takes the place of the sample; ``False`` there
            stays soft, σ(z/τ).
        training: sample, or threshold.
        min_rank: channels that are open at every token.
        active_rank: channels that may be open, the first ones; all by default.

    Returns:
        g in the dtype of the logits.

    Raises:
        ShapeError: there is no channel, or the noise has another shape.
        DomainError: an argument is not of a real floating dtype.
        ConfigError: an option is out of range, noise is missing where it is needed or given where it is not, or
            straight-through gates are asked to be soft.

    Source: C. Maddison, A. Mnih, Y. W. Teh, "The concrete distribution" (2017), section 2 and appendix B.
    """
    _check_logits(logits, noise)
    _check_options(mode, temperature, hard, logits.shape[-1], min_rank, active_rank)
    _check_noise(mode, training, noise)
    z = logits.to(accumulation_dtype(logits.dtype))
    score = z if noise is None else z + noise.to(z.dtype)
    soft = torch.sigmoid(score / temperature if mode == "binary_concrete" else score)
    exact = hard if hard is not None else mode == "straight_through" or (mode == "binary_concrete" and not training)
    kept = _largest(score.detach(), min_rank, active_rank) if min_rank else None
    if exact:
        value = score >= 0
        value = value if kept is None else value | kept
        # soft − soft is exactly zero, so that the sum is exactly 0 or 1
        gates = value.to(z.dtype) + (soft - soft.detach())
    else:
        gates = soft if kept is None else torch.where(kept, torch.maximum(soft, torch.full_like(soft, 0.5)), soft)
    if active_rank is not None and active_rank < z.shape[-1]:
        gates = torch.where(torch.arange(z.shape[-1], device=z.device) < active_rank, gates, 0.0)
    return gates.to(logits.dtype)


def logistic(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return log u − log(1 − u), logistic noise from uniform numbers.

    Args:
        uniform: u in [0, 1], for example ``torch.rand(..., generator=generator)``; 0 gives −∞, which closes a gate,
            1 gives +∞.

    Raises:
        DomainError: u is not of a real floating dtype.
    """
    _check_real("logistic", "uniform numbers", uniform)
    u = uniform.to(accumulation_dtype(uniform.dtype))
    return (u.log() - (1.0 - u).log()).to(uniform.dtype)


def temperature(progress: Float[Tensor, "*shape"], *, start: float, end: float) -> Float[Tensor, "*shape"]:
    """Return start^(1−p) · end^p with p = min(max(progress, 0), 1): a schedule of equal ratios.

    Args:
        progress: share of the schedule that is over.
        start: temperature at 0, positive.
        end: temperature at 1 and after, positive.

    Raises:
        DomainError: progress is not of a real floating dtype.
        ConfigError: a temperature is not positive.
    """
    _check_real("temperature", "a progress", progress)
    if not (0.0 < start < math.inf and 0.0 < end < math.inf):
        raise ConfigError(f"rank_gate.temperature: expected start > 0 and end > 0, got {start!r} and {end!r}.")
    p = progress.to(accumulation_dtype(progress.dtype)).clamp(0.0, 1.0)
    return ((1.0 - p) * math.log(start) + p * math.log(end)).exp().to(progress.dtype)


def effective_rank(gates: Float[Tensor, "*batch t r"]) -> Float[Tensor, "*batch"]:
    """Return the mean over tokens of Σ_r g_r.

    Args:
        gates: of every token and channel.

    Raises:
        ShapeError: there is no token or no channel.
        DomainError: the gates are not of a real floating dtype.
    """
    _check_gates("effective_rank", gates)
    g = gates.to(accumulation_dtype(gates.dtype))
    return (g.sum((-2, -1)) / g.shape[-2]).to(gates.dtype)


def l1(gates: Float[Tensor, "*batch t r"]) -> Float[Tensor, "*batch"]:
    """Return the mean of |g| over tokens and channels.

    Args:
        gates: of every token and channel.

    Raises:
        ShapeError: there is no token or no channel.
        DomainError: the gates are not of a real floating dtype.
    """
    _check_gates("l1", gates)
    return gates.to(accumulation_dtype(gates.dtype)).abs().mean((-2, -1)).to(gates.dtype)


def _largest(score: Tensor, count: int, active: int | None) -> Tensor:
    """Return where the ``count`` largest scores of the active channels are, the first ones among equal scores."""
    order = torch.sort(-score[..., :active], dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)


def _check_real(name: str, what: str, x: Tensor) -> None:
    """Raise unless x is real."""
    expect_tensors(f"rank_gate.{name}", **{what: x})
    if not x.is_floating_point():
        raise DomainError(f"rank_gate.{name}: expected {what} of a real floating dtype, got {x.dtype}; convert it.")


def _check_gates(name: str, gates: Tensor) -> None:
    """Raise unless there is a real gate."""
    expect_tensors(f"rank_gate.{name}", gates=gates)
    if gates.ndim < 2 or 0 in gates.shape[-2:]:
        raise ShapeError(
            f"rank_gate.{name}: expected gates (..., T, R) with at least one token and channel, "
            f"got {tuple(gates.shape)}."
        )
    _check_real(name, "gates", gates)


def _check_logits(logits: Tensor, noise: Tensor | None) -> None:
    """Raise unless the logits are real with a channel, and the noise is like them."""
    expect_tensors("rank_gate", logits=logits)
    expect_tensors_or_none("rank_gate", noise=noise)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ShapeError(f"rank_gate: expected logits (..., R) with at least one channel, got {tuple(logits.shape)}.")
    _check_real("rank_gate", "logits", logits)
    if noise is not None:
        if noise.shape != logits.shape:
            raise ShapeError(
                f"rank_gate: expected noise of the shape of the logits {tuple(logits.shape)}, got {tuple(noise.shape)}."
            )
        _check_real("rank_gate", "noise", noise)


def _check_noise(mode: str, training: bool, noise: Tensor | None) -> None:
    """Raise unless noise is given exactly where a sample is drawn."""
    sampled = mode == "binary_concrete" and training
    if sampled and noise is None:
        raise ConfigError(
            "rank_gate: a binary concrete gate in training needs noise; give logistic(torch.rand(...)) of the shape of "
            "the logits, or training=False."
        )
    if noise is not None and not sampled:
        raise ConfigError(
            f"rank_gate: noise is for binary_concrete in training, got mode {mode!r} and training={training}; leave it "
            "out."
        )


def _check_options(
    mode: str, temperature: float, hard: bool | None, width: int, min_rank: int, active_rank: int | None
) -> None:
    """Raise unless the options are in range and do not contradict each other."""
    if mode not in get_args(Mode):
        raise ConfigError(f"rank_gate: expected a mode out of {', '.join(get_args(Mode))}, got {mode!r}.")
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"rank_gate: expected a temperature > 0, got {temperature!r}.")
    if mode == "straight_through" and hard is False:
        raise ConfigError("rank_gate: straight-through gates are exact; for soft ones choose mode='soft'.")
    active = width if active_rank is None else active_rank
    if not 0 <= active <= width:
        raise ConfigError(f"rank_gate: expected active_rank between 0 and {width}, got {active_rank!r}.")
    if not 0 <= min_rank <= active:
        raise ConfigError(
            f"rank_gate: expected min_rank between 0 and {active}, the channels that may be open, got {min_rank!r}."
        )
