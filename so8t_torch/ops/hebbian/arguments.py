"""What the functions of fast weights take: checked, brought to one shape, and prepared for the recurrence.

Rates and strengths as they act:

    g_t = −Γ_t, and 0 where the state is dropped        η_t ↦ η_t (1 − e^{−Γ_t})/Γ_t  (zoh)        k_t ↦ k_t/|k_t|  (l2)
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.core.readable import readable
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none

Rule = Literal["hebb", "delta"]
Discretization = Literal["euler", "zoh"]
KeyNorm = Literal["l2", "none"]
OPTIONS = {"rule": ("hebb", "delta"), "discretization": ("euler", "zoh"), "key_norm": ("l2", "none")}
SERIES_BELOW, SERIES_TERMS = 0.5, {torch.float32: 10, torch.float64: 16}
"""Where (1 − e^{−Γ})/Γ and its derivatives cancel, and how many terms of its series stand for it there."""


class Prepared(NamedTuple):
    """Arguments of the recurrence for N rows; g and η are float32 (float64 for float64).

    Attributes:
        k: keys (N, T, H, K).
        v: values (N, T, H, V).
        log_decay: g ≤ 0 (N, T, H).
        eta: η (N, T, H).
        initial: the state that enters (N, H, K, V), or nothing.
        restart: where the state that enters a token is dropped (N, T), or nothing.
        batch: the axes that N stands for.
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor
    eta: Tensor
    initial: Tensor | None
    restart: Tensor | None
    batch: tuple[int, ...]


def rows(given: Prepared, x: Tensor) -> Tensor:
    """Return x (..., T, H, ·) as (N, T, H, ·)."""
    return x.reshape(math.prod(given.batch), *x.shape[len(given.batch) :])


def prepare(
    op: str,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    segment_ids: Tensor | None,
    discretization: Discretization,
) -> Prepared:
    """Return the checked arguments in one shape, with g and η as they act on keys as they are."""
    _check(op, k, v, decay, eta, initial, segment_ids)
    kind, (*batch, length, heads, _) = accumulation_dtype(v.dtype), v.shape
    rows = math.prod(batch)
    rate = not_negative(op, decay.to(kind))
    # few numbers stand for many: their gradient is a sum, which is not taken over rounded terms
    rate, strength = (x.expand(*batch, length, heads).reshape(rows, length, heads) for x in (rate, eta.to(kind)))
    restart = None
    if segment_ids is not None:
        restart = _restarts(segment_ids).expand(*batch, length).reshape(rows, length)
    if discretization == "zoh":
        strength = strength * held(rate)
    log_decay = -rate if restart is None else torch.where(restart[..., None], 0.0, -rate)
    if initial is not None:
        initial = initial.expand(*batch, *initial.shape[-3:]).reshape(rows, *initial.shape[-3:])
    k, v = (x.reshape(rows, *x.shape[-3:]) for x in (k, v))
    return Prepared(k, v, log_decay, strength, initial, restart, tuple(batch))


def unit(k: Tensor) -> Tensor:
    """Return keys divided by their norms; a key of zeros stays one, with gradient 0."""
    # converted once, so that the two parts of the gradient are added before they are rounded
    wide = k.to(accumulation_dtype(k.dtype))
    length, empty = norms(wide)
    return torch.where(empty[..., None], 0.0, wide / length[..., None])


def weakened(eta: Tensor, k: Tensor) -> Tensor:
    """Return η/|k|, so that η k̂ vᵀ = (η/|k|) k vᵀ with keys as they are; 0 for a key of zeros, with gradient 0."""
    length, empty = norms(k)
    return torch.where(empty, 0.0, eta / length)


def norms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Euclidean norms along the last axis whose squares do not overflow, 1 for zeros, and where those are."""
    wide = x.to(accumulation_dtype(x.dtype))
    largest = wide.detach().abs().amax(-1, keepdim=True)
    empty = largest == 0
    scale = torch.where(empty, 1.0, largest)
    # a key of zeros takes no part, so that no gradient meets the edge of the root
    square = torch.where(empty, 1.0, (wide / scale).square().sum(-1, keepdim=True))
    return (scale * square.sqrt())[..., 0], empty[..., 0]


def held(rate: Tensor) -> Tensor:
    """Return (1 − e^{−Γ})/Γ, by its series where the quotient's derivatives cancel."""
    near = rate < SERIES_BELOW
    small, large = torch.where(near, rate, 0.0), torch.where(near, 1.0, rate)
    one = series = torch.ones_like(rate)
    for n in range(SERIES_TERMS[rate.dtype], 1, -1):
        series = torch.addcmul(one, small, series, value=-1.0 / n)
    return torch.where(near, series, -torch.expm1(-large) / large)


def not_negative(op: str, rate: Tensor) -> Tensor:
    """Return rates if none is negative; where values are not waited for, NaN in the places that are."""
    if not readable(rate):
        return torch.where(rate < 0, torch.nan, rate)
    if bool((rate < 0).any()):
        raise DomainError(f"hebbian.{op}: expected decay Γ ≥ 0, got {rate.min():g}; map it by softplus.")
    return rate


def check_options(op: str, **chosen: str) -> None:
    """Raise ConfigError unless every option is one of its words."""
    for name, value in chosen.items():
        if value not in OPTIONS[name]:
            raise ConfigError(f"hebbian.{op}: expected {name} to be one of {OPTIONS[name]}, got {value!r}.")


def check_kinds(op: str, **tensors: Tensor | None) -> None:
    """Raise DomainError unless all are of real floating dtypes on one device, and q, k, v of one dtype."""
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        if not x.is_floating_point():
            raise DomainError(f"hebbian.{op}: expected {name} of a real floating dtype, got {x.dtype}; convert it.")
        if x.device != given["v"].device:
            raise DomainError(f"hebbian.{op}: v is on {given['v'].device}, {name} on {x.device}; move one.")
    streams = {name: given[name].dtype for name in ("q", "k", "v") if name in given}
    if len(set(streams.values())) > 1:
        raise DomainError(f"hebbian.{op}: expected queries, keys and values of one dtype, got {streams}; convert them.")


def check_token(op: str, state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, eta: Tensor) -> None:
    """Raise unless one token fits the state (..., H, K, V)."""
    expect_tensors(f"hebbian.{op}", state=state, q=q, k=k, v=v, decay=decay, eta=eta)
    if state.ndim < 3 or 0 in state.shape[-3:]:
        raise ShapeError(f"hebbian.{op}: expected a state (..., H, K, V), got {tuple(state.shape)}.")
    *heads, width, depth = state.shape
    same(op, "a query", q, (*heads, width))
    same(op, "a key", k, (*heads, width))
    same(op, "a value", v, (*heads, depth))
    for name, x in (("decay", decay), ("eta", eta)):
        fits(op, name, x, tuple(heads), "give one number per head")
    check_kinds(op, state=state, q=q, k=k, v=v, decay=decay, eta=eta)


def fits(op: str, what: str, x: Tensor, shape: tuple[int, ...], advice: str) -> None:
    """Raise ShapeError unless x broadcasts to a shape."""
    sizes = tuple(x.shape)
    if len(sizes) > len(shape) or any(n not in (1, m) for n, m in zip(sizes[::-1], shape[::-1], strict=False)):
        raise ShapeError(
            f"hebbian.{op}: expected {what} of shape {shape} or one that broadcasts to it, got {sizes}; {advice}."
        )


def same(op: str, what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless x has a shape."""
    if tuple(x.shape) != shape:
        raise ShapeError(f"hebbian.{op}: expected {what} of shape {shape}, got {tuple(x.shape)}.")


def _check(
    op: str,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    """Raise unless shapes, dtypes and devices fit together."""
    expect_tensors(f"hebbian.{op}", k=k, v=v, decay=decay, eta=eta)
    expect_tensors_or_none(f"hebbian.{op}", initial=initial, segment_ids=segment_ids)
    if v.ndim < 3 or 0 in v.shape[-3:]:
        raise ShapeError(
            f"hebbian.{op}: expected values (..., T, H, V) with at least one token, head and channel, "
            f"got {tuple(v.shape)}."
        )
    *batch, length, heads, width = v.shape
    if k.shape[:-1] != v.shape[:-1] or k.shape[-1] == 0:
        raise ShapeError(
            f"hebbian.{op}: expected keys (..., T, H, K) with the batch, tokens and heads of values {tuple(v.shape)}, "
            f"got {tuple(k.shape)}."
        )
    for name, x in (("decay", decay), ("eta", eta)):
        fits(op, name, x, (*batch, length, heads), "give one number per token and head, (H,) or (T, 1)")
    check_kinds(op, k=k, v=v, decay=decay, eta=eta, initial=initial)
    if initial is not None:
        state = heads, k.shape[-1], width
        fits(op, "an initial state", initial, (*batch, *state), "give a matrix (K, V) per head")
        if tuple(initial.shape[-3:]) != state:
            raise ShapeError(
                f"hebbian.{op}: expected an initial state of shape {(*batch, *state)}, got {tuple(initial.shape)}."
            )
    if segment_ids is None:
        return
    fits(op, "segment_ids", segment_ids, (*batch, length), "give one number per token")
    if segment_ids.shape[-1:] != (length,):
        raise ShapeError(
            f"hebbian.{op}: expected segment_ids of shape {(*batch, length)}, one number per token, "
            f"got {tuple(segment_ids.shape)}."
        )
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise DomainError(f"hebbian.{op}: expected whole numbers in segment_ids, got {segment_ids.dtype}.")
    if segment_ids.device != v.device:
        raise DomainError(f"hebbian.{op}: v is on {v.device}, segment_ids on {segment_ids.device}; move one.")


def _restarts(segment_ids: Tensor) -> Tensor:
    """Return where a token (..., T) does not continue the segment of the one before it."""
    change = segment_ids[..., 1:] != segment_ids[..., :-1]
    return torch.cat([torch.zeros_like(segment_ids[..., :1], dtype=torch.bool), change], -1)
