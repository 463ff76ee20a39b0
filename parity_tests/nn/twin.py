"""A layer and its definition as a pair of functions of inputs and weights, so that the harness judges both alike.

    reference(inputs…, weights…) on one example      production(inputs…, weights…) on a batch

The weights are those of the layer at its start, moved by noise so that nothing is zero or one, under production's
names; they are arguments like any other, and their gradients are judged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.func import functional_call

from parity_tests.harness import Budget, OpPair
from parity_tests.harness.pair import Size, Strategy
from so8t_jax.nn import weights

__all__ = ["twin"]

SEED = 20
MOVED = 0.1
"""Standard deviation of the noise on the weights."""


class _Called(nn.Module):
    """A layer that is called by a function, as ``functional_call`` wants it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.layer, *inputs)


def twin(
    name: str,
    *,
    layer: Callable[[torch.dtype], nn.Module],
    definition: Callable[[jnp.dtype], nnx.Module],
    inputs: Mapping[str, Strategy],
    sizes: Sequence[Size],
    budget: Budget,
    dtypes: Sequence[str] = ("float64",),
    wrt: Sequence[int] = (0,),
    frozen: Sequence[str] = (),
    only: Sequence[str] | None = None,
    call: Callable[..., Any] = lambda layer, *inputs: layer(*inputs),
    defined: Callable[..., Any] | None = None,
) -> OpPair:
    """Return the declaration of a layer and its definition.

    Args:
        name: of the pair.
        layer: builds production's module in a dtype.
        definition: builds the definition in a dtype.
        inputs: named strategies; each draws the inputs of one example, without weights.
        sizes: as for ``OpPair``.
        budget: as for ``OpPair``, like ``dtypes``.
        dtypes: see there.
        wrt: positions of differentiable inputs; all floating-point parameters are differentiated as well.
        frozen: parameters that get no gradient.
        only: the only parameters that get one.
        call: applies production to a batch of inputs.
        defined: applies the definition to the inputs of one example; ``call`` by default.
    """
    drawn = _weights(layer)
    parameters = dict(layer(torch.float64).named_parameters())
    count = len(next(iter(inputs.values()))(np.random.default_rng(0), sizes[0]))
    trained = [i for i, key in enumerate(drawn) if key in (only or parameters) and key not in frozen]
    modules = functools.cache(lambda dtype: _Called(layer(dtype), call).eval())
    # the weights are arguments: only the structure is needed
    definitions = functools.cache(lambda dtype: nnx.eval_shape(lambda: definition(dtype)))

    def production(*arguments: Any) -> Any:
        given = dict(zip(drawn, arguments[count:], strict=True))
        module = modules(_dtype_of(given.values(), torch.Tensor.is_floating_point))
        return functional_call(module, {f"layer.{key}": value for key, value in given.items()}, arguments[:count])

    def reference(*arguments: Any) -> Any:
        given = dict(zip(drawn, arguments[count:], strict=True))
        dtype = _dtype_of(given.values(), lambda x: jnp.issubdtype(x.dtype, jnp.floating))
        return (defined or call)(weights.load(definitions(dtype), given), *arguments[:count])

    def with_weights(strategy: Strategy) -> Strategy:
        return lambda generator, size: (*strategy(generator, size), *drawn.values())

    return OpPair(
        name=name,
        reference=reference,
        production=production,
        inputs={key: with_weights(strategy) for key, strategy in inputs.items()},
        sizes=tuple(sizes),
        shared=tuple(range(count, count + len(drawn))),
        wrt=(*wrt, *(count + i for i in trained)),
        dtypes=tuple(dtypes),
        budget=budget,
    )


def _weights(layer: Callable[[torch.dtype], nn.Module]) -> dict[str, np.ndarray]:
    """Return the tensors of a layer by name, the parameters moved by noise."""
    torch.manual_seed(SEED)
    module, generator = layer(torch.float64), np.random.default_rng(SEED)
    trained = dict(module.named_parameters())
    found: dict[str, np.ndarray] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        # settings of the layer, which the declaration gives to both sides, and second names of tied weights
        if name.endswith("_extra_state") or id(value) in seen:
            continue
        seen.add(id(value))
        array = value.detach().numpy().copy()
        found[name] = array + MOVED * generator.standard_normal(array.shape) if name in trained else array
    return found


def _dtype_of(tensors: Any, floating: Callable[[Any], bool]) -> Any:
    return next(tensor.dtype for tensor in tensors if floating(tensor))
