"""The regularisers of the room ``physics``, registered: as those that production knows, with the same options.

Terms of the trajectory use H(x) = ½|p|² + (κ/2)|q|², which nothing trained can change, and a closed system.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from so8t_jax.ops import physics
from so8t_jax.ops.physics.monitors import Diagnostics
from so8t_jax.regularizers.registry import Example, Law, Size, register

Found = tuple[Float[Array, ""], Diagnostics]
TRAJECTORIES = ({"l": 2, "s": 3, "d": 4}, {"l": 4, "s": 6, "d": 8})


def trajectory(generator: np.random.Generator, size: Size) -> Example:
    """Draw states of S tokens that walk at random through L layers."""
    steps = generator.standard_normal((size["l"] + 1, size["s"], size["d"]))
    return (steps.cumsum(0),)


def rates(generator: np.random.Generator, size: Size) -> Example:
    """Draw decay rates of half-lives between 2 and 128 tokens."""
    return (math.log(2) / np.exp(generator.uniform(math.log(2), math.log(128), (size["s"], size["h"]))),)


def memory(generator: np.random.Generator, size: Size) -> Example:
    """Draw a memory whose states do not keep its books."""
    t, k, v = size["t"], size["k"], size["v"]
    states = generator.standard_normal((t + 1, k, v))
    keys, values = generator.standard_normal((t, k)), generator.standard_normal((t, v))
    return states, keys, values, generator.uniform(0.3, 1.0, t), generator.uniform(0.2, 1.0, t)


def chain(generator: np.random.Generator, size: Size) -> Example:
    """Draw ratios and a resolvent that belong to no common chain."""
    n = size["n"]
    green, left, right = generator.standard_normal((2, 3, n)).T.transpose(1, 0, 2) @ np.array([1.0, 1j])
    upper, lower = generator.standard_normal((2, n - 1))
    return green, left, right, upper, lower, generator.uniform(0.1, 1.0, n)


def layer_and_probes(generator: np.random.Generator, size: Size) -> Example:
    """Draw rows and probes for a fixed layer that bends channels and mixes tokens."""
    x, u, w = generator.standard_normal((3, size["s"], size["n"], size["d"]))
    return _bending, x, u, w


def energy_drift(states: Float[Array, "l s d"], *, kappa: float = 1.0) -> Found:
    """Return the drift of H from layer to layer."""
    return physics.energy_drift(_energies(states, kappa))


def energy_balance(
    states: Float[Array, "l s d"], *, kappa: float = 1.0, resistance: float = 0.01, step: float = 1.0
) -> Found:
    """Return how far every layer is from losing h ḡᵀRḡ, with R = ``resistance`` for all channels."""
    energies = _energies(states, kappa)
    middle = _slopes((states[1:] + states[:-1]) / 2, kappa)
    over = jax.vmap(jax.vmap(physics.discrete_gradient))
    slopes = over(middle, jnp.diff(states, axis=0), jnp.diff(energies, axis=0))
    return physics.energy_balance(energies, slopes, jnp.full(states.shape[-1:], resistance, states.dtype), step=step)


def hamiltonian_residual(
    states: Float[Array, "l s d"], *, kappa: float = 1.0, resistance: float = 0.0, step: float = 1.0
) -> Found:
    """Return how far the layers' increments are from h(J − R)∇H, as a mean over layers."""
    losses = jnp.full(states.shape[-1:], resistance, states.dtype)
    values, found = jax.vmap(lambda change, slope: physics.hamiltonian_residual(change, slope, losses, step=step))(
        jnp.diff(states, axis=0), _slopes(states[:-1], kappa)
    )
    return jnp.mean(values), {name: jnp.mean(value) for name, value in found.items()}


def lyapunov_hinge(states: Float[Array, "l s d"], *, kappa: float = 1.0, rate: float = 0.0, step: float = 1.0) -> Found:
    """Return by how much energy exceeds what a decay at ``rate`` leaves of it."""
    return physics.lyapunov_hinge(_energies(states, kappa), rate=rate, step=step)


def memory_balance(
    memory_states: Float[Array, "t1 k v"],
    keys: Float[Array, "t k"],
    values: Float[Array, "t v"],
    retention: Float[Array, " t"],
    eta: Float[Array, " t"],
    *,
    norm: float | None = None,
) -> Found:
    """Return the residual of a memory's books, and by how much its energy exceeds ½ ``norm``²."""
    bound = None if norm is None else jnp.full_like(retention, norm)
    return physics.memory_balance(memory_states, keys, values, retention, eta, bound)


def decay_budget(decay: Float[Array, "s h"], *, shortest: float = 4.0, longest: float = 4096.0) -> Found:
    """Return how far the mean rate of every head is from that of half-lives spread evenly in their logarithm."""
    share = jnp.linspace(0, 1, decay.shape[-1], dtype=decay.dtype)
    lives = math.log(shortest) + share * math.log(longest / shortest)
    return physics.decay_budget(decay, math.log(2) * jnp.exp(-lives))


def _parameters(states: Array, kappa: float) -> tuple[Array, ...]:
    """Return the parameters of H(x) = ½|p|² + (κ/2)|q|², as the room takes them."""
    half = states.shape[-1] // 2
    none = jnp.zeros(1, states.dtype)
    return (
        jnp.ones(half, states.dtype),
        jnp.asarray(kappa, states.dtype),
        none,
        jnp.zeros((1, half), states.dtype),
        none,
    )


def _energies(states: Array, kappa: float) -> Array:
    return jax.vmap(jax.vmap(lambda x: physics.energy(x, *_parameters(states, kappa))))(states)


def _slopes(states: Array, kappa: float) -> Array:
    return jax.vmap(jax.vmap(lambda x: physics.energy_gradient(x, *_parameters(states, kappa))))(states)


def _bending(x: Array) -> Array:
    centre = jnp.mean(x, axis=-2, keepdims=True)
    return 0.9 * x + 0.2 * x**3 - 0.3 * centre * x + 0.4 * jnp.mean(x, axis=-1, keepdims=True) * centre


def _unit(f: object, example: Example) -> np.ndarray:
    """The value does not depend on the unit of the states."""
    assert callable(f)
    once, changed = (float(f(example[0] * unit)[0]) for unit in (1.0, 1024.0))
    return np.asarray((once - changed) / max(once, 1e-3))


UNIT = (Law("unit", _unit, 65536),)
for _function in (energy_drift, energy_balance, lyapunov_hinge):
    register(_function, inputs={"walk": trajectory}, sizes=TRAJECTORIES, laws=UNIT, finite_differences=False)
register(hamiltonian_residual, inputs={"walk": trajectory}, sizes=TRAJECTORIES, laws=UNIT)
register(
    memory_balance,
    inputs={"broken": memory},
    sizes=({"t": 3, "k": 2, "v": 3}, {"t": 6, "k": 3, "v": 2}),
    keywords={"norm": 0.5},
    finite_differences=False,
)
register(decay_budget, inputs={"spread": rates}, sizes=({"s": 3, "h": 2}, {"s": 9, "h": 4}))
register(physics.half_life_divergence, inputs={"spread": rates}, sizes=({"s": 3, "h": 2}, {"s": 9, "h": 4}))
register(
    physics.symplectic_defect,
    inputs={"bending": layer_and_probes},
    sizes=({"s": 2, "n": 2, "d": 2}, {"s": 2, "n": 4, "d": 6}),
)
register(physics.ward_residual, inputs={"free": chain}, sizes=({"n": 4}, {"n": 9}), finite_differences=False)
