"""The definition, batched by ``jax.vmap`` and compiled once per function: values and vector-Jacobian products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity_tests.harness.inputs import NUMPY, Inputs, is_array, is_inexact
from parity_tests.harness.pair import OpPair
from parity_tests.harness.tree import flatten, map_leaves


def values(pair: OpPair, inputs: Inputs, dtype: str = "float64", *, jit: bool = True) -> Any:
    """Return the outputs of the definition on a batch, as nested numpy arrays.

    Args:
        pair: the declaration.
        inputs: batched arguments.
        dtype: ``float64`` or ``float32``, in which the definition is evaluated.
        jit: compile first.
    """
    run = _compiled(_of(pair), *_split(inputs)) if jit else _batched(_of(pair), *_split(inputs))
    return map_leaves(np.asarray, run(*_arrays(inputs, dtype)))


def gradients(pair: OpPair, inputs: Inputs, cotangents: tuple[np.ndarray, ...], dtype: str = "float64") -> Any:
    """Return position → gradient of ⟨cotangents, outputs⟩ for every ``wrt`` argument that is present.

    Args:
        pair: the declaration.
        inputs: batched arguments.
        cotangents: one per inexact output leaf.
        dtype: ``float64`` or ``float32``, in which the definition is evaluated.
    """
    positions = present(pair, inputs)
    pulled = _pullback(_of(pair), positions, *_split(inputs))(_arrays(inputs, dtype), cotangents)
    return {position: np.asarray(g) for position, g in zip(positions, pulled, strict=True)}


def forget_compiled() -> None:
    """Drop every compiled definition; the next use compiles again."""
    for cache in (_compiled, _pullback, _batched):
        cache.cache_clear()
    jax.clear_caches()


def present(pair: OpPair, inputs: Inputs) -> tuple[int, ...]:
    """Return the ``wrt`` positions whose argument is not ``None`` here."""
    return tuple(position for position in pair.wrt if is_array(inputs.arguments[position]))


def on_example(pair: OpPair, example: tuple[Any, ...]) -> Any:
    """Return the outputs of the definition on one example in float64, as nested numpy arrays."""
    inputs = Inputs(example, (None,) * len(example), 1)
    return map_leaves(np.asarray, _compiled(_of(pair), *_split(inputs))(*_arrays(inputs, "float64")))


class _Static:
    """A hashable stand-in that tells ``1``, ``1.0`` and ``True`` apart."""

    def __init__(self, value: Any) -> None:
        self.value, self.key = value, (type(value), value)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.key == other.key


Template = tuple[_Static | None, ...]
Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class _Definition:
    """What decides the compiled function: not the pair, so that declarations which share a reference share it."""

    function: Callable[..., Any]
    keywords: tuple[tuple[str, _Static], ...]


def _of(pair: OpPair) -> _Definition:
    return _Definition(pair.reference, tuple((key, _Static(value)) for key, value in pair.keywords.items()))


def _split(inputs: Inputs) -> tuple[Template, Axes]:
    return tuple(None if is_array(a) else _Static(a) for a in inputs.arguments), inputs.axes


def _arrays(inputs: Inputs, dtype: str) -> tuple[Any, ...]:
    def cast(a: Any) -> Any:
        if not is_inexact(a):
            return jnp.asarray(a)
        kind = ("complex64" if dtype == "float32" else "complex128") if np.iscomplexobj(a) else dtype
        return jnp.asarray(np.asarray(a).astype(NUMPY[kind]))

    return tuple(cast(a) for a in inputs.arguments if is_array(a))


@functools.cache
def _batched(definition: _Definition, template: Template, axes: Axes) -> Callable[..., Any]:
    keywords = {key: static.value for key, static in definition.keywords}

    def of_arrays(*arrays: Any) -> Any:
        rest = iter(arrays)
        arguments = [next(rest) if slot is None else slot.value for slot in template]
        return definition.function(*arguments, **keywords)

    array_axes = tuple(axis for slot, axis in zip(template, axes, strict=True) if slot is None)
    if all(axis is None for axis in array_axes):
        return of_arrays
    return jax.vmap(of_arrays, in_axes=array_axes)


@functools.cache
def _compiled(definition: _Definition, template: Template, axes: Axes) -> Callable[..., Any]:
    return jax.jit(_batched(definition, template, axes))


@functools.cache
def _pullback(definition: _Definition, wrt: tuple[int, ...], template: Template, axes: Axes) -> Callable[..., Any]:
    batched = _batched(definition, template, axes)
    order = [position for position, slot in enumerate(template) if slot is None]
    chosen = [order.index(position) for position in wrt]

    def pull(arrays: tuple[Any, ...], cotangents: tuple[Any, ...]) -> Any:
        def of_chosen(*picked: Any) -> tuple[Any, ...]:
            full = list(arrays)
            for slot, value in zip(chosen, picked, strict=True):
                full[slot] = value
            leaves = flatten(batched(*full))[1]
            return tuple(leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact))

        outputs, transpose = jax.vjp(of_chosen, *(arrays[slot] for slot in chosen))
        return transpose(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))

    return jax.jit(pull)
