"""Checks of arrangement: batch rows on their own, batch axes, memory layout, unwritten memory, two halves of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import Deviation, Expected, ParityError, compare, eps_of
from parity_tests.harness.inputs import draw, to_numpy, to_torch
from parity_tests.harness.judge import Truth, judge_forward, judge_gradients, require, rows_of, truth
from parity_tests.harness.memory import poisoned
from parity_tests.harness.pair import OpPair
from parity_tests.harness.production import Layout, Run, bound, run
from parity_tests.harness.tree import flatten, map_leaves

TWO_AXES = (3, 4)
ROWS_ALONE = 4


def both_ways(expected: Truth, found: Run) -> list[Deviation]:
    """Return the deviations of outputs and gradients of one run."""
    return [*judge_forward(expected, found), *judge_gradients(expected, found)]


def run_judged(pair: OpPair, expected: Truth, **options: Any) -> Run:
    """Run production forward, and backward if the pair is differentiable here."""
    return run(pair, expected.inputs, expected.dtype, expected.cotangents if expected.gradients else None, **options)


def _generic(pair: OpPair, *, largest: bool = False, dtype: str | None = None) -> Truth:
    size = pair.sizes[-1 if largest else 0]
    return truth(pair, next(iter(pair.inputs)), size, dtype or pair.dtypes[0])


def batch(pair: OpPair) -> Iterator[Case]:
    """A row of a batch equals the row alone: within the budget, or bit for bit where that is declared."""
    if not any(axis == 0 for axis in _generic_axes(pair)):
        return
    for dtype in pair.dtypes[:2]:
        yield Case(pair, "batch", dtype, partial(_batch, pair, dtype))


def _generic_axes(pair: OpPair) -> tuple[int | None, ...]:
    return draw(pair, next(iter(pair.inputs)), pair.sizes[0], 1).axes


def _batch(pair: OpPair, dtype: str) -> None:
    whole = _generic(pair, largest=True, dtype=dtype)
    together = run_judged(pair, whole)
    deviations = both_ways(whole, together)
    for row in range(ROWS_ALONE):
        expected = rows_of(pair, whole, slice(row, row + 1))
        alone = run_judged(pair, expected)
        deviations += both_ways(expected, alone)
        deviations += list(_same_row(pair, expected, together, alone, row))
    require(deviations)


def _same_row(pair: OpPair, expected: Truth, together: Run, alone: Run, row: int) -> Iterator[Deviation]:
    couples: list[tuple[Expected, Any, Any, Any]] = [
        (e, a, b, pair.budget.forward)
        for e, a, b in zip(expected.outputs, together.outputs, alone.outputs, strict=True)
    ]
    couples += [
        (e, together.gradients[p], alone.gradients[p], pair.budget.gradient)
        for p, e in expected.gradients.items()
        if e.batched
    ]
    for e, a, b, budget in couples:
        what = f"{e.what} of row {row} in a batch and alone"
        if pair.bitwise_batch:
            problem = None if torch.equal(a[row : row + 1], b) else "not equal bit for bit"
            yield Deviation(what, e.dtype, problem=problem)
        else:
            limit = eps_of(budget, expected.dtype)
            yield compare(
                dataclasses.replace(e, what=what, truth=to_numpy(b), straightforward=None, budget=limit),
                a[row : row + 1],
            )


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 0:
        return tensor
    shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
    between = torch.nan if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full(shape, between, dtype=tensor.dtype, device=tensor.device)[..., ::2].copy_(tensor)


def _permuted(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 0:
        return tensor
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _stride_zero(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def layout(pair: OpPair) -> Iterator[Case]:
    """Strides, batch axes and empty batches change nothing."""
    kinds: dict[str, Callable[[OpPair], list[Deviation]]] = {
        "strided": partial(_relaid, layout=_strided),
        "permuted": partial(_relaid, layout=_permuted),
    }
    if pair.wrt:
        kinds["stride0"] = _ones
    if any(axis == 0 for axis in _generic_axes(pair)):
        kinds |= {"no_axis": _no_axis, "two_axes": _two_axes, "empty": _empty}
    for kind, judge in kinds.items():
        yield Case(pair, "layout", kind, partial(_layout, pair, judge))


def _layout(pair: OpPair, judge: Callable[[OpPair], list[Deviation]]) -> None:
    require(judge(pair))


def _relaid(pair: OpPair, layout: Layout) -> list[Deviation]:
    expected = _generic(pair)
    return both_ways(expected, run_judged(pair, expected, layout=layout, cotangent_layout=layout))


def _ones(pair: OpPair) -> list[Deviation]:
    expected = truth(pair, next(iter(pair.inputs)), pair.sizes[0], pair.dtypes[0], ones=True)
    return both_ways(expected, run_judged(pair, expected, cotangent_layout=_stride_zero))


def _no_axis(pair: OpPair) -> list[Deviation]:
    expected = rows_of(pair, _generic(pair), 0)
    return both_ways(expected, run_judged(pair, expected))


def _reshaped(expected: Truth, reshape: Callable[[np.ndarray], np.ndarray], shared_zero: bool = False) -> Truth:
    def of(e: Expected) -> Expected:
        if e.batched:
            return dataclasses.replace(e, truth=reshape(e.truth))
        return dataclasses.replace(e, truth=np.zeros_like(e.truth)) if shared_zero else e

    arguments = tuple(
        a if axis is None else reshape(a)
        for a, axis in zip(expected.inputs.arguments, expected.inputs.axes, strict=True)
    )
    return Truth(
        expected.dtype,
        expected.inputs.replace(arguments),
        tuple(reshape(c) for c in expected.cotangents),
        expected.structure,
        tuple(of(e) for e in expected.outputs),
        {position: of(e) for position, e in expected.gradients.items()},
    )


def _two_axes(pair: OpPair) -> list[Deviation]:
    expected = _reshaped(_generic(pair), lambda a: a.reshape(*TWO_AXES, *a.shape[1:]))
    return both_ways(expected, run_judged(pair, expected))


def _empty(pair: OpPair) -> list[Deviation]:
    expected = _reshaped(_generic(pair), lambda a: a[:0], shared_zero=True)
    return both_ways(expected, run_judged(pair, expected))


def memory(pair: OpPair) -> Iterator[Case]:
    """Nothing is read from memory that the library allocated and did not write."""
    yield Case(pair, "memory", pair.dtypes[0], partial(_memory, pair))


def _memory(pair: OpPair) -> None:
    expected = _generic(pair, largest=True)
    with poisoned(pair.production):
        found = run_judged(pair, expected)
    require(both_ways(expected, found))


def halves(pair: OpPair) -> Iterator[Case]:
    """Two halves with carried state equal one run."""
    if pair.carry is None:
        return
    for strategy in pair.inputs:
        yield Case(pair, "halves", strategy, partial(_halves, pair, strategy))


def _halves(pair: OpPair, strategy: str) -> None:
    assert pair.carry is not None
    expected = rows_of(pair, truth(pair, strategy, pair.sizes[-1], "float64"), 0)
    function = bound(pair)
    first_arguments, rest = pair.carry.split(expected.inputs.arguments)
    first = _call(function, first_arguments)
    second = _call(function, rest(map_leaves(to_numpy, first[-1])))
    joined = pair.carry.join(map_leaves(to_numpy, first), map_leaves(to_numpy, second))
    structure, leaves = flatten(map_leaves(lambda leaf: torch.from_numpy(np.asarray(leaf)), joined))
    require(judge_forward(expected, Run(structure, leaves, {})))


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    output = function(*(to_torch(a, "float64") for a in arguments))
    if not isinstance(output, tuple):
        raise ParityError(f"expected (y, state) from an op that carries state, got {type(output).__name__}")
    return output
