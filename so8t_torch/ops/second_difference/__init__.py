"""The mean squared second difference of a trajectory along its tokens (the PET penalty), and its schedule.

    Δ²h_t = h_{t+1} − 2 h_t + h_{t−1}        v_t = 1 where m_{t−1} = m_t = m_{t+1} ≠ 0, else 0
    E(h, m) = Σ_t v_t · mean_d ρ(Δ²h_{t,d})    PET = Σ_b E(h_b, m_b) / max(1, Σ_{b,t} v_{b,t})

Symbols: h hidden states (…, T, D), m their mask (…, T): 0 for padding, else a number shared by the tokens of one
sequence (a plain 0/1 mask, or the segment ids of a packed row); ρ(u) = u², or with δ > 0 Huber's c (2u − c),
c = clip(u, −δ, δ). Computed in float32, or float64 for float64.
Cost: one pass over h forward, one over h and its gradient backward; only h and one byte per token are saved.
Twin: so8t_jax/ops/second_difference.py. Derivation: docs/math/second_difference.md.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise
from typing import Literal, overload

from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from so8t_torch.core import forward_mode
from so8t_torch.core.backend import Candidate, choose, explain, triton_reasons
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.core.tensors import expect_tensors
from so8t_torch.ops.second_difference import autograd, eager

__all__ = ["centres", "energy", "schedule_weight", "second_difference"]


def centres(mask: Shaped[Tensor, "*batch t"]) -> Bool[Tensor, "*batch t"]:
    """Return where a second difference exists: the token and both its neighbours belong to one sequence.

    Args:
        mask: 0 for padding, else equal numbers for the tokens of one sequence.

    Returns:
        True at t where m_{t−1} = m_t = m_{t+1} ≠ 0; False at both ends.

    Raises:
        ShapeError: the mask has no axis of tokens.
    """
    expect_tensors("centres", mask=mask)
    if mask.ndim == 0:
        raise ShapeError("centres: expected a mask (..., T), got a tensor without axes; give one number per token.")
    return eager.centres(mask)


def energy(
    h: Float[Tensor, "*batch t d"],
    mask: Shaped[Tensor, "*batch t"],
    *,
    norm: Literal["mean", "sum"] = "mean",
    delta: float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "*batch"]:
    """Return Σ_t v_t · norm_d ρ(Δ²h_{t,d}) of each sequence; what the mask excludes does not enter, finite or not.

    Args:
        h: hidden states, any strides.
        mask: 0 for padding, else equal numbers for the tokens of one sequence.
        norm: ``"mean"`` or ``"sum"`` over the D channels; the mean makes a weight independent of the width.
        delta: Huber's threshold in units of h; 0 means the plain square.
        backend: ``"triton"``, ``"streamed"`` (CPU), ``"eager"`` (plain operations, the only one with forward-mode
            derivatives), or ``"auto"``.

    Returns:
        The energies in float32 (float64 for float64), 0 where T < 3. To accumulate over micro-batches, divide their
        sum by the total number of ``centres``.

    Raises:
        ShapeError: mask and h disagree, or h has no channels.
        DomainError: h is not of a real floating dtype, or its mask is on another device.
        ConfigError: norm or delta is out of range.
        BackendError: the backend cannot run this call.
    """
    _check(h, mask, norm, delta)
    return _run(h, eager.centres(mask), norm, delta, backend).to(accumulation_dtype(h.dtype))


def second_difference(
    h: Float[Tensor, "*batch b t d"],
    mask: Shaped[Tensor, "*batch b t"],
    *,
    norm: Literal["mean", "sum"] = "mean",
    delta: float = 0.0,
    scale_free: bool = False,
    scale_floor: float = 1e-12,
    backend: str = "auto",
) -> Float[Tensor, "*batch"]:
    """Return the PET penalty of one batch of sequences; padding on either side changes nothing.

    Args:
        h: hidden states of B sequences, which share one denominator; any strides.
        mask: 0 for padding, else equal numbers for the tokens of one sequence.
        norm: ``"mean"`` or ``"sum"`` over the D channels.
        delta: Huber's threshold in units of h; 0 means the plain square.
        scale_free: divide by the mean of norm_d h² over unmasked tokens, held constant in the gradient; without it
            the penalty can be lowered by shrinking h.
        scale_floor: least value of that mean, in units of h².
        backend: as in ``energy``.

    Returns:
        Σ_b E_b / max(1, number of centres), in float32 (float64 for float64).

    Raises:
        ShapeError: h is not (..., B, T, D), or mask and h disagree.
        DomainError: h is not of a real floating dtype, or its mask is on another device.
        ConfigError: norm, delta or scale_floor is out of range.
        BackendError: the backend cannot run this call.
    """
    expect_tensors("second_difference", h=h, mask=mask)
    if h.ndim < 3:
        raise ShapeError(
            f"second_difference: expected h (..., B, T, D), got {tuple(h.shape)}; add a batch axis, or call energy."
        )
    if not scale_floor > 0:
        raise ConfigError(f"second_difference: expected scale_floor > 0, got {scale_floor!r}.")
    _check(h, mask, norm, delta)
    valid = eager.centres(mask)
    penalty = _run(h, valid, norm, delta, backend).sum(-1) / valid.sum((-2, -1)).clamp(min=1)
    if not scale_free:
        return penalty.to(accumulation_dtype(h.dtype))
    square = eager.mean_square(h.detach(), mask) * (h.shape[-1] if norm == "sum" else 1)
    return (penalty / square.clamp(min=scale_floor)).to(accumulation_dtype(h.dtype))


@overload
def schedule_weight(
    progress: float, *, boundaries: tuple[float, ...] = ..., weights: tuple[float, ...] = ...
) -> float: ...


@overload
def schedule_weight(
    progress: Tensor, *, boundaries: tuple[float, ...] = ..., weights: tuple[float, ...] = ...
) -> Tensor: ...


def schedule_weight(
    progress: float | Tensor,
    *,
    boundaries: tuple[float, ...] = (0.2, 0.6),
    weights: tuple[float, ...] = (0.01, 0.05, 0.1),
) -> float | Tensor:
    """Return the weight of the penalty at a fraction of training: constant on each phase, the last one for ever.

    Args:
        progress: optimiser steps done over steps planned, a number or a tensor; beyond 1 the last weight stays.
        boundaries: increasing fractions at which the next phase begins; the boundary belongs to the phase it opens.
        weights: one per phase, one more than boundaries; finite and not negative.

    Returns:
        The weight, of the kind of ``progress``; NaN in a tensor stays NaN.

    Raises:
        ConfigError: boundaries do not increase within (0, 1), weights do not match them, or a number is NaN.
        DomainError: a tensor of whole numbers, whose dtype holds no weight.
    """
    _check_schedule(boundaries, weights)
    if isinstance(progress, Tensor):
        if not progress.is_floating_point():
            raise DomainError(f"schedule_weight: expected a floating-point tensor, got {progress.dtype}; convert it.")
        return eager.schedule_weight(progress, boundaries, weights)
    if math.isnan(progress):
        raise ConfigError("schedule_weight: expected progress as a fraction of training, got NaN.")
    return weights[bisect_right(boundaries, progress)]


def explain_backend(h: Tensor) -> str:
    """Return one line per backend: that it can run on h, or every reason why not."""
    return explain(_candidates(h))


def _run(h: Tensor, valid: Tensor, norm: str, delta: float, backend: str) -> Tensor:
    """Return the energy of every sequence (...) in float64 by the chosen implementation."""
    *batch, length, width = h.shape
    flat = (math.prod(batch), length)
    arguments = (h.reshape(*flat, width), valid.reshape(flat), float(delta))
    chosen = choose("second_difference", backend, _candidates(h))
    total = eager.energy(*arguments) if chosen == "eager" else autograd.energy(*arguments, chosen)
    return (total / width if norm == "mean" else total).reshape(batch)


def _candidates(h: Tensor) -> list[Candidate]:
    """Return the implementations in order of preference, each with the reasons why it cannot run."""
    on_host = () if h.device.type == "cpu" else (f"h is on {h.device}, this one runs on the CPU",)
    one_way = forward_mode.reasons(h)
    return [
        Candidate("triton", (*triton_reasons(h), *one_way)),
        Candidate("streamed", (*on_host, *one_way)),
        Candidate("eager"),
    ]


def _check(h: Tensor, mask: Tensor, norm: str, delta: float) -> None:
    """Raise unless h is (..., T, D) with D > 0, mask (..., T), and the options are in range."""
    expect_tensors("second_difference", h=h, mask=mask)
    if h.ndim < 2 or h.shape[-1] == 0:
        raise ShapeError(f"second_difference: expected h (..., T, D) with D > 0, got {tuple(h.shape)}.")
    if mask.shape != h.shape[:-1]:
        raise ShapeError(
            f"second_difference: expected a mask of shape {tuple(h.shape[:-1])} for h of {tuple(h.shape)}, "
            f"got {tuple(mask.shape)}; give one number per token."
        )
    if not h.is_floating_point():
        raise DomainError(f"second_difference: expected real floating-point h, got {h.dtype}; convert it first.")
    if mask.device != h.device:
        raise DomainError(f"second_difference: h is on {h.device}, its mask on {mask.device}; move the mask.")
    if norm not in ("mean", "sum"):
        raise ConfigError(f"second_difference: expected norm 'mean' or 'sum', got {norm!r}.")
    if not delta >= 0:
        raise ConfigError(f"second_difference: expected delta ≥ 0 (0 means the plain square), got {delta!r}.")


def _check_schedule(boundaries: tuple[float, ...], weights: tuple[float, ...]) -> None:
    """Raise unless boundaries increase within (0, 1) and there is one finite weight ≥ 0 per phase."""
    if not all(a < b for a, b in pairwise((0.0, *boundaries, 1.0))):
        raise ConfigError(f"schedule_weight: expected boundaries that increase within (0, 1), got {boundaries!r}.")
    if len(weights) != len(boundaries) + 1:
        raise ConfigError(
            f"schedule_weight: expected {len(boundaries) + 1} weights for {len(boundaries)} boundaries, "
            f"got {len(weights)}."
        )
    if not all(0.0 <= weight < math.inf for weight in weights):
        raise ConfigError(f"schedule_weight: expected finite weights ≥ 0, got {weights!r}.")
