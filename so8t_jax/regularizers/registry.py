"""The table of regularisers: a pure function each, with the inputs and the laws by which it is judged.

    trajectory   states (l+1, s, d): the residual stream before and after every layer
    maps         layer, x, u, w (b, n, d): one layer as a map of whole rows, its input, and two probes
    rates        decay (s, h): decay per token of the heads of a memory
    memories     memory_states (t+1, k, v), keys (t, k), values (t, v), retention, eta (t,): one head
    chains       green, left, right, width (n,), upper, lower (n-1,): the resolvent along a row

A regulariser takes arrays of one kind, by these names, and options that are keyword-only; it returns (value,
diagnostics): a value c ≥ 0 without unit, and monitors without gradient. Training of production knows the same names.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS: dict[str, tuple[str, ...]] = {
    "trajectory": ("states",),
    "maps": ("layer", "x", "u", "w"),
    "rates": ("decay",),
    "memories": ("memory_states", "keys", "values", "retention", "eta"),
    "chains": ("green", "left", "right", "upper", "lower", "width"),
}
"""Kind → the names that it offers."""

SIDE_BY_SIDE = {"memories": 2, "chains": 2}
"""Kind → how many axes of a model's observation count independent problems: rows, and heads or channels."""

Size = Mapping[str, int]
Example = tuple[Any, ...]
Strategy = Callable[[np.random.Generator, Size], Example]
"""(generator, size) → the positional arguments of one example, as float64 arrays of numpy."""


@dataclass(frozen=True)
class Law:
    """An identity that must hold, e.g. that a value does not change with the unit.

    ``residual(f, example)`` returns an array that is zero where it holds; ``budget`` is in eps of float64, absolute.
    """

    name: str
    residual: Callable[[Callable[..., Any], Example], Any]
    budget: float


@dataclass(frozen=True, kw_only=True)
class Regularizer:
    """A registered function; ``register`` explains the fields."""

    name: str
    function: Callable[..., Any]
    kind: str
    looks_at: tuple[str, ...]
    options: tuple[str, ...]
    inputs: Mapping[str, Strategy]
    sizes: tuple[Size, ...]
    wrt: tuple[int, ...]
    laws: tuple[Law, ...] = ()
    keywords: Mapping[str, Any]
    finite_differences: bool = True

    def measure(self, places: Sequence[Mapping[str, Any]], **options: float) -> jax.Array:
        """Return the mean value over places of its kind, and over the problems that stand side by side in each."""

        def value(*arrays: Any) -> Any:
            return self.function(*arrays, **options)[0]

        for _ in range(SIDE_BY_SIDE.get(self.kind, 0)):
            value = jax.vmap(value)
        found = [jnp.mean(value(*(place[name] for name in self.looks_at))) for place in places]
        return jnp.mean(jnp.stack(found))


_TABLE: dict[str, Regularizer] = {}


def register(
    function: Callable[..., Any],
    *,
    inputs: Mapping[str, Strategy],
    sizes: Sequence[Size],
    laws: Sequence[Law] = (),
    name: str | None = None,
    keywords: Mapping[str, Any] | None = None,
    finite_differences: bool = True,
) -> Regularizer:
    """Put a regulariser into the table.

    Args:
        function: a pure function of arrays of one kind, by the names in ``KINDS``.
        inputs: named strategies that draw its arguments.
        sizes: for the strategies, smallest first.
        laws: identities that it obeys.
        name: its own by default.
        keywords: options with which it is checked.
        finite_differences: whether its gradient is the derivative of its value; not so where a scale is held constant.

    Returns:
        The entry.

    Raises:
        ValueError: the arguments are of no kind, the name belongs to another function, or nothing can be drawn.
    """
    name = function.__name__ if name is None else name
    parameters = inspect.signature(function).parameters.values()
    looks_at = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is p.empty)
    kinds = [kind for kind, names in KINDS.items() if looks_at and set(looks_at) <= set(names)]
    if not kinds:
        offered = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KINDS.items())
        raise ValueError(f"{name} takes {', '.join(looks_at) or 'nothing'}; expected arrays of one kind: {offered}")
    if name in _TABLE and _TABLE[name].function is not function:
        raise ValueError(f"a regulariser {name!r} is registered already; give yours another name")
    if not inputs or not sizes:
        raise ValueError(f"{name} needs at least one input strategy and one size to be checked with")
    entry = Regularizer(
        name=name,
        function=function,
        kind=kinds[0],
        looks_at=looks_at,
        options=tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        inputs=dict(inputs),
        sizes=tuple(sizes),
        wrt=tuple(index for index, argument in enumerate(looks_at) if argument != "layer"),
        laws=tuple(laws),
        keywords=dict(keywords or {}),
        finite_differences=finite_differences,
    )
    _TABLE[name] = entry
    return entry


def registered() -> tuple[Regularizer, ...]:
    """Return the table, in order of registration."""
    return tuple(_TABLE.values())


def find(name: str) -> Regularizer:
    """Return the regulariser of a name.

    Raises:
        KeyError: there is none; the nearest is named.
    """
    if name not in _TABLE:
        near = difflib.get_close_matches(name, _TABLE, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(_TABLE)}"
        raise KeyError(f"no regulariser is called {name!r}; {hint}")
    return _TABLE[name]
