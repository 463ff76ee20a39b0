"""One situation judged: a pair at one input strategy, size and dtype, forward and backward, by any call path."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.harness import reference
from parity_tests.harness.comparison import Deviation, Expected, ParityError, allowed, compare, eps_of
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
    """Return the judged situation; computed once per process.

    Args:
        pair: the declaration.
        strategy: name of an input strategy.
        size: size of one example.
        dtype: dtype under test.
        batch: number of examples.
        ones: take a cotangent of ones instead of a drawn one.
    """
    return _truth(pair, strategy, tuple(size.items()), dtype, batch, ones)


@functools.cache
def _truth(pair: OpPair, strategy: str, size: tuple[tuple[str, int], ...], dtype: str, batch: int, ones: bool) -> Truth:
    inputs = rounded(pair, draw(pair, strategy, dict(size), batch), dtype)
    words = (pair.name, strategy, size_label(dict(size)), dtype)
    return truth_of(pair, inputs, dtype, words, ones=ones, nonfinite=strategy in pair.nonfinite)


def truth_of(
    pair: OpPair, inputs: Inputs, dtype: str, words: tuple[object, ...], *, ones: bool = False, nonfinite: bool = False
) -> Truth:
    """Return the judged situation of given inputs (already rounded to ``dtype``)."""
    structure, leaves = flatten(reference.values(pair, inputs))
    result = result_dtype(pair, dtype)
    cotangents = tuple(
        np.ones(leaf.shape, leaf.dtype)
        if ones
        else draw_cotangent(leaf.shape, np.iscomplexobj(leaf), result, *words, index)
        for index, leaf in enumerate(leaves)
        if np.issubdtype(leaf.dtype, np.inexact)
    )
    plain = [None] * len(leaves)
    if result != "float64":
        plain = [round_to(_wide(x), result) for x in flatten(reference.values(pair, inputs, "float32"))[1]]
    outputs = tuple(
        Expected(
            what=f"output {index}",
            dtype=_leaf_dtype(leaf, result),
            truth=leaf,
            straightforward=low,
            budget=eps_of(pair.budget.forward, dtype),
            floor=pair.budget.floor,
            batched=any(axis == 0 for axis in inputs.axes),
            nonfinite=nonfinite,
        )
        for index, (leaf, low) in enumerate(zip(leaves, plain, strict=True))
    )
    gradients = _gradients(pair, inputs, dtype, cotangents, nonfinite)
    return Truth(dtype, inputs, cotangents, structure, outputs, gradients)


def _gradients(
    pair: OpPair, inputs: Inputs, dtype: str, cotangents: tuple[np.ndarray, ...], nonfinite: bool
) -> dict[int, Expected]:
    if not reference.present(pair, inputs):
        return {}
    exact = reference.gradients(pair, inputs, cotangents)
    plain = {} if dtype == "float64" else reference.gradients(pair, inputs, cotangents, "float32")
    found = {}
    for position, gradient in exact.items():
        own = dtype_at(pair, position, dtype)
        found[position] = Expected(
            what=f"gradient of argument {position}",
            dtype=_leaf_dtype(gradient, own),
            truth=gradient,
            straightforward=round_to(_wide(plain[position]), own) if plain else None,
            budget=eps_of(pair.budget.gradient, dtype),
            floor=pair.budget.gradient_floor,
            batched=inputs.axes[position] == 0,
            nonfinite=nonfinite,
        )
    return found


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


def row_of(pair: OpPair, whole: Truth, row: int, *, keep_axis: bool) -> Truth:
    """Return what one example of a batch must give on its own, without compiling the definition again.

    The gradient of a shared argument is that of the row alone: the cotangents of the other rows are set to zero. The
    limit is that of the whole batch, since one row alone may be rounded luckily by the straightforward computation.

    Args:
        pair: the declaration.
        whole: the judged batch.
        row: which example.
        keep_axis: keep a batch axis of length one instead of dropping it.
    """
    pick = slice(row, row + 1) if keep_axis else row

    def cut(expected: Expected) -> Expected:
        own = dataclasses.replace(expected, budget=allowed(expected), straightforward=None)
        return dataclasses.replace(own, truth=own.truth[pick], batched=keep_axis) if own.batched else own

    alone = tuple(_only(row, c) for c in whole.cotangents)
    exact = reference.gradients(pair, whole.inputs, alone) if whole.gradients else {}
    gradients = {
        position: cut(e if e.batched else dataclasses.replace(e, truth=exact[position]))
        for position, e in whole.gradients.items()
    }
    arguments = tuple(
        a if axis is None else a[pick] for a, axis in zip(whole.inputs.arguments, whole.inputs.axes, strict=True)
    )
    return Truth(
        whole.dtype,
        whole.inputs.replace(arguments, batch=1),
        tuple(c[pick] for c in whole.cotangents),
        whole.structure,
        tuple(cut(e) for e in whole.outputs),
        gradients,
    )


def _only(row: int, cotangent: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(cotangent)
    kept[row] = cotangent[row]
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
