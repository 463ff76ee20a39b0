"""What the products of sign–log numbers accept, and the one layout in which their implementations take it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype

Factors = tuple[Tensor | None, Tensor, Tensor | None, Tensor]
"""sign_a, log_a, sign_b, log_b; no signs where every number is positive."""


def flatten(factors: Factors) -> tuple[Factors, tuple[int, ...]]:
    """Return contiguous (batch, M, K) and (batch, K, N) factors in the accumulation dtype, and the product's shape.

    One right factor for many left ones is a single product of more rows.
    """
    sign_a, log_a, sign_b, log_b = factors
    dtype = accumulation_dtype(log_a.dtype)
    if log_b.ndim == 2:
        lead = tuple(log_a.shape[:-1])
        left, right = (1, math.prod(lead), log_a.shape[-1]), (1, *log_b.shape)
    else:
        batch = tuple(torch.broadcast_shapes(log_a.shape[:-2], log_b.shape[:-2]))
        lead = (*batch, log_a.shape[-2])
        left, right = ((math.prod(batch), *x.shape[-2:]) for x in (log_a, log_b))
        sign_a, sign_b = (None if x is None else x.expand(*batch, *x.shape[-2:]) for x in (sign_a, sign_b))
        log_a, log_b = (x.expand(*batch, *x.shape[-2:]) for x in (log_a, log_b))
    left_sign, right_sign = (
        None if x is None else x.reshape(size).contiguous() for x, size in ((sign_a, left), (sign_b, right))
    )
    left_log, right_log = (x.reshape(size).to(dtype).contiguous() for x, size in ((log_a, left), (log_b, right)))
    return (left_sign, left_log, right_sign, right_log), (*lead, log_b.shape[-1])


def check_floating(name: str, *tensors: Tensor) -> None:
    """Raise unless the tensors are of real floating dtypes."""
    for x in tensors:
        if not isinstance(x, Tensor):
            raise DomainError(f"{name}: expected tensors, got {type(x).__name__}; convert it with torch.as_tensor.")
        if not x.is_floating_point():
            raise DomainError(f"{name}: expected a real floating-point dtype, got {x.dtype}; convert it first.")


def check_numbers(name: str, sign: Tensor, log: Tensor) -> None:
    """Raise unless sign and log are the two parts of one tensor of numbers."""
    check_floating(name, log)
    if not isinstance(sign, Tensor):
        raise DomainError(f"{name}: expected an int8 tensor of signs, got {sign!r}; take them from encode.")
    if sign.dtype != torch.int8:
        raise DomainError(f"{name}: expected signs −1, 0, +1 of dtype int8, got {sign.dtype}; take them from encode.")
    if sign.shape != log.shape:
        raise ShapeError(f"{name}: expected one sign per log {tuple(log.shape)}, got signs {tuple(sign.shape)}.")
    if sign.device != log.device:
        raise DomainError(f"{name}: the log is on {log.device}, its sign on {sign.device}; move the sign.")


def check_pairs(name: str, sign_a: Tensor, log_a: Tensor, sign_b: Tensor, log_b: Tensor) -> None:
    """Raise unless both are numbers whose shapes broadcast."""
    check_numbers(name, sign_a, log_a)
    check_numbers(name, sign_b, log_b)
    _broadcast(name, log_a.shape, log_b.shape)


def _broadcast(name: str, a: Sequence[int], b: Sequence[int]) -> None:
    """Raise unless two shapes broadcast."""
    for m, n in zip(reversed(a), reversed(b), strict=False):
        if m != n and 1 not in (m, n):
            raise ShapeError(f"{name}: expected shapes that broadcast, got {tuple(a)} and {tuple(b)}.")


def check_signed(name: str, sign_a: Tensor, log_a: Tensor, sign_b: Tensor, log_b: Tensor) -> None:
    """Raise unless the factors are those of a product and each has signs of its shape."""
    check_numbers(name, sign_a, log_a)
    check_numbers(name, sign_b, log_b)
    check_factors(name, log_a, log_b)


def check_factors(name: str, log_a: Tensor, log_b: Tensor) -> None:
    """Raise unless the logs are (…, M, K) and (…, K, N) of one real floating dtype on one device."""
    check_floating(name, log_a, log_b)
    if log_a.ndim < 2 or log_b.ndim < 2 or log_a.shape[-1] != log_b.shape[-2]:
        raise ShapeError(
            f"{name}: expected factors (..., M, K) and (..., K, N), got {tuple(log_a.shape)} and {tuple(log_b.shape)}; "
            f"the last axis of the first and the last but one of the second are summed over."
        )
    _broadcast(name, log_a.shape[:-2], log_b.shape[:-2])
    if log_a.dtype != log_b.dtype:
        raise DomainError(
            f"{name}: the left logs are {log_a.dtype}, the right ones {log_b.dtype}; convert one of them."
        )
    if log_a.device != log_b.device:
        raise DomainError(f"{name}: the left logs are on {log_a.device}, the right ones on {log_b.device}; move one.")


def check_options(name: str, mode: str, guard: float) -> None:
    """Raise unless the mode exists and the guard is in [0, 1)."""
    if mode not in ("sum", "max"):
        raise ConfigError(f"{name}: expected mode 'sum' or 'max', got {mode!r}.")
    if not 0.0 <= guard < 1.0:
        raise ConfigError(f"{name}: expected 0 ≤ cancellation_guard < 1 (0 means no guard), got {guard!r}.")
