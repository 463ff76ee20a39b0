"""The one place where two results are compared: structure, shape, dtype, placement of NaN, and norm-wise error.

For one output of one example the error in eps is

    max|x̂ − x| / (eps(dtype) · max(max|x|, floor, smallest normal number of dtype))

and the error of a batch is that of its worst example. It is accepted when it is at most

    budget                                     in float64, where x itself is a float64 computation
    min(budget, max(bar · straightforward, 1)) below, where ``straightforward`` is the error of the definition
                                               evaluated in float32 and rounded once to dtype, and ``bar`` is 2

``zeros`` is the error that an output of zeros would have: it must not be accepted where x reaches its floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parity_tests.harness.inputs import TORCH, to_numpy
from parity_tests.harness.pair import Eps


class ParityError(AssertionError):
    """Production and reference disagree, or the declaration judges nothing."""


@dataclass(frozen=True)
class Expected:
    """What one output or gradient must be.

    Attributes:
        what: how it is called in a failure, e.g. ``output 0``.
        dtype: name of the dtype it must have.
        truth: float64 result of the definition.
        straightforward: error in eps of the same computed in float32 and rounded once, the worst of several batches
            so that one lucky rounding is no bar; ``None`` where no second bar applies.
        budget: accepted error in eps.
        floor: natural size where the result cancels.
        batched: whether axis 0 counts examples.
        nonfinite: whether NaN and infinities are declared.
        bar: factor of ``straightforward``.
    """

    what: str
    dtype: str
    truth: np.ndarray
    straightforward: float | None
    budget: float
    floor: float
    batched: bool
    nonfinite: bool = False
    bar: float = 2.0


@dataclass(frozen=True)
class Deviation:
    """How far one result is from what was expected; ``problem`` is what no number can express.

    Attributes:
        what: how it is called in a failure.
        dtype: dtype of the result.
        max_abs: largest absolute error.
        relative_l2: ‖x̂ − x‖₂ / ‖x‖₂.
        eps: error in eps, as the module says.
        ulp: largest error in units in the last place of the largest entry.
        budget: declared limit in eps.
        allowed: limit in eps once the second bar is applied.
        zeros: error in eps that an output of zeros would have.
        reaches_floor: whether some entry of the truth is as large as the declared floor.
        problem: why the comparison failed before any number could be computed.
    """

    what: str
    dtype: str
    max_abs: float = 0.0
    relative_l2: float = 0.0
    eps: float = 0.0
    ulp: float = 0.0
    budget: float = 0.0
    allowed: float = 0.0
    zeros: float = 0.0
    reaches_floor: bool = False
    problem: str | None = None

    @property
    def green(self) -> bool:
        """Whether the result is accepted (an error that is NaN is not)."""
        return self.problem is None and self.eps <= self.allowed

    @property
    def vacuous(self) -> bool:
        """Whether an output of zeros would be accepted though the truth is not negligible."""
        return self.problem is None and self.reaches_floor and self.zeros <= self.allowed

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.what}: {self.problem}"
        return (
            f"{self.what} ({self.dtype}): error {self.eps:.3g} eps, allowed {self.allowed:.3g} eps "
            f"(budget {self.budget:.3g}); max abs {self.max_abs:.3g}, relative L2 {self.relative_l2:.3g}"
        )


def eps_of(budget: Eps, dtype: str) -> float:
    """Return the declared budget for a dtype.

    Raises:
        ParityError: the declaration names budgets by dtype and leaves this one out.
    """
    if not isinstance(budget, Mapping):
        return float(budget)
    if dtype not in budget:
        raise ParityError(f"expected a budget for {dtype}, the declaration has {', '.join(budget)}; add it")
    return float(budget[dtype])


def compare(expected: Expected, actual: Any) -> Deviation:
    """Compare one tensor of production with what the definition gives."""
    problem = _mismatch(expected, actual)
    if problem is not None:
        return Deviation(expected.what, expected.dtype, problem=problem)
    return measure(expected, to_numpy(actual))


def measure(expected: Expected, found: np.ndarray) -> Deviation:
    """Measure the error of an array whose shape and dtype are already known to be right."""
    truth = expected.truth
    if not np.issubdtype(truth.dtype, np.inexact):
        wrong = int(np.count_nonzero(truth != found))
        problem = f"{wrong} of {truth.size} entries differ (integers and booleans must be equal)" if wrong else None
        return Deviation(expected.what, expected.dtype, problem=problem)
    problem = _nonfinite(expected, found)
    if problem is not None:
        return Deviation(expected.what, expected.dtype, problem=problem)
    keep = np.isfinite(truth)
    truth, found = np.where(keep, truth, 0.0), np.where(keep, found, 0.0)
    error, zeros = (
        error_in_eps(expected.dtype, truth, other, floor=expected.floor, batched=expected.batched)
        for other in (found, np.zeros_like(truth))
    )
    return Deviation(
        expected.what,
        expected.dtype,
        max_abs=_largest(found - truth),
        relative_l2=_relative_l2(truth, found),
        eps=error,
        ulp=_ulp(truth, found, expected.dtype),
        budget=expected.budget,
        allowed=allowed(expected),
        zeros=zeros,
        reaches_floor=_largest(truth) >= max(expected.floor, _unit(expected.dtype).tiny),
    )


def _mismatch(expected: Expected, actual: Any) -> str | None:
    if not isinstance(actual, torch.Tensor):
        return f"expected a tensor, got {type(actual).__name__}"
    if tuple(actual.shape) != expected.truth.shape:
        return f"expected shape {expected.truth.shape}, got {tuple(actual.shape)}"
    wanted = TORCH.get(expected.dtype) or getattr(torch, expected.dtype)
    if actual.dtype != wanted:
        return f"expected dtype {wanted}, got {actual.dtype}"
    return None


def _nonfinite(expected: Expected, found: np.ndarray) -> str | None:
    truth_bad, found_bad = ~np.isfinite(expected.truth), ~np.isfinite(found)
    if not expected.nonfinite:
        if found_bad.any() or truth_bad.any():
            return (
                f"non-finite values: {truth_bad.sum()} in the reference, {found_bad.sum()} in production "
                "(agreeing on NaN is a failure unless the strategy is declared in `nonfinite`)"
            )
        return None
    same = np.array_equal(expected.truth[truth_bad], found[truth_bad], equal_nan=True)
    if not same or (truth_bad != found_bad).any():
        return "NaN and infinities are not in the same places on both sides"
    return None


def _by_example(values: np.ndarray, batched: bool) -> np.ndarray:
    return values.reshape(values.shape[0], -1) if batched and values.ndim else values.reshape(1, -1)


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max()) if values.size else 0.0


def _unit(dtype: str) -> torch.finfo:
    return torch.finfo(TORCH[dtype])


def allowed(expected: Expected) -> float:
    """Return the limit in eps once the second bar is applied."""
    if expected.straightforward is None:
        return expected.budget
    return min(expected.budget, max(expected.bar * expected.straightforward, 1.0))


def error_in_eps(dtype: str, truth: np.ndarray, found: np.ndarray, *, floor: float, batched: bool) -> float:
    """Return the error in eps where the truth is finite; infinite where only the found value is not."""
    keep = np.isfinite(truth)
    truth, found = np.where(keep, truth, 0.0), np.where(keep, found, 0.0)
    if not np.isfinite(found).all():
        return float("inf")
    if truth.size == 0:
        return 0.0
    info = _unit(dtype)
    rows, wrong = (_by_example(np.abs(v), batched) for v in (truth, found - truth))
    scale = np.maximum(rows.max(axis=1), max(floor, info.tiny))
    return float((wrong.max(axis=1) / (info.eps * scale)).max())


def _relative_l2(truth: np.ndarray, found: np.ndarray) -> float:
    size, wrong = np.linalg.norm(truth.ravel()), np.linalg.norm((found - truth).ravel())
    return float(wrong / size) if size > 0 else float(wrong)


def _ulp(truth: np.ndarray, found: np.ndarray, dtype: str) -> float:
    """Return the largest error in units in the last place of the largest entry."""
    info = _unit(dtype)
    magnitude = max(_largest(truth), info.tiny)
    return _largest(found - truth) / (info.eps * 2.0 ** np.floor(np.log2(magnitude)))
