"""A sound toy pair, in which the tests of the harness plant their faults: Σ w x and x w / (1 + |x|²)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.harness import Budget, Law, OpPair, Rejection


def toy_reference(x: Any, weight: Any) -> Any:
    """Return Σ w x and x w / (1 + |x|²)."""
    return jnp.sum(weight * x), x * weight / (1 + jnp.sum(x * x))


def toy_production(x: torch.Tensor, weight: torch.Tensor) -> Any:
    """Return the same, batched, accumulated in float32 or float64."""
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"expected as many weights as entries ({x.shape[-1]}), got {weight.shape[-1]}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    high, scale = x.to(wide), weight.to(wide)
    total = (scale * high).sum(-1)
    return total.to(x.dtype), (high * scale / (1 + (high * high).sum(-1, keepdim=True))).to(x.dtype)


def toy_oracle(x: np.ndarray, weight: np.ndarray) -> Any:
    """Return the same with numpy, entry by entry."""
    scale = 1.0 + float(x @ x)
    return np.asarray(float(weight @ x)), np.array([a * b / scale for a, b in zip(x, weight, strict=True)])


def toy_inputs(generator: np.random.Generator, size: Any) -> tuple[np.ndarray, np.ndarray]:
    """Draw x around 1 and weights around 2."""
    return generator.standard_normal(size["n"]) + 1.0, generator.standard_normal(size["n"]) + 2.0


def odd_in_weight(f: Callable[..., Any], example: tuple[Any, ...]) -> Any:
    """Return what must vanish: the second output is odd in the weights."""
    x, weight = example
    return f(x, weight)[1] + f(x, -weight)[1]


SOUND = OpPair(
    name="toy.normalised",
    reference=toy_reference,
    production=toy_production,
    oracle=toy_oracle,
    inputs={"generic": toy_inputs},
    sizes=({"n": 3}, {"n": 7}),
    wrt=(0, 1),
    budget=Budget(forward=4, gradient=16),
    laws=(Law("odd_in_weight", odd_in_weight, budget=4),),
    rejections=(Rejection("lengths", lambda: (torch.ones(3), torch.ones(4)), ValueError, "as many weights"),),
)
