"""Checks of numbers: definition against oracle, production against definition, forward and backward, every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd.gradcheck import GradcheckError

from parity_tests.harness import reference
from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import Expected, ParityError, eps_of, measure
from parity_tests.harness.environment import shape_checks
from parity_tests.harness.inputs import draw, size_label, to_torch
from parity_tests.harness.judge import judge_forward, judge_gradients, require, truth
from parity_tests.harness.pair import OpPair, Size
from parity_tests.harness.production import bound, run
from parity_tests.harness.tree import flatten
from parity_tests.harness.vocabulary import declaration_problems, oracle_calls

SECOND_DERIVATIVE_BATCH = 1
FIRST_DERIVATIVE_BATCH = 2


def sweep(pair: OpPair) -> Iterator[tuple[str, Size, str]]:
    """Yield (input, size, dtype): every size in the first dtype, the largest size in every other one."""
    first, *rest = pair.dtypes
    for strategy in pair.inputs:
        for size in pair.sizes:
            yield strategy, size, first
        for dtype in rest:
            yield strategy, pair.sizes[-1], dtype


def declaration(pair: OpPair) -> Iterator[Case]:
    """Both sides take the same parameters and the declaration judges something."""

    def body() -> None:
        problems = declaration_problems(pair)
        if problems:
            raise ParityError("\n".join(problems))

    yield Case(pair, "declaration", "", body)


def oracle(pair: OpPair) -> Iterator[Case]:
    """The definition agrees with a dense computation that calls neither side."""
    if pair.oracle is None:
        return
    for strategy in pair.inputs:
        for size in pair.sizes:
            yield Case(pair, "oracle", f"{strategy}-{size_label(size)}", partial(_oracle, pair, strategy, size))


def _oracle(pair: OpPair, strategy: str, size: Size) -> None:
    assert pair.oracle is not None
    inputs = draw(pair, strategy, size, FIRST_DERIVATIVE_BATCH)
    called = oracle_calls(pair, inputs.example(0))
    if called:
        raise ParityError(f"the oracle is not independent: it calls the {' and the '.join(called)}")
    for row in range(inputs.batch):
        example = inputs.example(row)
        structure, found = flatten(reference.on_example(pair, example))
        wanted, dense = flatten(pair.oracle(*example, **pair.keywords))
        if structure != wanted:
            raise ParityError(f"expected the structure {wanted} of the oracle, got {structure}")
        require([_beside(pair, i, d, f, strategy) for i, (d, f) in enumerate(zip(dense, found, strict=True))])


def _beside(pair: OpPair, index: int, dense: Any, found: np.ndarray, strategy: str) -> Any:
    dense = np.asarray(dense)
    if dense.shape != found.shape:
        raise ParityError(f"output {index}: the oracle gives shape {dense.shape}, the definition {found.shape}")
    budget = eps_of(pair.budget.forward, "float64")
    nonfinite = strategy in pair.nonfinite
    dtype = str(dense.dtype)
    if np.issubdtype(dense.dtype, np.inexact):
        dtype = "complex128" if np.iscomplexobj(dense) else "float64"
    return measure(Expected(f"output {index}", dtype, dense, None, budget, pair.budget.floor, False, nonfinite), found)


def forward(pair: OpPair) -> Iterator[Case]:
    """Production gives what the definition gives."""
    for strategy, size, dtype in sweep(pair):
        label = f"{strategy}-{size_label(size)}-{dtype}"
        yield Case(pair, "forward", label, partial(_forward, pair, strategy, size, dtype))


def _forward(pair: OpPair, strategy: str, size: Size, dtype: str) -> None:
    expected = truth(pair, strategy, size, dtype)
    require(judge_forward(expected, run(pair, expected.inputs, dtype)))


def gradient(pair: OpPair) -> Iterator[Case]:
    """Production's gradient of every differentiable argument is that of the definition, for a drawn cotangent."""
    if not pair.wrt:
        return
    for strategy, size, dtype in sweep(pair):
        label = f"{strategy}-{size_label(size)}-{dtype}"
        yield Case(pair, "gradient", label, partial(_gradient, pair, strategy, size, dtype))


def _gradient(pair: OpPair, strategy: str, size: Size, dtype: str) -> None:
    expected = truth(pair, strategy, size, dtype)
    require(judge_gradients(expected, run(pair, expected.inputs, dtype, expected.cotangents)))


def meaningful(pair: OpPair) -> Iterator[Case]:
    """Some input makes each output, and each gradient, large enough for its budget to notice zeros."""
    for dtype in pair.dtypes:
        yield Case(pair, "meaningful", dtype, partial(_meaningful, pair, dtype))


def _meaningful(pair: OpPair, dtype: str) -> None:
    noticed: dict[str, bool] = {}
    for strategy in pair.inputs:
        situation = truth(pair, strategy, pair.sizes[-1], dtype)
        for expected in (*situation.outputs, *situation.gradients.values()):
            if not np.issubdtype(expected.truth.dtype, np.inexact):
                continue
            zeros = measure(expected, np.where(np.isfinite(expected.truth), 0.0, expected.truth))
            noticed[expected.what] = noticed.get(expected.what, False) or not zeros.green
    blind = [what for what, seen in noticed.items() if not seen]
    if blind:
        raise ParityError(f"zeros would pass on every input for: {', '.join(blind)}")


def gradcheck(pair: OpPair) -> Iterator[Case]:
    """Production's derivative (and second derivative) agrees with finite differences at the smallest size."""
    if not pair.wrt or not pair.finite_differences:
        return
    yield Case(pair, "gradcheck", "first", partial(_finite_differences, pair, torch.autograd.gradcheck))
    if pair.twice:
        yield Case(pair, "gradcheck", "second", partial(_finite_differences, pair, torch.autograd.gradgradcheck))


def _finite_differences(pair: OpPair, check: Any) -> None:
    batch = FIRST_DERIVATIVE_BATCH if check is torch.autograd.gradcheck else SECOND_DERIVATIVE_BATCH
    inputs = draw(pair, next(iter(pair.inputs)), pair.sizes[0], batch)
    arguments = [to_torch(a, "float64") for a in inputs.arguments]
    wrt = reference.present(pair, inputs)
    function = bound(pair)

    def of_chosen(*chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        full = list(arguments)
        for position, value in zip(wrt, chosen, strict=True):
            full[position] = value
        leaves = flatten(function(*full))[1]
        return tuple(leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex())

    chosen = tuple(arguments[position].requires_grad_() for position in wrt)
    _differentiated(of_chosen, chosen, 2 if pair.twice else 1)
    try:
        # thousands of calls with the shapes of the one above, which the checks of shapes have seen
        with shape_checks(enabled=False):
            check(of_chosen, chosen)
    except GradcheckError as error:
        raise ParityError(str(error)) from error


def _differentiated(function: Any, arguments: tuple[torch.Tensor, ...], times: int) -> None:
    """Run forward, backward, and for two times backward through the backward pass, where there is one."""
    outputs: Any = function(*arguments)
    for _ in range(times):
        outputs = [x for x in outputs if x is not None and x.requires_grad]
        if outputs:
            ones = [torch.ones_like(x) for x in outputs]
            outputs = torch.autograd.grad(outputs, arguments, ones, create_graph=True, allow_unused=True)


def edges(pair: OpPair) -> Iterator[Case]:
    """Degenerate sizes give the right values and gradients, which may be all zero."""
    for size in pair.edge_sizes:
        for strategy in pair.inputs:
            label = f"{strategy}-{size_label(size)}-float64"
            yield Case(pair, "edges", label, partial(_edge, pair, strategy, size))


def _edge(pair: OpPair, strategy: str, size: Size) -> None:
    expected = truth(pair, strategy, size, "float64")
    if not expected.gradients:
        require(judge_forward(expected, run(pair, expected.inputs, "float64")))
        return
    found = run(pair, expected.inputs, "float64", expected.cotangents)
    require([*judge_forward(expected, found), *judge_gradients(expected, found)])
