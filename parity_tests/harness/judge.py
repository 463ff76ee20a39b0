"""One situation judged: a pair at one input strategy, size and dtype, forward and backward, by any call path."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.harness import reference
from parity_tests.harness.comparison import Deviation, Expected, ParityError, compare, eps_of, error_in_eps
from parity_tests.harness.inputs import (
    BATCH,
    COMPLEX_OF,
    Inputs,
    draw,
    draw_cotangent,
    dtype_at,
    result_dtype,
    round_to,
    rounded,
    size_label,
)
from parity_tests.harness.pair import OpPair, Size
from parity_tests.harness.production import Run
from parity_tests.harness.tree import flatten


@dataclass(frozen=True, eq=False)
class Truth:
    """What production must give in one situation, and the inputs and cotangents that lead there."""

    dtype: str
    inputs: Inputs
    cotangents: tuple[np.ndarray, ...]
    structure: str
    outputs: tuple[Expected, ...]
    gradients: Mapping[int, Expected]


def truth(pair: OpPair, strategy: str, size: Size, dtype: str, *, batch: int = BATCH, ones: bool = False) -> Truth:
    """Return the judged situation; computed once per process, and kept.

    Args:
        pair: the declaration.
        strategy: name of an input strategy.
        size: size of one example.
        dtype: dtype under test.
        batch: number of examples.
        ones: take a cotangent of ones instead of a drawn one.
    """
    return _truth(pair, strategy, tuple(size.items()), dtype, batch, ones)


def another_truth(pair: OpPair, strategy: str, size: Size, dtype: str, number: int) -> Truth:
    """Return a situation of other drawn examples, which is not kept.

    Args:
        pair: the declaration.
        strategy: name of an input strategy.
        size: size of one example.
        dtype: dtype under test.
        number: of the situation; 0 is the one that ``truth`` returns.
    """
    return _truth.__wrapped__(
        pair, strategy, tuple(size.items()), dtype, BATCH, False, number * pair.budget.bar_batches
    )


@functools.cache
def _truth(
    pair: OpPair,
    strategy: str,
    size: tuple[tuple[str, int], ...],
    dtype: str,
    batch: int,
    ones: bool,
    start: int = 0,
) -> Truth:
    words = (pair.name, strategy, size_label(dict(size)), dtype)

    def situation(number: int) -> _Situation:
        inputs = rounded(pair, draw(pair, strategy, dict(size), batch, number * batch), dtype)
        structure, leaves = flatten(reference.values(pair, inputs))
        return _Situation(inputs, structure, leaves, _cotangents(pair, leaves, dtype, (*words, number), ones))

    judged = situation(start)
    below = dtype != "float64"
    others = [situation(start + further) for further in range(1, pair.budget.bar_batches)] if below else []
    nonfinite = strategy in pair.nonfinite
    batched = any(axis == 0 for axis in judged.inputs.axes)
    outputs = _outputs(pair, [judged, *others], dtype, batched, nonfinite)
    gradients = _gradients(pair, [judged, *others], dtype, nonfinite)
    return Truth(dtype, judged.inputs, judged.cotangents, judged.structure, outputs, gradients)


@dataclass(frozen=True, eq=False)
class _Situation:
    inputs: Inputs
    structure: str
    leaves: list[np.ndarray]
    cotangents: tuple[np.ndarray, ...]


def _cotangents(
    pair: OpPair, leaves: list[np.ndarray], dtype: str, words: tuple[object, ...], ones: bool
) -> tuple[np.ndarray, ...]:
    result = result_dtype(pair, dtype)
    return tuple(
        np.ones(leaf.shape, leaf.dtype)
        if ones
        else draw_cotangent(leaf.shape, np.iscomplexobj(leaf), result, *words, index)
        for index, leaf in enumerate(leaves)
        if np.issubdtype(leaf.dtype, np.inexact)
    )


def _outputs(
    pair: OpPair, situations: list[_Situation], dtype: str, batched: bool, nonfinite: bool
) -> tuple[Expected, ...]:
    result = result_dtype(pair, dtype)
    judged = situations[0]
    expected = [
        Expected(
            what=f"output {index}",
            dtype=_leaf_dtype(leaf, result),
            truth=leaf,
            straightforward=None,
            budget=eps_of(pair.budget.forward, dtype),
            floor=pair.budget.floor,
            batched=batched,
            nonfinite=nonfinite,
            bar=pair.budget.bar,
        )
        for index, leaf in enumerate(judged.leaves)
    ]
    if result == "float64":
        return tuple(expected)
    plain = [flatten(reference.values(pair, s.inputs, "float32"))[1] for s in situations]
    return tuple(
        _barred(e, result, [(s.leaves[i], low[i]) for s, low in zip(situations, plain, strict=True)])
        for i, e in enumerate(expected)
    )


def _gradients(pair: OpPair, situations: list[_Situation], dtype: str, nonfinite: bool) -> dict[int, Expected]:
    judged = situations[0]
    if not reference.present(pair, judged.inputs):
        return {}
    exact = [reference.gradients(pair, s.inputs, s.cotangents) for s in situations]
    plain = []
    if dtype != "float64":
        plain = [reference.gradients(pair, s.inputs, s.cotangents, "float32") for s in situations]
    found = {}
    for position, gradient in exact[0].items():
        own = dtype_at(pair, position, dtype)
        e = Expected(
            what=f"gradient of argument {position}",
            dtype=_leaf_dtype(gradient, own),
            truth=gradient,
            straightforward=None,
            budget=eps_of(pair.budget.gradient, dtype),
            floor=pair.budget.gradient_floor,
            batched=judged.inputs.axes[position] == 0,
            nonfinite=nonfinite,
            bar=pair.budget.bar,
        )
        couples = [(g[position], low[position]) for g, low in zip(exact, plain, strict=False)] if plain else []
        found[position] = _barred(e, own, couples)
    return found


def _barred(expected: Expected, dtype: str, couples: list[tuple[np.ndarray, np.ndarray]]) -> Expected:
    """Set the second bar from (truth, the same in float32) of several batches."""
    if not couples or not np.issubdtype(expected.truth.dtype, np.inexact):
        return expected
    errors = (
        error_in_eps(expected.dtype, exact, round_to(_wide(low), dtype), floor=expected.floor, batched=expected.batched)
        for exact, low in couples
    )
    return dataclasses.replace(expected, straightforward=max(errors))


def _wide(leaf: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(leaf):
        return leaf.astype(np.complex128)
    return leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.inexact) else leaf


def _leaf_dtype(leaf: np.ndarray, floating: str) -> str:
    if np.iscomplexobj(leaf):
        return COMPLEX_OF[floating]
    return floating if np.issubdtype(leaf.dtype, np.inexact) else str(leaf.dtype)


def judge_forward(expected: Truth, run: Run) -> list[Deviation]:
    """Compare the outputs of a run; a different structure or number of outputs is one deviation that says so."""
    if run.structure != expected.structure:
        problem = f"expected the structure {expected.structure}, got {run.structure}"
        return [Deviation("outputs", "", problem=problem)]
    return [compare(e, leaf) for e, leaf in zip(expected.outputs, run.outputs, strict=True)]


def judge_gradients(expected: Truth, run: Run) -> list[Deviation]:
    """Compare the gradients of a run; one that is missing, or all zero where the truth is not, says so."""
    return [_judge_gradient(e, run.gradients.get(position)) for position, e in expected.gradients.items()]


def _judge_gradient(expected: Expected, gradient: Any) -> Deviation:
    if gradient is None:
        return Deviation(expected.what, expected.dtype, problem="expected a gradient, got None: it is detached")
    if expected.truth.any() and gradient.numel() and not gradient.any():
        return Deviation(expected.what, expected.dtype, problem="the gradient is zero everywhere and should not be")
    return compare(expected, gradient)


def rows_of(pair: OpPair, whole: Truth, pick: int | slice) -> Truth:
    """Return what some examples of a batch must give on their own.

    The gradient of a shared argument is that of these rows alone. It is found without compiling the definition for
    another batch, by setting the cotangents of the other rows to zero, unless zero times an infinity would be NaN.

    Args:
        pair: the declaration.
        whole: the judged batch.
        pick: which examples; a number drops the batch axis, a slice keeps it.
    """
    keep_axis = isinstance(pick, slice)
    inputs, cotangents = _cut_inputs(whole.inputs, pick), tuple(c[pick] for c in whole.cotangents)

    def cut(e: Expected) -> Expected:
        return dataclasses.replace(e, truth=e.truth[pick], batched=keep_axis) if e.batched else e

    exact: Mapping[int, np.ndarray] = {}
    if any(not e.batched for e in whole.gradients.values()):
        finite = all(e.truth.size == 0 or np.isfinite(e.truth).all() for e in whole.gradients.values())
        judged = (whole.inputs, tuple(_only(pick, c) for c in whole.cotangents)) if finite else (inputs, cotangents)
        exact = reference.gradients(pair, *judged)
    gradients = {
        position: cut(e) if e.batched else dataclasses.replace(e, truth=exact[position])
        for position, e in whole.gradients.items()
    }
    return Truth(whole.dtype, inputs, cotangents, whole.structure, tuple(cut(e) for e in whole.outputs), gradients)


def _cut_inputs(inputs: Inputs, pick: int | slice) -> Inputs:
    arguments = tuple(a if axis is None else a[pick] for a, axis in zip(inputs.arguments, inputs.axes, strict=True))
    axes = inputs.axes if isinstance(pick, slice) else (None,) * len(inputs.axes)
    return dataclasses.replace(inputs, arguments=arguments, axes=axes)


def _only(pick: int | slice, cotangent: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(cotangent)
    kept[pick] = cotangent[pick]
    return kept


def require(deviations: list[Deviation]) -> None:
    """Raise unless every deviation is green and no budget is so wide that zeros would pass.

    Args:
        deviations: what was measured; an empty list judges nothing and is an error.

    Raises:
        ParityError: one line for each red deviation.
    """
    if not deviations:
        raise ParityError("nothing was compared")
    red = [str(d) for d in deviations if not d.green]
    red += [
        f"{d.what} ({d.dtype}): an output of zeros would pass (error {d.zeros:.3g} eps, allowed {d.allowed:.3g})"
        for d in deviations
        if d.vacuous
    ]
    if red:
        raise ParityError("\n".join(red))
