"""The record from which all parity tests are generated: one per public function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Size = Mapping[str, int]
Example = tuple[Any, ...]
"""Positional arguments of ONE example: float64 numpy arrays, or ``None`` / Python scalars where the op takes them."""
Strategy = Callable[[np.random.Generator, Size], Example]
Eps = float | Mapping[str, float]
"""Units of eps(dtype): one number for every dtype, or one per dtype name."""


@dataclass(frozen=True)
class Budget:
    """Accepted error in units of eps(dtype of the result), norm-wise against float64.

    The error of one output of one example is ``max|x̂ − x| / (eps · max(max|x|, floor))``: relative to the largest
    entry, so that an output of zeros is wrong by 1/eps and a budget that accepts it is refused. ``floor`` is for
    results that cancel (a residual, a bracket of commuting elements): the size of the terms that cancelled.
    Below float64 a second bar holds whatever the budget says: ``bar`` times the error of the definition evaluated in
    float32 and rounded once, or 1 eps if that is larger.

    Attributes:
        forward: accepted error of the outputs.
        gradient: accepted error of every gradient.
        floor: natural size of the outputs where they cancel, in their own unit.
        gradient_floor: the same for the gradients.
        bar: factor of the second bar: 2 for an operation; more for a layer, which is many of them.
        bar_batches: batches over which the error in float32 is taken, the worst counts; only the first judges
            production. More where errors differ by the example and there are many gradients to compare.
    """

    forward: Eps
    gradient: Eps = 0.0
    floor: float = 0.0
    gradient_floor: float = 0.0
    bar: float = 2.0
    bar_batches: int = 5


@dataclass(frozen=True)
class Law:
    """An identity that both sides must satisfy, e.g. RᵀR = I.

    ``residual(f, example)`` gets the function (reference, or production seen through numpy) and one example in
    float64, and returns an array that is zero where the law holds; ``budget`` is in eps of float64, absolute, so
    the residual divides by the size of what it compares. A law that still holds when ``f`` is disturbed by one
    percent says nothing about ``f`` and is refused.
    """

    name: str
    residual: Callable[[Callable[..., Any], Example], Any]
    budget: float


@dataclass(frozen=True)
class Rejection:
    """A call that must raise ``error`` with a text matching ``match`` on the production side."""

    name: str
    arguments: Callable[[], tuple[Any, ...]]
    error: type[Exception]
    match: str
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Carry:
    """How a stateful op is cut in two: the halves with carried state must equal one run.

    ``split(example)`` returns (first, second_given_state) where the second is a function of the state that the
    first run returned (the last element of its output ``(y, state)``); ``join(first_output, second_output)``
    rebuilds the whole output.
    """

    split: Callable[[Example], tuple[Example, Callable[[Any], Example]]]
    join: Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpPair:
    """One public function: its definition, its production, and how they are judged.

    Attributes:
        name: ``"room.function"``; a second declaration of one function (other keywords) adds ``":suffix"``.
        reference: ``so8t_jax`` function on ONE example.
        production: ``so8t_torch`` function; takes leading batch axes on every argument not in ``shared``.
        inputs: named input strategies, the generic one first (the finite-difference checks run on it); each maps
            (generator, size) to the positional arguments of ONE example.
        sizes: smallest first; ``gradcheck`` runs on the first, the dtype sweep on the last.
        oracle: dense numpy/scipy/mpmath float64 function on ONE example, independent of both sides.
        shared: positions of arguments without a batch axis (``in_axes=None`` under ``jax.vmap``).
        wrt: positions of differentiable arguments.
        keywords: fixed keyword arguments given to reference, production and oracle.
        dtypes: names of the floating dtypes the production op accepts.
        budget: accepted error in eps.
        laws: identities checked on both sides over hypothesis-drawn seeds.
        rejections: bad calls and the errors they must raise.
        carry: how to cut a stateful op in two, or ``None``.
        backends: production backends besides ``eager`` (for example ``("triton",)``) reached by ``backend=``.
        backend_dtypes: backend → the dtypes that it takes, where they are fewer than ``dtypes``.
        known_gaps: check name (or the start of a case's name after the pair) → reason; strict xfail.
        masters: positions of arguments that stay float32 when the sweep is at a half dtype.
        returns: dtype of the floating results: that of the ``input``, its ``accumulation`` dtype (float32, or
            float64 for float64), or always ``float64``.
        nonfinite: strategies whose results are meant to hold NaN or infinities, in the same places on both sides.
        edge_sizes: degenerate sizes (a length of one, shorter than a stencil) at which values and gradients,
            possibly all zero, are compared in float64.
        finite_differences: whether the gradient is the derivative of the values; ``False`` where the definition stops
            a gradient or passes one straight through, so that ``gradcheck`` has no meaning.
        twice: whether the second derivative exists and is checked (``gradgradcheck``).
        bitwise_batch: whether a row of a batch must equal the row alone bit for bit, not only within the budget.
    """

    name: str
    reference: Callable[..., Any]
    production: Callable[..., Any]
    inputs: Mapping[str, Strategy]
    sizes: tuple[Size, ...]
    budget: Budget
    oracle: Callable[..., Any] | None = None
    shared: tuple[int, ...] = ()
    wrt: tuple[int, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    laws: tuple[Law, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    carry: Carry | None = None
    backends: tuple[str, ...] = ()
    backend_dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known_gaps: Mapping[str, str] = field(default_factory=dict)
    masters: tuple[int, ...] = ()
    returns: Literal["input", "accumulation", "float64"] = "input"
    nonfinite: tuple[str, ...] = ()
    edge_sizes: tuple[Size, ...] = ()
    finite_differences: bool = True
    twice: bool = True
    bitwise_batch: bool = False
