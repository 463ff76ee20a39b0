"""Laws under hypothesis on both sides, and the bad calls that production must reject."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.harness import reference
from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import ParityError
from parity_tests.harness.inputs import seed
from parity_tests.harness.pair import Law, OpPair, Rejection
from parity_tests.harness.production import bound, through_numpy
from parity_tests.harness.tree import map_leaves

DISTURBANCE = 0.01
DISTURBED_DRAWS = 8


def laws(pair: OpPair) -> Iterator[Case]:
    """Every identity holds on both sides for drawn examples, and notices when the function is disturbed."""
    sides = {"reference": partial(reference.on_example, pair), "production": partial(through_numpy, pair)}
    for law in pair.laws:
        for side, function in sides.items():
            body = partial(_holds, pair, law, _spread(function))
            yield Case(pair, "law", f"{law.name}-{side}", body)
        body = partial(_notices, pair, law, _spread(sides["reference"]))
        yield Case(pair, "law", f"{law.name}-notices", body)


def _spread(function: Callable[[tuple[Any, ...]], Any]) -> Callable[..., Any]:
    return lambda *arguments: function(tuple(_plain(a) for a in arguments))


def _plain(argument: Any) -> Any:
    return np.asarray(argument) if hasattr(argument, "__array__") else argument


def _residual(pair: OpPair, law: Law, function: Callable[..., Any], strategy: str, size: int, number: int) -> float:
    example = pair.inputs[strategy](np.random.default_rng(number), pair.sizes[size])
    residual = np.asarray(law.residual(function, example))
    if residual.size == 0 or residual.dtype == bool:
        raise ParityError(f"expected a non-empty array of numbers from law {law.name}, got {residual!r}")
    return float(np.abs(residual).max())


def _holds(pair: OpPair, law: Law, function: Callable[..., Any]) -> None:
    limit = law.budget * np.finfo(np.float64).eps

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(list(pair.inputs)), st.integers(0, len(pair.sizes) - 1), st.integers(0, 2**32 - 1))
    def holds(strategy: str, size: int, number: int) -> None:
        found = _residual(pair, law, function, strategy, size, number)
        # written so that a residual that is NaN is a failure
        if not found <= limit:
            raise ParityError(
                f"{law.name}: residual {found:.3g}, allowed {limit:.3g} ({law.budget:g} eps) "
                f"on input {strategy!r}, size {dict(pair.sizes[size])}, generator seed {number}"
            )

    holds()


def _notices(pair: OpPair, law: Law, function: Callable[..., Any]) -> None:
    limit = law.budget * np.finfo(np.float64).eps
    noise = seed("disturbed", pair.name, law.name)

    def disturbed(*arguments: Any) -> Any:
        return map_leaves(lambda leaf: _disturb(leaf, noise), function(*arguments))

    for strategy in pair.inputs:
        for number in range(DISTURBED_DRAWS):
            try:
                found = _residual(pair, law, disturbed, strategy, number % len(pair.sizes), number)
            except (ValueError, ArithmeticError):
                return
            if not found <= limit:
                return
    raise ParityError(f"{law.name} still holds when every output is disturbed by {DISTURBANCE}: it says nothing")


def _disturb(leaf: Any, noise: np.random.Generator) -> np.ndarray:
    values = np.asarray(leaf)
    if not np.issubdtype(values.dtype, np.inexact) or values.size == 0:
        return values
    size = float(np.abs(values[np.isfinite(values)]).max(initial=1.0))
    return values + DISTURBANCE * size * noise.standard_normal(values.shape)


def rejections(pair: OpPair) -> Iterator[Case]:
    """A bad call raises the declared error with the declared text."""
    for rejection in pair.rejections:
        yield Case(pair, "rejection", rejection.name, partial(_rejects, pair, rejection), shapes_checked=False)


def _rejects(pair: OpPair, rejection: Rejection) -> None:
    function = bound(pair)
    try:
        if rejection.keywords:
            pair.production(*rejection.arguments(), **{**pair.keywords, **rejection.keywords})
        else:
            function(*rejection.arguments())
    except rejection.error as error:
        if not re.search(rejection.match, str(error)):
            raise ParityError(f"expected a text matching {rejection.match!r}, got {error}") from error
        return
    raise ParityError(f"expected {rejection.error.__name__}, the call was accepted")
