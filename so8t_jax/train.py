"""A small loop of optax for prototypes: a task, and penalties as constraints by an augmented Lagrangian.

    loss = task + Σ_k λ_k c_k + (ρ_k/2) c_k²        λ_k ← clip(λ_k + ρ_k (c_k − ε_k), 0, λ_k^max) after every step

Symbols: c_k what constraint k measures, ρ its weight, ε its target, λ^max its limit. λ is no parameter: it moves
outside of autodiff, and a constraint of weight 0 is measured without any effect. Room: so8t_jax/ops/physics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from so8t_jax.ops.physics import augmented_lagrangian, update_multipliers

Task = Callable[[nnx.Module, Any], tuple[jax.Array, Any]]
"""(model, batch) → (loss, what was observed on the way)."""
Measure = Callable[[Any, jax.Array], jax.Array]
"""(what was observed, key for probes) → c ≥ 0."""


@dataclass(frozen=True)
class Constraint:
    """A quantity that is to stay at or below a target.

    Attributes:
        name: of the curve.
        measure: c of what the task observed.
        weight: ρ ≥ 0.
        target: ε ≥ 0.
        limit: λ^max ≥ 0.
    """

    name: str
    measure: Measure
    weight: float = 1.0
    target: float = 0.0
    limit: float = 10.0


@dataclass(frozen=True)
class Curves:
    """What happened at every step: task (T,), added (T,), constraints and multipliers (T, K) in the order of names."""

    names: tuple[str, ...]
    task: np.ndarray
    added: np.ndarray
    constraints: np.ndarray
    multipliers: np.ndarray


def fit(
    model: nnx.Module,
    task: Task,
    batches: Iterable[Any],
    optimiser: optax.GradientTransformation,
    constraints: Sequence[Constraint] = (),
    *,
    seed: int = 0,
) -> Curves:
    """Train a model in place, one step a batch.

    Args:
        model: of Flax NNX; its ``nnx.Param`` are trained.
        task: loss of a batch, and what constraints measure.
        batches: arrays of one shape.
        optimiser: of optax.
        constraints: what is measured, and what is demanded of it.
        seed: of the probes.

    Returns:
        The curves.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: the loss is not finite; the step is named.
    """
    optimizer = nnx.Optimizer(model, optimiser, wrt=nnx.Param)
    weights, targets, limits = (
        jnp.asarray([getattr(constraint, name) for constraint in constraints], jnp.float32)
        for name in ("weight", "target", "limit")
    )

    step = _step(task, tuple(constraint.measure for constraint in constraints))
    rows, multipliers, key = [], jnp.zeros(len(constraints)), jax.random.key(seed)
    for index, batch in enumerate(batches):
        *found, moved = step(
            model, optimizer, batch, multipliers, (weights, targets, limits), jax.random.fold_in(key, index)
        )
        if not np.isfinite(found[0] + found[1]):
            raise FloatingPointError(f"step {index}: the loss is {found[0]} + {found[1]}; lower the rate or a weight")
        rows.append((*map(np.asarray, found), np.asarray(multipliers)))
        multipliers = moved
    if not rows:
        raise ValueError("expected at least one batch, got none")
    return Curves(tuple(c.name for c in constraints), *(np.stack(column) for column in zip(*rows, strict=True)))


@functools.cache
def _step(task: Task, measures: tuple[Measure, ...]) -> Callable[..., Any]:
    """Return one step of training, compiled once for all weights."""

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any, multipliers: Any, demanded: Any, key: Any) -> Any:
        weights, targets, limits = demanded

        def loss(model: Any) -> Any:
            plain, observed = task(model, batch)
            keys = jax.random.split(key, max(1, len(measures)))
            measured = [measure(observed, k) for measure, k in zip(measures, keys, strict=False)]
            found = jnp.stack(measured) if measured else jnp.zeros(0)
            whole, _ = augmented_lagrangian(plain, found, multipliers, weights)
            return whole, (plain, whole - plain, found)

        (_, found), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradient)
        return *found, update_multipliers(multipliers, found[2], weights, targets, limits)

    return step
