"""Is a regulariser sound: its value, its gradient against finite differences, its laws for drawn examples.

Everything runs in float64. The gradient is compared in random directions with central differences (where no scale is
held constant), must be finite, and must not vanish for all inputs. A law must hold for every drawn example, and must
fail when the function is disturbed by one percent: else it says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from so8t_jax.regularizers.registry import Example, Law, Regularizer

TOLERANCE = 1e-5
"""Of finite differences in float64, relative to the larger of 1 and the derivative."""
STEP = 1e-6
DISTURBANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """One check: what was asked, whether it holds, and if not, why."""

    check: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All checks of one regulariser."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)

    def table(self) -> str:
        """Return a line per check."""
        lines = [
            f"{'ok ' if f.passed else 'RED'} {f.check}{': ' + f.detail if f.detail else ''}" for f in self.findings
        ]
        return "\n".join([f"{self.name}: {'sound' if self.passed else 'not sound'}", *lines])


def check(regularizer: Regularizer, *, examples: int = 50) -> Report:
    """Judge a regulariser.

    Args:
        regularizer: a registered one.
        examples: how many each law is tried on.

    Returns:
        A finding for every check; what is no value has no gradient and no laws, and is not asked further.
    """
    found: list[Finding] = []
    with jax.enable_x64(True):
        for name, body in _checks(regularizer, examples):
            found.append(_outcome(name, body))
            if name.startswith("value") and not found[-1].passed:
                break
    return Report(regularizer.name, tuple(found))


def _outcome(name: str, body: Callable[[], None]) -> Finding:
    try:
        body()
    except AssertionError as error:
        return Finding(name, False, " ".join(str(error).split())[:300])
    return Finding(name, True)


def _checks(regularizer: Regularizer, examples: int) -> Iterator[tuple[str, Callable[[], None]]]:
    for strategy in regularizer.inputs:
        example = _drawn(regularizer, strategy, 0, 0)
        yield f"value on {strategy}", partial(_sound_value, regularizer, example)
        yield f"gradient on {strategy}", partial(_sound_gradient, regularizer, example)
    yield "gradient does not vanish", partial(_gradient_somewhere, regularizer)
    for law in regularizer.laws:
        yield f"law {law.name}", partial(_holds, regularizer, law, examples)
        yield f"law {law.name} notices", partial(_notices, regularizer, law)


def _drawn(regularizer: Regularizer, strategy: str, size: int, number: int) -> Example:
    return regularizer.inputs[strategy](np.random.default_rng(number), regularizer.sizes[size])


def _called(regularizer: Regularizer) -> Callable[..., Any]:
    """Return the function with its options, compiled for each shape."""
    static = tuple(set(range(len(regularizer.looks_at))) - set(regularizer.wrt))
    return jax.jit(partial(regularizer.function, **regularizer.keywords), static_argnums=static)


def _of_arrays(regularizer: Regularizer, example: Example) -> tuple[Callable[..., Any], Callable[..., Any], list[Any]]:
    """Return the value and the sum of the monitors as functions of the arguments with a derivative, and these."""
    function = _called(regularizer)

    def found(*picked: Any) -> Any:
        full = list(example)
        for position, array in zip(regularizer.wrt, picked, strict=True):
            full[position] = array
        return function(*full)

    def monitored(*picked: Any) -> Any:
        return sum(map(jnp.real, found(*picked)[1].values()), jnp.zeros(()))

    return lambda *picked: found(*picked)[0], monitored, [jnp.asarray(example[i]) for i in regularizer.wrt]


def _sound_value(regularizer: Regularizer, example: Example) -> None:
    value, diagnostics = regularizer.function(*example, **regularizer.keywords)
    assert jnp.shape(value) == (), f"expected one number, got shape {jnp.shape(value)}"
    assert jnp.isfinite(value), f"the value is {value}"
    assert value >= 0, f"a constraint is measured from 0 upwards, got {value}"
    assert all(jnp.shape(monitor) == () for monitor in diagnostics.values()), "monitors must be numbers"
    compiled = _called(regularizer)(*example)[0]
    assert jnp.allclose(compiled, value, rtol=1e-10), f"compiled it is {compiled}, else {value}"


def _sound_gradient(regularizer: Regularizer, example: Example) -> None:
    value, monitored, arrays = _of_arrays(regularizer, example)
    for position, gradient in zip(regularizer.wrt, _gradients(value, arrays), strict=True):
        assert jnp.all(jnp.isfinite(gradient)), f"the gradient of {regularizer.looks_at[position]} is not finite"
    if regularizer.finite_differences:
        check_grads(value, arrays, order=1, modes=("rev",), atol=TOLERANCE, rtol=TOLERANCE, eps=STEP)
    leaked = _gradients(monitored, arrays)
    assert all(jnp.all(g == 0) for g in leaked), "monitors carry a gradient; hold them constant (stop_gradient)"


def _gradient_somewhere(regularizer: Regularizer) -> None:
    for strategy in regularizer.inputs:
        value, _, arrays = _of_arrays(regularizer, _drawn(regularizer, strategy, 0, 1))
        if any(jnp.any(gradient != 0) for gradient in _gradients(value, arrays)):
            return
    raise AssertionError("the gradient is zero for every input: nothing can be learned from it")


def _gradients(function: Callable[..., Any], arrays: list[Any]) -> Any:
    return jax.jit(jax.grad(function, argnums=tuple(range(len(arrays)))))(*arrays)


def _residual(law: Law, function: Callable[..., Any], example: Example) -> float:
    found = np.asarray(law.residual(function, example))
    return float(np.abs(found).max())


def _holds(regularizer: Regularizer, law: Law, examples: int) -> None:
    limit = law.budget * np.finfo(np.float64).eps
    function = _called(regularizer)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(list(regularizer.inputs)),
        st.integers(0, len(regularizer.sizes) - 1),
        st.integers(0, 2**32 - 1),
    )
    def holds(strategy: str, size: int, number: int) -> None:
        found = _residual(law, function, _drawn(regularizer, strategy, size, number))
        # written so that a residual that is NaN is a failure
        assert found <= limit, (
            f"residual {found:.3g}, allowed {limit:.3g}, on input {strategy!r}, size "
            f"{dict(regularizer.sizes[size])}, generator seed {number}"
        )

    holds()


def _notices(regularizer: Regularizer, law: Law) -> None:
    limit = law.budget * np.finfo(np.float64).eps
    noise, function = np.random.default_rng(0), _called(regularizer)

    def disturbed(*example: Any) -> Any:
        value, diagnostics = function(*example)
        return value * (1 + DISTURBANCE * noise.standard_normal()) + DISTURBANCE * noise.standard_normal(), diagnostics

    for strategy in regularizer.inputs:
        for number in range(8):
            found = _residual(law, disturbed, _drawn(regularizer, strategy, 0, number))
            if not found <= limit:
                return
    raise AssertionError(f"it still holds when the value is disturbed by {DISTURBANCE}: it says nothing")
