"""Identities of sign–log arithmetic, and the scale on which a sign–log result is judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.harness.pair import Example


def difference(left: Any, right: Any) -> np.ndarray:
    """Return left − right of logs, 0 where both are −∞."""
    left, right = np.asarray(left), np.asarray(right)
    nothing = np.isneginf(left) & np.isneginf(right)
    return np.where(nothing, 0.0, np.where(nothing, 0.0, left) - np.where(nothing, 0.0, right))


def unlike(left: Any, right: Any) -> np.ndarray:
    """Return 1 where signs differ."""
    return np.asarray(np.asarray(left) != np.asarray(right), np.float64)


def apart(left: Any, right: Any, scale: Any = 1.0) -> np.ndarray:
    """Return how far two sign–log results are from each other, logs in units of ``scale``."""
    return np.concatenate([unlike(left[0], right[0]).ravel(), (difference(left[1], right[1]) / scale).ravel()])


def height(*logs: np.ndarray) -> float:
    """Return the largest finite |log|, at least 1: its rounding is the error that logs carry."""
    return max(1.0, *(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) for x in logs))


def cancellation(sign_a: np.ndarray, log_a: np.ndarray, sign_b: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    """Return κ of every output, in plain numpy."""
    p = log_a[:, None] + log_b.T[None]
    top = p.max(-1, keepdims=True)
    terms = sign_a[:, None] * sign_b.T[None] * np.exp(p - np.where(np.isfinite(top), top, 0.0))
    size, total = np.abs(terms).sum(-1), np.abs(terms.sum(-1))
    return np.where(size == 0, 1.0, size / np.where(size == 0, 1.0, total))


def scale_of(example: Example) -> np.ndarray:
    """Return the natural error of a product in units of u: κ times the height of its logs."""
    return cancellation(*example) * height(example[1], example[3])


def numbers(sign: np.ndarray, log: np.ndarray) -> np.ndarray:
    """Return s·exp(ℓ) with |ℓ| cut at 3, so that ordinary arithmetic can follow."""
    return np.where(sign == 0, 0.0, sign * np.exp(np.clip(log, -3.0, 3.0)))


def cut(sign: np.ndarray, log: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the same numbers as ``numbers`` in sign–log form."""
    return sign, np.where(sign == 0, -np.inf, np.clip(log, -3.0, 3.0))


def round_trip_law(f: Any, example: Example) -> np.ndarray:
    """Encoding and exponentiating gives the number back."""
    sign, log = (np.asarray(x) for x in f(*example))
    x = np.where(np.isfinite(example[0]), example[0], 1.0)
    return np.asarray(np.where(np.isfinite(example[0]), sign * np.exp(log), 1.0) - x) / np.maximum(np.abs(x), 1e-300)


def inverse_law(f: Any, example: Example) -> np.ndarray:
    """The product with the reciprocal has log 0."""
    sign, log = np.where(example[0] == 0, 1, example[0]).astype(np.int8), np.nan_to_num(example[1], neginf=2.0)
    return apart(f(sign, log, sign, -log), (np.ones_like(sign), np.zeros_like(log)))


def linear_law(combine: Any) -> Any:
    """Return the law that decoding commutes with an entrywise operation."""

    def law(f: Any, example: Example) -> np.ndarray:
        sign_a, log_a, sign_b, log_b = example
        x, y = numbers(sign_a, log_a), numbers(sign_b, log_b)
        sign, log = f(*cut(sign_a, log_a), *cut(sign_b, log_b))
        return np.asarray(sign * np.exp(log) - combine(x, y)) / np.maximum(np.abs(x) + np.abs(y), 1.0)

    return law


def swap_law(f: Any, example: Example) -> np.ndarray:
    """The order of two operands does not matter, bit for bit; noise on the logs would show."""
    return apart(f(*example), f(*example[2:], *example[:2]))


def itself_law(f: Any, example: Example) -> np.ndarray:
    """A number minus itself is exactly zero, and minus its negative twice it."""
    sign, log = example[:2]
    nothing = f(sign, log, sign, log)
    twice = apart(f(sign, log, -sign, log), (sign, log + np.log(2.0)), height(log))
    return np.concatenate([np.abs(np.asarray(nothing[0], np.float64)), ~np.isneginf(nothing[1]), twice])


def fold_law(f: Any, example: Example) -> np.ndarray:
    """A sum of two halves' sums is the sum."""
    sign, log = example
    half = max(1, len(log) // 2)
    halves = [f(sign[part], log[part]) for part in (slice(0, half), slice(half, None))]
    joined = f(*(np.stack([np.asarray(h[i]) for h in halves]) for i in (0, 1)))
    kappa = cancellation(sign[None], log[None], np.ones((len(log), 1), np.int8), np.zeros((len(log), 1)))
    return apart(joined, f(sign, log), float(kappa[0, 0]) * height(log))


def dense_law(f: Any, example: Example) -> np.ndarray:
    """The product of encoded matrices decodes to the product of the matrices."""
    x, y = numbers(*example[:2]), numbers(*example[2:])
    sign, log = (np.asarray(out) for out in f(*cut(*example[:2]), *cut(*example[2:])))
    return np.asarray(sign * np.exp(log) - x @ y) / np.maximum(np.abs(x) @ np.abs(y), 1e-300)


def shift_law(f: Any, example: Example) -> np.ndarray:
    """Multiplying rows and columns by powers adds their logs.

    The moved logs are rounded, each by u times its height, and what that does to the terms is multiplied by κ.
    """
    sign_a, log_a, sign_b, log_b = example
    rows, columns = np.linspace(-70.0, 90.0, len(log_a))[:, None], np.linspace(40.0, -50.0, log_b.shape[1])
    sign, log = f(*example)
    moved = (sign_a, log_a + rows, sign_b, log_b + columns)
    return apart(f(*moved), (sign, np.asarray(log) + (rows + columns)), scale_of(moved))


def order_law(f: Any, example: Example) -> np.ndarray:
    """The order of the terms does not matter."""
    sign_a, log_a, sign_b, log_b = example
    turned = f(sign_a[:, ::-1].copy(), log_a[:, ::-1].copy(), sign_b[::-1].copy(), log_b[::-1].copy())
    return apart(turned, f(*example), scale_of(example))


def transpose_law(f: Any, example: Example) -> np.ndarray:
    """(AB)ᵀ = BᵀAᵀ."""
    turned = [np.asarray(out).T for out in f(*(x.T.copy() for x in (*example[2:], *example[:2])))]
    return apart(turned, f(*example), scale_of(example))


def negation_law(f: Any, example: Example) -> np.ndarray:
    """Changing the sign of a factor changes the sign of the product and no log, beside a zero whose log is NaN."""
    sign_a, log_a, sign_b, log_b = example
    wider = np.pad(-sign_a, ((0, 0), (0, 1))), np.pad(log_a, ((0, 0), (0, 1)), constant_values=np.nan)
    longer = np.pad(sign_b, ((0, 1), (0, 0)), constant_values=1), np.pad(log_b, ((0, 1), (0, 0)))
    sign, log = f(*example)
    return apart(f(*wider, *longer), (-np.asarray(sign), log), scale_of(example))


def bounds_law(f: Any, example: Example) -> np.ndarray:
    """max ≤ ln Σ exp ≤ max + ln K; one entry is exactly ln K."""
    a, b = example
    p = (a[:, :, None] + b[None]).max(1)
    above = difference(f(a, b), p)
    outside = np.maximum(-above, 0.0) + np.maximum(above - np.log(a.shape[1]), 0.0)
    flat = np.asarray(f(np.zeros_like(a), np.zeros_like(b))) - np.log(a.shape[1])
    return np.concatenate([outside.ravel() / height(a, b), flat.ravel()])


def semiring_law(f: Any, example: Example) -> np.ndarray:
    """(ab)bᵀ = a(bbᵀ)."""
    a, b = example
    left, right = f(np.asarray(f(a, b)), b.T.copy()), f(a, np.asarray(f(b, b.T.copy())))
    return difference(left, right) / height(a, b)


def dominated_law(f: Any, example: Example) -> np.ndarray:
    """Smaller terms and a second copy of every term change nothing, bit for bit, and rows may be shifted."""
    a, b = example
    more = f(np.concatenate([a, a, a - 1.0], 1), np.concatenate([b, b, b], 0))
    return np.concatenate(
        [difference(more, f(a, b)), difference(f(a + 8.0, b), np.asarray(f(a, b)) + 8.0) / height(a + 8.0, b)]
    )


def kappa_law(f: Any, example: Example) -> np.ndarray:
    """κ is what numpy finds, and 1 when all terms have one sign."""
    ones = [np.abs(sign) for sign in example[::2]]
    single = np.asarray(f(ones[0], example[1], ones[1], example[3])) - 1.0
    kappa = cancellation(*example)
    return np.concatenate(
        [single.ravel(), ((np.asarray(f(*example)) - kappa) / kappa**2).ravel() / height(*example[1::2])]
    )
