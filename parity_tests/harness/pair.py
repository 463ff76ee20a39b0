"""The record from which all parity tests are generated: one per public function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Size = Mapping[str, int]
Example = tuple[Any, ...]
"""Positional arguments of ONE example: float64 numpy arrays, or ``None`` / Python scalars where the op takes them."""
Strategy = Callable[[np.random.Generator, Size], Example]


@dataclass(frozen=True)
class Budget:
    """Accepted error in units of eps(dtype), norm-wise against float64: max|x − x̂| / max(1, max|x|)-scaled.

    ``float64`` etc. are filled from ``forward`` and ``gradient`` alike for every dtype the pair names.
    """

    forward: float
    gradient: float = 0.0


@dataclass(frozen=True)
class Law:
    """An identity that both sides must satisfy, e.g. RᵀR = I.

    ``residual(f, example)`` gets the function (reference, or production seen through numpy) and one example in
    float64, and returns an array that is zero where the law holds; ``budget`` is in eps of float64.
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
    first run returned; ``join(first_output, second_output)`` rebuilds the whole output.
    """

    split: Callable[[Example], tuple[Example, Callable[[Any], Example]]]
    join: Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class OpPair:
    """One public function: its definition, its production, and how they are judged.

    Attributes:
        name: ``"room.function"``.
        reference: ``so8t_jax`` function on ONE example.
        production: ``so8t_torch`` function; takes leading batch axes on every argument not in ``shared``.
        inputs: named input strategies; each maps (generator, size) to the positional arguments of ONE example.
        sizes: smallest first; ``gradcheck`` runs on the first.
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
        known_gaps: check name → reason; strict xfail.
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
    known_gaps: Mapping[str, str] = field(default_factory=dict)
