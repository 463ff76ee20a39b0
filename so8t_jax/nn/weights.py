"""Weights of layers by production's names, so that one set of numbers serves both sides.

    Linear: kernel = weightᵀ      LayerNorm: scale = weight      Embed: embedding = weight      others: the same

Names are attributes joined by dots, as in production's state dicts; what ``nnx.Sequential`` calls layers has no name
there. Variables of the kinds ``nnx.Param`` and ``Buffer`` belong to the weights; anything else does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["Buffer", "Place", "load", "places", "tensors"]

M = TypeVar("M", bound=nnx.Module)

RENAMED = {nnx.Linear: {"kernel": "weight"}, nnx.LayerNorm: {"scale": "weight"}, nnx.Embed: {"embedding": "weight"}}


class Buffer(nnx.Variable):
    """Numbers that are saved with the weights and never trained."""


class Place(NamedTuple):
    """Where a tensor of production lives here.

    Attributes:
        path: attributes from the root to the variable.
        transposed: whether the matrix is stored the other way round.
        shape: of the tensor, as production has it.
        dtype: of the tensor.
        trained: whether it is a parameter.
    """

    path: tuple[str | int, ...]
    transposed: bool
    shape: tuple[int, ...]
    dtype: np.dtype
    trained: bool


def places(module: nnx.Module) -> dict[str, Place]:
    """Return the place of every tensor, by production's name, in the order of the module's attributes.

    Args:
        module: with values or with shapes only (``nnx.eval_shape``).
    """
    owners = dict(nnx.iter_graph(module))
    return dict(_place(module, owners, path, value) for path, value in _variables(module).items())


def tensors(module: nnx.Module) -> dict[str, jax.Array]:
    """Return the weights by production's names, in production's orientation.

    Args:
        module: the layer or model.
    """
    values = _variables(module)
    found = {name: (place, values[place.path][...]) for name, place in places(module).items()}
    return {name: value.T if place.transposed else value for name, (place, value) in found.items()}


def load(module: M, given: Mapping[str, jax.Array | np.ndarray]) -> M:
    """Return a module like this one with other weights.

    Args:
        module: gives structure, names and shapes; it is left as it is.
        given: a tensor for each name, of production's orientation; their dtypes are kept.

    Raises:
        ValueError: a name is missing, unknown, or its tensor has another shape; the text lists all of them.
    """
    wanted = places(module)
    problems = mismatches(wanted, {name: tuple(value.shape) for name, value in given.items()})
    if problems:
        raise ValueError(f"the weights are not those of this {type(module).__name__}:\n" + "\n".join(problems))
    graph, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    for name, place in wanted.items():
        value = jnp.asarray(given[name])
        flat[place.path] = flat[place.path].replace(value.T if place.transposed else value)
    return nnx.merge(graph, nnx.from_flat_state(flat))


def mismatches(wanted: Mapping[str, Place], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return one line for each tensor that is missing, unknown, or of another shape.

    Args:
        wanted: what a module has.
        found: shapes by name.
    """
    problems = [
        f"  {name}: expected a tensor {place.shape}, got none" for name, place in wanted.items() if name not in found
    ]
    problems += [
        f"  {name}: expected nothing of that name, got a tensor {shape}"
        for name, shape in found.items()
        if name not in wanted
    ]
    problems += [
        f"  {name}: expected a tensor {place.shape}, got {found[name]}"
        for name, place in wanted.items()
        if name in found and found[name] != place.shape
    ]
    return problems


def _variables(module: nnx.Module) -> dict[tuple[str | int, ...], nnx.Variable]:
    """Return the parameters and buffers by path; a shared one under its first path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Any(nnx.Param, Buffer)))
    return dict(flat)


def _place(
    module: nnx.Module, owners: Mapping[tuple[str | int, ...], object], path: tuple[str | int, ...], value: nnx.Variable
) -> tuple[str, Place]:
    owner = owners[path[:-1]] if len(path) > 1 else module
    renamed = next((names for kind, names in RENAMED.items() if isinstance(owner, kind)), {})
    last = renamed.get(str(path[-1]), path[-1])
    inside = [
        part
        for depth, part in enumerate(path[:-1])
        if not (part == "layers" and isinstance(owners.get(path[:depth], module), nnx.Sequential))
    ]
    transposed = isinstance(owner, nnx.Linear) and path[-1] == "kernel"
    shape = tuple(reversed(value.shape)) if transposed else tuple(value.shape)
    place = Place(path, transposed, shape, np.dtype(value.dtype), isinstance(value, nnx.Param))
    return ".".join(map(str, (*inside, last))), place
