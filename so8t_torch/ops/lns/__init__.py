"""Sign–log numbers x = s·exp(ℓ), s ∈ {−1, 0, +1}: conversion, arithmetic, and matrix products carried out in logs.

    x = 0 ⇔ (s, ℓ) = (0, −∞)           (s, ℓ)·(t, m) = (s t, ℓ + m)
    matmul:  c_ij = Σ_k s_ik t_kj exp(a_ik + b_kj)       logmatmulexp:  the same with every sign +1

Symbols: signs are int8, logs floating; a (…, M, K) and b (…, K, N) are the logs of the two factors, s and t their
signs. κ = Σ|terms| / |Σ terms| measures cancellation. Products are computed in float32, or float64 for float64.
Conventions: a term whose sign is 0 is zero whatever its log; a result whose log is −∞ has sign 0; NaN reaches the
results that it enters and no others, with sign +1; +∞ gives +∞, and ∞ − ∞ is NaN.
Cost: one GEMM and MK + KN + MN exponentials or logarithms where the factors' range suffices, see ladder.py; two GEMMs
backward. It buys log-domain semantics at the speed of a matrix product, not energy.
Twin: so8t_jax/ops/lns.py. Derivation: docs/math/lns.md.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from so8t_torch.core import forward_mode
from so8t_torch.core.backend import Candidate, choose, explain, triton_reasons
from so8t_torch.core.errors import ShapeError
from so8t_torch.ops.lns import arguments, autograd, eager
from so8t_torch.ops.lns.ladder import Report

__all__ = ["add", "condition_number", "decode", "encode", "logmatmulexp", "matmul", "mul", "sub", "sum"]

Mode = Literal["sum", "max"]


def encode(x: Float[Tensor, "*shape"]) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return (sign x, ln|x|); its gradient is 1/x, and 0 at x = 0.

    Args:
        x: real numbers; NaN gives (+1, NaN).

    Returns:
        sign, and log in the dtype of x; (0, −∞) where x = 0.

    Raises:
        DomainError: x is not of a real floating dtype.
    """
    arguments.check_floating("encode", x)
    return eager.encode(x)


def decode(sign: Int8[Tensor, "*shape"], log: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return s·exp(ℓ); overflow gives ±∞ as everywhere in floating point.

    Args:
        sign: −1, 0 or +1.
        log: natural log of the magnitude.

    Returns:
        The numbers in the dtype of the logs; 0 where the sign is 0.

    Raises:
        DomainError: signs are not int8, or logs not of a real floating dtype.
        ShapeError: they differ in shape.
    """
    arguments.check_numbers("decode", sign, log)
    return eager.decode(sign, log)


def mul(
    sign_a: Int8[Tensor, "*#shape"],
    log_a: Float[Tensor, "*#shape"],
    sign_b: Int8[Tensor, "*#shape"],
    log_b: Float[Tensor, "*#shape"],
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the products, entry by entry with broadcasting: signs multiply, logs add.

    Args:
        sign_a: signs of the first factors.
        log_a: logs of the first factors.
        sign_b: signs of the second factors.
        log_b: logs of the second factors.

    Returns:
        sign and log of a·b; (0, −∞) where a sign is 0.

    Raises:
        DomainError: signs are not int8, or logs not of a real floating dtype.
        ShapeError: a sign and its log differ in shape, or a and b do not broadcast.
    """
    arguments.check_pairs("mul", sign_a, log_a, sign_b, log_b)
    return eager.mul(sign_a, log_a, sign_b, log_b)


def add(
    sign_a: Int8[Tensor, "*#shape"],
    log_a: Float[Tensor, "*#shape"],
    sign_b: Int8[Tensor, "*#shape"],
    log_b: Float[Tensor, "*#shape"],
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the sums a + b, entry by entry with broadcasting.

    Args:
        sign_a: signs of the first terms.
        log_a: logs of the first terms.
        sign_b: signs of the second terms.
        log_b: logs of the second terms.

    Returns:
        sign and log of a + b; (0, −∞) with zero gradient where they cancel exactly.

    Raises:
        DomainError: signs are not int8, or logs not of a real floating dtype.
        ShapeError: a sign and its log differ in shape, or a and b do not broadcast.
    """
    arguments.check_pairs("add", sign_a, log_a, sign_b, log_b)
    return eager.add(sign_a, log_a, sign_b, log_b)


def sub(
    sign_a: Int8[Tensor, "*#shape"],
    log_a: Float[Tensor, "*#shape"],
    sign_b: Int8[Tensor, "*#shape"],
    log_b: Float[Tensor, "*#shape"],
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the differences a − b, entry by entry with broadcasting.

    Args:
        sign_a: signs of the first terms.
        log_a: logs of the first terms.
        sign_b: signs of what is subtracted.
        log_b: logs of what is subtracted.

    Returns:
        sign and log of a − b; (0, −∞) with zero gradient where they cancel exactly.

    Raises:
        DomainError: signs are not int8, or logs not of a real floating dtype.
        ShapeError: a sign and its log differ in shape, or a and b do not broadcast.
    """
    arguments.check_pairs("sub", sign_a, log_a, sign_b, log_b)
    return eager.add(sign_a, log_a, -sign_b, log_b)


def sum(
    sign: Int8[Tensor, "*shape k"], log: Float[Tensor, "*shape k"]
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return Σ_k s_k exp(ℓ_k) over the last axis, in sign–log form; summed in float64.

    Args:
        sign: signs of the terms.
        log: logs of the terms.

    Returns:
        sign and log of the sum; (0, −∞) with zero gradient where there is nothing, or where it cancels exactly.

    Raises:
        DomainError: signs are not int8, or logs not of a real floating dtype.
        ShapeError: they differ in shape or have no axis.
    """
    arguments.check_numbers("sum", sign, log)
    if log.ndim == 0:
        raise ShapeError("sum: expected terms along a last axis, got one number without axes; there is nothing to sum.")
    return eager.sum_last(sign, log)


def logmatmulexp(
    a: Float[Tensor, "*batch m k"], b: Float[Tensor, "*batch k n"], *, mode: Mode = "sum", backend: str = "auto"
) -> Float[Tensor, "*batch m n"]:
    """Return c_ij = ln Σ_k exp(a_ik + b_kj), or max_k (a_ik + b_kj).

    Args:
        a: logs of the left factor; batch axes broadcast as in ``torch.matmul``, strides are free.
        b: logs of the right factor.
        mode: ``"sum"``, or ``"max"``, whose subgradient goes to the first largest term.
        backend: as in ``matmul``.

    Returns:
        The logs of the product in the dtype of a; −∞ with zero gradient where every term is −∞.

    Raises:
        ShapeError, DomainError, ConfigError, BackendError: as ``matmul``.
    """
    arguments.check_factors("logmatmulexp", a, b)
    arguments.check_options("logmatmulexp", mode, 0.0)
    return _run((None, a, None, b), mode, 0.0, backend)[1]


def matmul(
    sign_a: Int8[Tensor, "*batch m k"],
    log_a: Float[Tensor, "*batch m k"],
    sign_b: Int8[Tensor, "*batch k n"],
    log_b: Float[Tensor, "*batch k n"],
    *,
    mode: Mode = "sum",
    cancellation_guard: float = 0.0,
    backend: str = "auto",
) -> tuple[Int8[Tensor, "*batch m n"], Float[Tensor, "*batch m n"]]:
    """Return the matrix product of two sign–log matrices.

    Args:
        sign_a: signs of the left factor.
        log_a: logs of the left factor; batch axes broadcast as in ``torch.matmul``, strides are free.
        sign_b: signs of the right factor.
        log_b: logs of the right factor.
        mode: ``"sum"``, or ``"max"``: only the term of largest magnitude, the first of equals.
        cancellation_guard: τ in [0, 1); an output with |Σ terms| < τ Σ|terms| gives no gradient. Values are the same
            for every τ > 0, which costs a second product. In mode ``"max"`` nothing cancels and τ has no effect.
        backend: ``"triton"``, ``"rescaled"`` (CPU), ``"eager"`` (plain operations in float64, the only one with
            forward-mode derivatives; refuses ranges that float64 cannot carry), or ``"auto"``.

    Returns:
        sign, and log in the dtype of the logs; (0, −∞) with zero gradient where the product is zero.

    Raises:
        ShapeError: the factors are not (…, M, K) and (…, K, N), or a sign and its log differ in shape.
        DomainError: signs are not int8, logs not of one real floating dtype on one device, or too wide for "eager".
        ConfigError: the mode is unknown or the guard out of range.
        BackendError: the backend cannot run this call.

    Numerics: |Δ log| ≤ u (K + ln K + 16 + |log c − a_i − b_j|) κ plus the rounding of the result; the sign is exact
        unless ``matmul_report`` says undecided.
    """
    arguments.check_signed("matmul", sign_a, log_a, sign_b, log_b)
    arguments.check_options("matmul", mode, cancellation_guard)
    return _run((sign_a, log_a, sign_b, log_b), mode, cancellation_guard, backend)


def condition_number(
    sign_a: Int8[Tensor, "*batch m k"],
    log_a: Float[Tensor, "*batch m k"],
    sign_b: Int8[Tensor, "*batch k n"],
    log_b: Float[Tensor, "*batch k n"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "*batch m n"]:
    """Return κ_ij = Σ_k|terms| / |Σ_k terms| ≥ 1 of a matrix product, from two products in float64.

    Args:
        sign_a: signs of the left factor.
        log_a: logs of the left factor.
        sign_b: signs of the right factor.
        log_b: logs of the right factor.
        backend: as in ``matmul``.

    Returns:
        κ in the dtype of the logs; 1 where every term is zero, ∞ where they cancel exactly. It has no gradient.

    Raises:
        ShapeError, DomainError, BackendError: as ``matmul``.
    """
    arguments.check_signed("condition_number", sign_a, log_a, sign_b, log_b)
    with torch.no_grad():
        a, b = eager.masked(sign_a, log_a.double()), eager.masked(sign_b, log_b.double())
        size = _run((sign_a.abs(), a, sign_b.abs(), b), "sum", 0.0, backend)[1]
        total = _run((sign_a, a, sign_b, b), "sum", 0.0, backend)[1]
        kappa = torch.where(total == -math.inf, math.inf, (size - total).exp()).clamp(min=1.0)
        return torch.where(size == -math.inf, 1.0, kappa).to(log_a.dtype)


def matmul_report(
    sign_a: Int8[Tensor, "*batch m k"],
    log_a: Float[Tensor, "*batch m k"],
    sign_b: Int8[Tensor, "*batch k n"],
    log_b: Float[Tensor, "*batch k n"],
    *,
    backend: str = "auto",
) -> Report:
    """Return the product without gradient, with the rung of every output and what remains undecided.

    Args:
        sign_a: signs of the left factor.
        log_a: logs of the left factor.
        sign_b: signs of the right factor.
        log_b: logs of the right factor.
        backend: ``"triton"``, ``"rescaled"`` or ``"auto"``; plain operations have no rungs.

    Returns:
        The report; ``shares()`` of it gives the share of every rung.

    Raises:
        ShapeError, DomainError, BackendError: as ``matmul``.
    """
    arguments.check_signed("matmul_report", sign_a, log_a, sign_b, log_b)
    chosen = choose("matmul_report", backend, _candidates(log_a, log_b)[:2])
    with torch.no_grad():
        flat, shape = arguments.flatten((sign_a, log_a, sign_b, log_b))
        if 0 in (*shape, log_a.shape[-1]):
            sign, log = (x.reshape(shape) for x in _nothing(flat))
            return Report(
                sign, log.to(log_a.dtype), torch.zeros_like(sign), sign != 0, torch.ones_like(log, dtype=log_a.dtype)
            )
        found = autograd.product(*flat, "sum", chosen)
        sign, log, rung, undecided = (x.reshape(shape) for x in (found.sign, found.log, found.rung, found.undecided))
        condition = torch.ones(shape, dtype=log_a.dtype, device=log_a.device)
        if bool(undecided.any()):
            kappa = condition_number(sign_a, log_a, sign_b, log_b, backend=chosen)
            condition = torch.where(undecided, kappa, condition)
        return Report(sign, log.to(log_a.dtype), rung, undecided, condition)


def explain_backend(log_a: Tensor, log_b: Tensor) -> str:
    """Return one line per backend: that it can run the product of these logs, or every reason why not."""
    return explain(_candidates(log_a, log_b))


def _run(factors: arguments.Factors, mode: str, guard: float, backend: str) -> tuple[Tensor, Tensor]:
    """Return sign (empty without signs) and log of a product by the chosen implementation."""
    log_a, log_b = factors[1], factors[3]
    chosen = choose("lns", backend, _candidates(log_a, log_b))
    flat, shape = arguments.flatten(factors)
    if 0 in (*shape, log_a.shape[-1]):
        sign, log = _nothing(flat)
    elif chosen == "triton" or (chosen == "rescaled" and mode == "sum"):
        log, sign, _ = autograd.matmul(*flat, mode, chosen)
    elif mode == "sum":
        sign, log = eager.matmul(*flat)
    else:
        sign, log = eager.largest(*flat, autograd.search)
    if guard > 0 and mode == "sum" and log.numel():
        log = _guarded(flat, log, guard, chosen)
    return sign if factors[0] is None else sign.reshape(shape), log.reshape(shape).to(log_a.dtype)


def _guarded(flat: arguments.Factors, log: Tensor, guard: float, backend: str) -> Tensor:
    """Return the logs, detached where |Σ terms| < τ Σ|terms|."""
    sign_a, log_a, sign_b, log_b = flat
    with torch.no_grad():
        a, b = eager.masked(sign_a, log_a), eager.masked(sign_b, log_b)
        if backend == "eager":
            size = eager.matmul(None, a, None, b)[1]
        else:
            size = autograd.matmul(None, a, None, b, "sum", backend)[0]
        cancelled = log < size + math.log(guard)
    return torch.where(cancelled, log.detach(), log)


def _nothing(flat: arguments.Factors) -> tuple[Tensor, Tensor]:
    """Return the product without terms or without outputs: zeros, connected to the graph by zero gradients."""
    sign_a, log_a, _, log_b = flat
    log = log_a.sum(-1, keepdim=True) * 0 + log_b.sum(-2, keepdim=True) * 0
    log = torch.full_like(log, -math.inf) + 0 * log
    return log.new_zeros(0 if sign_a is None else log.shape, dtype=torch.int8), log


def _candidates(log_a: Tensor, log_b: Tensor) -> list[Candidate]:
    """Return the implementations in order of preference, each with the reasons why it cannot run."""
    on_host = () if log_a.device.type == "cpu" else (f"logs are on {log_a.device}, this one runs on the CPU",)
    one_way = forward_mode.reasons(log_a, log_b)
    return [
        Candidate("triton", (*triton_reasons(log_a), *one_way)),
        Candidate("rescaled", (*on_host, *one_way)),
        Candidate("eager"),
    ]
