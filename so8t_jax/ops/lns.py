"""Sign–log numbers x = s·exp(ℓ), s ∈ {−1, 0, +1}: conversion, arithmetic, and matrix products carried out in logs.

    x = 0 ⇔ (s, ℓ) = (0, −∞)           (s, ℓ)·(t, m) = (s t, ℓ + m)
    Σ_k s_k exp(ℓ_k) = S   ⇒   (sign S, ln|S|),   ln|S| = m + ln|Σ_k s_k exp(ℓ_k − m)|,   m = max_k ℓ_k
    matmul:  c_ij = Σ_k s_ik t_kj exp(a_ik + b_kj)       logmatmulexp:  the same with every sign +1

Symbols: signs are int8, logs floating; a (M, K) and b (K, N) are the logs of the two factors, s and t their signs.
κ = Σ|terms| / |Σ terms| measures cancellation: a relative error u of the terms is κu in the result.
The gradient is that of a signed softmax, ∂ln|S|/∂ℓ_k = s_k sign(S) exp(ℓ_k − ln|S|), and 0 where S = 0.
Conventions: a term whose sign is 0 is zero whatever its log; a result whose log is −∞ has sign 0; NaN reaches the
results that it enters and no others, with a sign that is not 0; +∞ gives +∞, and ∞ − ∞ is NaN.
Cost: M K N exponentials; production needs M K + K N. Derivation: docs/math/lns.md.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

__all__ = ["add", "condition_number", "decode", "encode", "logmatmulexp", "matmul", "mul", "sub", "sum"]


def encode(x: Float[Array, "*shape"]) -> tuple[Int8[Array, "*shape"], Float[Array, "*shape"]]:
    """Return (sign x, ln|x|); its gradient is 1/x, and 0 at x = 0.

    Args:
        x: real numbers; NaN gives (+1, NaN).

    Returns:
        sign and log of x; (0, −∞) where x = 0.
    """
    zero = x == 0
    log = jnp.where(zero, -jnp.inf, jnp.log(jnp.abs(jnp.where(zero, 1.0, x))))
    return _sign(x), log


def decode(sign: Int8[Array, "*shape"], log: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return s·exp(ℓ); overflow gives ±∞ as everywhere in floating point.

    Args:
        sign: −1, 0 or +1.
        log: natural log of the magnitude.

    Returns:
        The numbers; 0 where the sign is 0.
    """
    return sign.astype(log.dtype) * jnp.exp(_counted(sign, log))


def mul(
    sign_a: Int8[Array, "*#shape"],
    log_a: Float[Array, "*#shape"],
    sign_b: Int8[Array, "*#shape"],
    log_b: Float[Array, "*#shape"],
) -> tuple[Int8[Array, "*shape"], Float[Array, "*shape"]]:
    """Return the products, entry by entry with broadcasting: signs multiply, logs add.

    Args:
        sign_a: signs of the first factors.
        log_a: logs of the first factors.
        sign_b: signs of the second factors.
        log_b: logs of the second factors.

    Returns:
        sign and log of a·b; (0, −∞) where a sign is 0.
    """
    sign, log = sign_a * sign_b, log_a + log_b
    zero = (sign == 0) | (log == -jnp.inf)
    return jnp.where(zero, jnp.zeros_like(sign), sign), jnp.where(zero, -jnp.inf, log)


def add(
    sign_a: Int8[Array, "*#shape"],
    log_a: Float[Array, "*#shape"],
    sign_b: Int8[Array, "*#shape"],
    log_b: Float[Array, "*#shape"],
) -> tuple[Int8[Array, "*shape"], Float[Array, "*shape"]]:
    """Return the sums a + b, entry by entry with broadcasting: max + ln(1 ± exp(−d)), d the distance of the logs.

    Args:
        sign_a: signs of the first terms.
        log_a: logs of the first terms.
        sign_b: signs of the second terms.
        log_b: logs of the second terms.

    Returns:
        sign and log of a + b; (0, −∞) with zero gradient where they cancel exactly.
    """
    a, b = _counted(sign_a, log_a), _counted(sign_b, log_b)
    ordered = a >= b
    large, small = jnp.where(ordered, a, b), jnp.where(ordered, b, a)
    opposed = sign_a * sign_b < 0
    settled = (jnp.isinf(large) & ~jnp.isnan(small)) | (opposed & (large == small))
    gap = jnp.where(settled, 1.0, large - small)
    near = opposed & (gap < 1.0)
    close = jnp.log(-jnp.expm1(-jnp.where(near, gap, 1.0)))
    apart = jnp.log1p(jnp.where(opposed, -1.0, 1.0) * jnp.exp(-jnp.where(near, 1.0, gap)))
    log = large + jnp.where(near, close, apart)
    log = jnp.where(opposed & (large == small), jnp.where(large == jnp.inf, jnp.nan, -jnp.inf), log)
    zero, undefined = log == -jnp.inf, jnp.isnan(log)
    sign = jnp.where(zero, 0, jnp.where(undefined, 1, jnp.where(ordered, sign_a, sign_b))).astype(jnp.int8)
    return sign, jnp.where(zero, -jnp.inf, log)


def sub(
    sign_a: Int8[Array, "*#shape"],
    log_a: Float[Array, "*#shape"],
    sign_b: Int8[Array, "*#shape"],
    log_b: Float[Array, "*#shape"],
) -> tuple[Int8[Array, "*shape"], Float[Array, "*shape"]]:
    """Return the differences a − b, entry by entry with broadcasting.

    Args:
        sign_a: signs of the first terms.
        log_a: logs of the first terms.
        sign_b: signs of what is subtracted.
        log_b: logs of what is subtracted.

    Returns:
        sign and log of a − b; (0, −∞) with zero gradient where they cancel exactly.
    """
    return add(sign_a, log_a, -sign_b, log_b)


def sum(
    sign: Int8[Array, "*shape k"], log: Float[Array, "*shape k"]
) -> tuple[Int8[Array, "*shape"], Float[Array, "*shape"]]:
    """Return Σ_k s_k exp(ℓ_k) over the last axis, in sign–log form.

    Args:
        sign: signs of the terms.
        log: logs of the terms.

    Returns:
        sign and log of the sum; (0, −∞) with zero gradient where there is nothing, or where it cancels exactly.
    """
    terms, shift = _scaled_terms(sign, log)
    total = jnp.sum(terms, axis=-1)
    zero = total == 0
    magnitude = shift + jnp.log(jnp.abs(jnp.where(zero, 1.0, total)))
    return _sign(total), jnp.where(zero, -jnp.inf, magnitude)


def logmatmulexp(
    a: Float[Array, "m k"], b: Float[Array, "k n"], *, mode: Literal["sum", "max"] = "sum"
) -> Float[Array, "m n"]:
    """Return c_ij = ln Σ_k exp(a_ik + b_kj), or max_k (a_ik + b_kj).

    Args:
        a: logs of the left factor.
        b: logs of the right factor.
        mode: ``"sum"``, or ``"max"``, whose subgradient goes to the first largest term.

    Returns:
        The logs of the product; −∞ with zero gradient where every term is −∞.

    Raises:
        ValueError: the mode is unknown.
    """
    return matmul(jnp.ones(a.shape, jnp.int8), a, jnp.ones(b.shape, jnp.int8), b, mode=mode)[1]


def matmul(
    sign_a: Int8[Array, "m k"],
    log_a: Float[Array, "m k"],
    sign_b: Int8[Array, "k n"],
    log_b: Float[Array, "k n"],
    *,
    mode: Literal["sum", "max"] = "sum",
    cancellation_guard: float = 0.0,
) -> tuple[Int8[Array, "m n"], Float[Array, "m n"]]:
    """Return the matrix product of two sign–log matrices.

    Args:
        sign_a: signs of the left factor.
        log_a: logs of the left factor.
        sign_b: signs of the right factor.
        log_b: logs of the right factor.
        mode: ``"sum"``, or ``"max"``: only the term of largest magnitude, the first of equals.
        cancellation_guard: τ in [0, 1); an output with |Σ terms| < τ Σ|terms| gives no gradient. Values are the same
            for every τ. In mode ``"max"`` nothing cancels and τ has no effect.

    Returns:
        sign and log of the product; (0, −∞) with zero gradient where it is zero.

    Raises:
        ValueError: the mode is unknown or the guard is out of range.
    """
    _check(mode, cancellation_guard)
    signs, logs = _terms(sign_a, log_a, sign_b, log_b)
    if mode == "max":
        return _largest(signs, logs)
    sign, log = sum(signs, logs)
    terms = _scaled_terms(signs, logs)[0]
    cancelled = jnp.abs(jnp.sum(terms, axis=-1)) < cancellation_guard * jnp.sum(jnp.abs(terms), axis=-1)
    return sign, jnp.where(cancelled, jax.lax.stop_gradient(log), log)


def condition_number(
    sign_a: Int8[Array, "m k"], log_a: Float[Array, "m k"], sign_b: Int8[Array, "k n"], log_b: Float[Array, "k n"]
) -> Float[Array, "m n"]:
    """Return κ_ij = Σ_k|terms| / |Σ_k terms| ≥ 1 of a matrix product.

    Args:
        sign_a: signs of the left factor.
        log_a: logs of the left factor.
        sign_b: signs of the right factor.
        log_b: logs of the right factor.

    Returns:
        κ; 1 where every term is zero, ∞ where the terms cancel exactly. A diagnostic: it has no gradient.
    """
    terms, _ = _scaled_terms(*_terms(sign_a, log_a, sign_b, log_b))
    total, size = jnp.abs(jnp.sum(terms, axis=-1)), jnp.sum(jnp.abs(terms), axis=-1)
    return jax.lax.stop_gradient(jnp.where(size == 0, 1.0, size / total))


def _terms(
    sign_a: Int8[Array, "m k"], log_a: Float[Array, "m k"], sign_b: Int8[Array, "k n"], log_b: Float[Array, "k n"]
) -> tuple[Int8[Array, "m n k"], Float[Array, "m n k"]]:
    """Return the K terms of every output."""
    return mul(sign_a[:, None, :], log_a[:, None, :], sign_b.T[None, :, :], log_b.T[None, :, :])


def _scaled_terms(
    sign: Int8[Array, "*shape k"], log: Float[Array, "*shape k"]
) -> tuple[Float[Array, "*shape k"], Float[Array, "*shape"]]:
    """Return s_k exp(ℓ_k − m) and the shift m: the largest log, or 0 where that is not finite.

    Beside a term that is +∞ the finite ones are nothing.
    """
    counted = _counted(sign, log)
    largest = jax.lax.stop_gradient(jnp.max(counted, axis=-1, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    nothing = (largest == jnp.inf)[..., None] & (counted < jnp.inf)
    relative = jnp.where(nothing, -jnp.inf, counted - shift[..., None])
    return sign.astype(log.dtype) * jnp.exp(relative), shift


def _largest(
    sign: Int8[Array, "*shape k"], log: Float[Array, "*shape k"]
) -> tuple[Int8[Array, "*shape"], Float[Array, "*shape"]]:
    """Return the first term of largest magnitude; zero where there is none."""
    if log.shape[-1] == 0:
        return jnp.zeros(log.shape[:-1], jnp.int8), jnp.full(log.shape[:-1], -jnp.inf, log.dtype)
    first = jnp.argmax(log, axis=-1, keepdims=True)
    value, its_sign = (jnp.take_along_axis(x, first, axis=-1)[..., 0] for x in (log, sign))
    value = jnp.where(value == -jnp.inf, -jnp.inf, value)
    return jnp.where(jnp.isnan(value), jnp.ones_like(its_sign), its_sign), value


def _counted(sign: Int8[Array, "*shape"], log: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the logs, −∞ where the sign is 0."""
    return jnp.where(sign == 0, -jnp.inf, log)


def _sign(x: Float[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """Return −1, 0 or +1; NaN counts as +1, so that it is never taken for zero."""
    return jnp.where(x == 0, 0, jnp.where(x < 0, -1, 1)).astype(jnp.int8)


def _check(mode: str, cancellation_guard: float) -> None:
    """Raise unless the mode exists and the guard is in [0, 1)."""
    if mode not in ("sum", "max"):
        raise ValueError(f"expected mode 'sum' or 'max', got {mode!r}")
    if not 0.0 <= cancellation_guard < 1.0:
        raise ValueError(f"expected 0 ≤ cancellation_guard < 1, got {cancellation_guard!r}")
