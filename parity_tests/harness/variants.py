"""The same numbers by other roads: plain reference, torch.compile, checkpointing, Triton interpreted or on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute

from parity_tests.harness import reference
from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import Deviation, Expected, eps_of, measure
from parity_tests.harness.inputs import draw, size_label
from parity_tests.harness.judge import Truth, require, rows_of, truth
from parity_tests.harness.layout import both_ways, run_judged
from parity_tests.harness.memory import poisoned
from parity_tests.harness.pair import OpPair, Size
from parity_tests.harness.production import Run, bound
from parity_tests.harness.tree import flatten

PLAIN_ROWS = 2
INTERPRETED_ROWS = 2


def plain_reference(pair: OpPair) -> Iterator[Case]:
    """The definition compiled over a batch equals the definition run plainly on one example."""
    yield Case(pair, "variant", "plain_reference", partial(_plain_reference, pair))


def _plain_reference(pair: OpPair) -> None:
    inputs = draw(pair, next(iter(pair.inputs)), pair.sizes[0], PLAIN_ROWS)
    structure, batched = flatten(reference.values(pair, inputs))
    shared = all(axis is None for axis in inputs.axes)
    deviations = []
    for row in range(inputs.batch):
        example = inputs.example(row)
        alone = reference.values(pair, type(inputs)(example, (None,) * len(example), 1), jit=False)
        found, leaves = flatten(alone)
        if found != structure:
            deviations.append(Deviation("outputs", "", problem=f"expected the structure {structure}, got {found}"))
            continue
        budget = eps_of(pair.budget.forward, "float64")
        deviations += [
            measure(
                Expected(f"output {i}", _name(leaf), leaf, None, budget, pair.budget.floor, False),
                whole if shared else whole[row],
            )
            for i, (leaf, whole) in enumerate(zip(leaves, batched, strict=True))
        ]
    require(deviations)


def _name(leaf: Any) -> str:
    return str(leaf.dtype)


def compiled(pair: OpPair) -> Iterator[Case]:
    """One graph without breaks under ``torch.compile``, forward and backward."""
    dtype = _usual_dtype(pair)
    label = f"compile-{size_label(pair.sizes[0])}-{dtype}"
    yield Case(pair, "variant", label, partial(_compiled, pair, dtype), shapes_checked=False)


def _compiled(pair: OpPair, dtype: str) -> None:
    expected = truth(pair, next(iter(pair.inputs)), pair.sizes[0], dtype)
    torch.compiler.reset()
    function = torch.compile(bound(pair), fullgraph=True, dynamic=False, backend="aot_eager")
    require(both_ways(expected, run_judged(pair, expected, function=function)))


def checkpointed(pair: OpPair) -> Iterator[Case]:
    """Inside non-reentrant checkpointing values and gradients are those outside, bit for bit."""
    if pair.wrt:
        dtype = _usual_dtype(pair)
        label = f"checkpoint-{size_label(pair.sizes[0])}-{dtype}"
        yield Case(pair, "variant", label, partial(_checkpointed, pair, dtype))


def _checkpointed(pair: OpPair, dtype: str) -> None:
    expected = truth(pair, next(iter(pair.inputs)), pair.sizes[0], dtype)
    function = bound(pair)

    def inside(*arguments: Any) -> Any:
        return recompute(function, *arguments, use_reentrant=False)

    outside, found = run_judged(pair, expected), run_judged(pair, expected, function=inside)
    require([*both_ways(expected, found), *_bitwise(expected, outside, found)])


def _bitwise(expected: Truth, left: Run, right: Run) -> Iterator[Deviation]:
    for e, a, b in zip(expected.outputs, left.outputs, right.outputs, strict=True):
        yield Deviation(e.what, e.dtype, problem=None if torch.equal(a, b) else "differs bitwise when recomputed")
    for position, e in expected.gradients.items():
        a, b = left.gradients[position], right.gradients[position]
        same = a is not None and b is not None and torch.equal(a, b)
        yield Deviation(e.what, e.dtype, problem=None if same else "differs bitwise when recomputed")


def backends(pair: OpPair) -> Iterator[Case]:
    """Every named backend gives the numbers of the definition: Triton interpreted on the CPU, and on CUDA."""
    named = tuple(dict.fromkeys(("eager", *pair.backends))) if pair.backends else ()
    for backend in named:
        interpreted = backend == "triton"
        dtypes = pair.backend_dtypes.get(backend, pair.dtypes)
        for strategy, size, dtype in _crossed(pair, dtypes) if interpreted else _wide(pair, dtypes):
            label = f"{backend}-{strategy}-{size_label(size)}-{dtype}"
            body = partial(_backend, pair, backend, strategy, size, dtype, "cpu")
            yield Case(pair, "interpreter" if interpreted else "backend", label, body, interpreted=interpreted)
        for strategy, size, dtype in _wide(pair, dtypes):
            label = f"{backend}-{strategy}-{size_label(size)}-{dtype}"
            body = partial(_backend, pair, backend, strategy, size, dtype, "cuda")
            yield Case(pair, "cuda", label, body, cuda=True)


def _wide(pair: OpPair, dtypes: tuple[str, ...]) -> Iterator[tuple[str, Size, str]]:
    """Yield every dtype at every size on the generic input, and every other input at the smallest size."""
    generic, *others = pair.inputs
    for dtype in dtypes:
        yield from ((generic, size, dtype) for size in pair.sizes)
        yield from ((strategy, pair.sizes[0], dtype) for strategy in others)


def _crossed(pair: OpPair, dtypes: tuple[str, ...]) -> Iterator[tuple[str, Size, str]]:
    """Yield every dtype, every other size and every other input once: an interpreted case takes seconds."""
    generic, *others = pair.inputs
    dtype = "float32" if "float32" in dtypes else dtypes[0]
    yield from ((generic, pair.sizes[0], each) for each in dtypes)
    yield from ((generic, size, dtype) for size in pair.sizes[1:])
    yield from ((strategy, pair.sizes[0], dtype) for strategy in others)


def _usual_dtype(pair: OpPair) -> str:
    return "float32" if "float32" in pair.dtypes else pair.dtypes[0]


def _backend(pair: OpPair, backend: str, strategy: str, size: Size, dtype: str, device: str) -> None:
    expected = truth(pair, strategy, size, dtype)
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and any(axis == 0 for axis in expected.inputs.axes):
        expected = rows_of(pair, expected, slice(0, INTERPRETED_ROWS))
    # the interpreter computes masked lanes too, with whatever numpy has to say about them
    with (
        np.errstate(all="ignore" if interpreted else "warn"),
        poisoned(pair.production),
    ):
        found = run_judged(pair, expected, function=bound(pair, backend), device=device)
    require(both_ways(expected, found))
