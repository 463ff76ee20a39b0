"""What judges sign–log numbers, and what they are judged on: sums of 50 digits by mpmath, and drawn factors.

A drawn vector is (sign, log), a drawn product (sign_a, log_a, sign_b, log_b); ``unsigned`` keeps the logs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mpmath
import numpy as np

from parity_tests.harness.pair import Example, Size, Strategy

DIGITS = 50
ZERO = (0, -math.inf)


def sides(size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of both factors."""
    return (size["M"], size["K"]), (size["K"], size["N"])


def gaussian(generator: np.random.Generator, size: Size, std: float) -> list[np.ndarray]:
    """Draw signs and normal logs of both factors: signs of rows and columns, against which a quarter stands alone.

    What stands alone is e² times smaller, so that few terms cancel and a float32 sum keeps its digits.
    """
    drawn = []
    for axis, shape in enumerate(sides(size)):
        whole = generator.choice([-1, 1], shape[axis])
        alone = generator.random(shape) < 0.25
        sign = np.where(alone, -1, 1) * np.expand_dims(whole, 1 - axis)
        drawn += [sign.astype(np.int8), std * generator.standard_normal(shape) - 2.0 * alone]
    return drawn


def moderate(generator: np.random.Generator, size: Size) -> Example:
    """Draw numbers around one."""
    return tuple(gaussian(generator, size, 1.0))


def wide(generator: np.random.Generator, size: Size) -> Example:
    """Draw logs of standard deviation 60: mostly one term decides, far from the largest of its row and column."""
    return tuple(gaussian(generator, size, 60.0))


def shifted(generator: np.random.Generator, size: Size) -> Example:
    """Draw numbers around one, with rows and columns multiplied by exp(±80)."""
    sign_a, log_a, sign_b, log_b = gaussian(generator, size, 1.0)
    rows, columns = (80.0 * generator.choice([-1.0, 1.0], n) for n in (size["M"], size["N"]))
    return sign_a, log_a + rows[:, None], sign_b, log_b + columns


def zeros(generator: np.random.Generator, size: Size) -> Example:
    """Draw numbers around one, a third of them zero, with a zero row, a zero column and terms that never meet."""
    sign_a, log_a, sign_b, log_b = gaussian(generator, size, 1.0)
    for sign, log in ((sign_a, log_a), (sign_b, log_b)):
        none = generator.random(sign.shape) < 1 / 3
        sign[none], log[none] = ZERO
    sign_a[0], log_a[0] = ZERO
    sign_b[:, -1], log_b[:, -1] = ZERO
    return sign_a, log_a, sign_b, log_b


def lopsided(generator: np.random.Generator, size: Size) -> Example:
    """Draw numbers around one, and one term whose left factor is exp(200) and whose product is nothing.

    Measured from the largest of its row, every factor that matters is below the smallest float32. The terms of an
    output have one sign, so that depth is judged by itself.
    """
    _, log_a, _, log_b = gaussian(generator, size, 1.0)
    log_a[:, 0] += 200.0
    log_b[0] -= 300.0
    rows, middle, columns = (generator.choice([-1, 1], size[axis]).astype(np.int8) for axis in "MKN")
    return np.outer(rows, middle), log_a, np.outer(middle, columns), log_b


def cancelling(generator: np.random.Generator, size: Size) -> Example:
    """Draw pairs of terms of opposite sign whose logs differ by 1/500 to 1/250: κ is about 700."""
    _, log_a, _, log_b = gaussian(generator, size, 1.0)
    sign_a, sign_b = np.ones_like(log_a, np.int8), np.ones_like(log_b, np.int8)
    second = slice(1, None, 2)
    first = slice(0, 2 * log_a[:, second].shape[1], 2)
    closeness = 0.002 * (1.0 + generator.random(log_a[:, second].shape))
    sign_a[:, second], log_a[:, second] = -1, log_a[:, first] - closeness
    log_b[second] = log_b[first]
    return sign_a * generator.choice([-1, 1], (size["M"], 1)).astype(np.int8), log_a, sign_b, log_b


def nonfinite(generator: np.random.Generator, size: Size) -> Example:
    """Draw numbers around one; one NaN, one infinite factor, and zero signs beside a NaN and an infinity."""
    sign_a, log_a, sign_b, log_b = gaussian(generator, size, 1.0)
    log_a[0, 0], log_a[1, 1] = math.nan, math.inf
    sign_b[:2, 0], log_b[:2, 0] = ZERO
    sign_b[0, -1], log_b[0, -1] = 0, math.inf
    return sign_a, log_a, sign_b, log_b


def unsigned(strategy: Strategy) -> Strategy:
    """Return the same draw without its signs."""
    return lambda generator, size: strategy(generator, size)[1::2]


def vector(strategy: Strategy) -> Strategy:
    """Return the left factor of a draw of one row: (sign, log) of length n."""
    return lambda generator, size: tuple(x[-1] for x in strategy(generator, {"M": 2, "K": size["n"], "N": 2})[:2])


def two_vectors(strategy: Strategy) -> Strategy:
    """Return two vectors of length n."""
    draw = vector(strategy)
    return lambda generator, size: (*draw(generator, size), *draw(generator, size))


def real(generator: np.random.Generator, size: Size) -> Example:
    """Draw real numbers, none within a tenth of zero."""
    x = generator.standard_normal(size["n"])
    return (x + 0.1 * np.sign(x),)


def spread(generator: np.random.Generator, size: Size) -> Example:
    """Draw real numbers over seven decades."""
    return (10.0 ** generator.uniform(-4.0, 3.0, size["n"]) * generator.choice([-1.0, 1.0], size["n"]),)


def some_zero(generator: np.random.Generator, size: Size) -> Example:
    """Draw real numbers, a third of them zero, one of them −0."""
    x = real(generator, size)[0]
    x[generator.random(x.shape) < 1 / 3] = 0.0
    x[0] = -0.0
    return (x,)


def special(generator: np.random.Generator, size: Size) -> Example:
    """Draw real numbers and both infinities and NaN among them."""
    x = real(generator, size)[0]
    return (np.concatenate([x, [math.inf, -math.inf, math.nan]]),)


def power(sign: int, log: float) -> mpmath.mpf:
    """Return s·exp(ℓ)."""
    return int(sign) * mpmath.exp(mpmath.mpf(float(log))) if sign else mpmath.mpf(0)


def as_pair(total: mpmath.mpf) -> tuple[int, float]:
    """Return sign and log of a number; NaN has the sign +1."""
    if mpmath.isnan(total):
        return 1, math.nan
    return int(mpmath.sign(total)), float(mpmath.log(abs(total))) if total else -math.inf


def assembled(entries: Iterable[tuple[int, float]], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays of signs and logs."""
    couples = list(entries)
    return (
        np.array([sign for sign, _ in couples], np.int8).reshape(shape),
        np.array([log for _, log in couples], np.float64).reshape(shape),
    )


def encode_by_entry(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return signs and logs with the standard library."""
    return assembled([(1, v) if math.isnan(v) else _encoded(v) for v in x], x.shape)


def _encoded(value: float) -> tuple[int, float]:
    return (int(math.copysign(1.0, value)), math.log(abs(value))) if value else ZERO


def decode_by_entry(sign: np.ndarray, log: np.ndarray) -> np.ndarray:
    """Return the numbers with mpmath."""
    with mpmath.workdps(DIGITS):
        return np.array([float(power(s, v)) for s, v in zip(sign, log, strict=True)])


def mul_by_entry(*factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the products of two vectors with mpmath."""
    with mpmath.workdps(DIGITS):
        return assembled(
            [as_pair(power(s, a) * power(t, b)) for s, a, t, b in zip(*factors, strict=True)], factors[0].shape
        )


def add_by_entry(*terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of two vectors with mpmath."""
    with mpmath.workdps(DIGITS):
        return assembled(
            [as_pair(power(s, a) + power(t, b)) for s, a, t, b in zip(*terms, strict=True)], terms[0].shape
        )


def sub_by_entry(*terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the differences of two vectors with mpmath."""
    with mpmath.workdps(DIGITS):
        return assembled(
            [as_pair(power(s, a) - power(t, b)) for s, a, t, b in zip(*terms, strict=True)], terms[0].shape
        )


def sum_by_terms(sign: np.ndarray, log: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of one vector with mpmath."""
    with mpmath.workdps(DIGITS):
        return assembled([as_pair(mpmath.fsum(power(s, v) for s, v in zip(sign, log, strict=True)))], ())


def terms_by_mpmath(sign_a: np.ndarray, log_a: np.ndarray, sign_b: np.ndarray, log_b: np.ndarray) -> list[list[Any]]:
    """Return the terms of every output in 50 digits, row by row; inside ``workdps``."""
    left, right = (
        [[(s, power(s, v)) for s, v in zip(row, logs, strict=True)] for row, logs in zip(sign, log, strict=True)]
        for sign, log in ((sign_a, log_a), (sign_b.T, log_b.T))
    )
    return [
        [x * y if s * t else mpmath.mpf(0) for (s, x), (t, y) in zip(row, column, strict=True)]
        for row in left
        for column in right
    ]


def product_by_mpmath(
    sign_a: np.ndarray, log_a: np.ndarray, sign_b: np.ndarray, log_b: np.ndarray, cancellation_guard: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix product, every sum in 50 digits."""
    del cancellation_guard
    with mpmath.workdps(DIGITS):
        sums = [as_pair(mpmath.fsum(terms)) for terms in terms_by_mpmath(sign_a, log_a, sign_b, log_b)]
    return assembled(sums, (len(sign_a), sign_b.shape[1]))


def condition_by_mpmath(*factors: np.ndarray) -> np.ndarray:
    """Return Σ|terms| / |Σ terms|, every sum in 50 digits."""
    with mpmath.workdps(DIGITS):
        sums = [(mpmath.fsum(map(abs, t)), abs(mpmath.fsum(t))) for t in terms_by_mpmath(*factors)]
        ratios = [1.0 if not size else float(size / total) if total else math.inf for size, total in sums]
    return np.array(ratios).reshape(len(factors[0]), factors[2].shape[1])


def largest_by_loops(
    sign_a: np.ndarray, log_a: np.ndarray, sign_b: np.ndarray, log_b: np.ndarray, mode: str = "max"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first term of largest magnitude of every output."""
    del mode
    found = []
    for i, j in np.ndindex(len(sign_a), sign_b.shape[1]):
        sign, best = ZERO
        for k in range(len(sign_b)):
            if sign_a[i, k] * sign_b[k, j] and log_a[i, k] + log_b[k, j] > best:
                sign, best = int(sign_a[i, k]) * int(sign_b[k, j]), log_a[i, k] + log_b[k, j]
        found.append((sign, best))
    return assembled(found, (len(sign_a), sign_b.shape[1]))


def without_signs(product: Any) -> Any:
    """Return a product's oracle for logs alone."""

    def of_logs(a: np.ndarray, b: np.ndarray, **keywords: Any) -> np.ndarray:
        ones = (np.ones(x.shape, np.int8) for x in (a, b))
        return np.asarray(product(next(ones), a, next(ones), b, **keywords)[1])

    return of_logs
