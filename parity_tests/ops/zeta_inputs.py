"""What judges the room ``zeta``: zeros found by mpmath, and the formulas written out entry by entry."""

from __future__ import annotations

import functools
import math
from typing import Any

import mpmath
import numpy as np
import scipy.linalg

from parity_tests.harness.pair import Example, Size, Strategy


@functools.cache
def zero(n: int) -> float:
    """Return the n-th zero to float64."""
    with mpmath.workdps(20):
        return float(mpmath.zetazero(n).imag)


def first_zeros(n: int) -> np.ndarray:
    """Return the first n zeros; for dozens, not for hundreds."""
    return np.array([zero(k) for k in range(1, n + 1)])


@functools.cache
def newton_correction(height: float) -> float:
    """Return Z/Z′ at a height: how far it is from the zero next to it."""
    with mpmath.workdps(20):
        return float(mpmath.siegelz(height) / mpmath.siegelz(height, derivative=1))


def smooth_counts(n: int) -> np.ndarray:
    """Return x_j = (γ_j/2π) ln(γ_j/2πe) + 7/8."""
    turns = [gamma / (2.0 * math.pi) for gamma in first_zeros(n)]
    return np.array([turn * math.log(turn / math.e) + 0.875 for turn in turns])


def frame(n: int) -> np.ndarray:
    """Return the columns of cosines, sines and, for odd n, a constant, each divided by its norm."""
    x = smooth_counts(max(1, n // 2))
    columns = []
    for j in range(n // 2):
        omega = math.pi * x[j] / (x[n // 2 - 1] + 0.5)
        points = [omega * (i - (n - 1) / 2.0) for i in range(n)]
        columns += [[math.cos(p) for p in points], [math.sin(p) for p in points]]
    if n % 2:
        columns.append([1.0] * n)
    return np.array([np.array(c) / math.sqrt(sum(v * v for v in c)) for c in columns]).T


def nearest_orthonormal(n: int) -> np.ndarray:
    """Return the polar factor of the frame."""
    return np.asarray(scipy.linalg.polar(frame(n))[0])


def frequency(gamma: float, omega_max: float, power: float, mode: str) -> float:
    """Return the frequency that belongs to a zero."""
    table = {"inverse": 1.0 / gamma, "direct": gamma / (2.0 * math.pi)}
    return table.get(mode, omega_max * (zero(1) / gamma) ** power)


def frequencies_by_zero(n: int, omega_max: float = math.pi / 2, power: float = 1.0, mode: str = "scaled") -> np.ndarray:
    """Return the frequencies one by one."""
    return np.array([frequency(gamma, omega_max, power, mode) for gamma in first_zeros(n)])


def embedding_by_entry(positions: np.ndarray, width: int, scale: float = 1.0, **options: Any) -> np.ndarray:
    """Return the rows of positions entry by entry."""
    omega = frequencies_by_zero((width + 1) // 2, **options)
    table = np.empty((len(positions), width))
    for t, p in enumerate(positions):
        for d in range(width):
            table[t, d] = scale * (math.cos if d % 2 else math.sin)(p * omega[d // 2])
    return table


def weight_by_scipy(left: np.ndarray, right: np.ndarray, gain: float = 1.0, mode: str = "frobenius") -> np.ndarray:
    """Return Q diag(s) Qᵀ with the norm that is asked for, rank one by rank one."""
    gamma = first_zeros(left.shape[1])
    factors = []
    for noise in (left, right):
        q, r = scipy.linalg.qr(noise, mode="economic")
        factors.append(q * np.where(np.diag(r) < 0, -1.0, 1.0))
    weight = sum(gamma[0] / gamma[j] * np.outer(factors[0][:, j], factors[1][:, j]) for j in range(len(gamma)))
    wanted = gain * math.sqrt(left.shape[0]) if mode == "frobenius" else gain
    found = scipy.linalg.norm(weight) if mode == "frobenius" else scipy.linalg.norm(weight, 2)
    return np.asarray(weight * wanted / found)


def counted(_: np.random.Generator, size: Size) -> Example:
    """Return n alone."""
    return (size["n"],)


def positions(highest: float, *, whole: bool) -> Strategy:
    """Return a strategy that draws T positions below a number, and the width."""

    def strategy(generator: np.random.Generator, size: Size) -> Example:
        drawn = generator.uniform(0.0, highest, size["T"])
        return np.floor(drawn) if whole else drawn - highest / 2.0, size["D"]

    return strategy


def noise(generator: np.random.Generator, size: Size) -> Example:
    """Draw noise for both sides of a weight m × n."""
    r = min(size["m"], size["n"])
    return generator.standard_normal((size["m"], r)), generator.standard_normal((size["n"], r))
