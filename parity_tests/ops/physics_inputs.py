"""Inputs of the room ``physics``: states, trajectories, memories and chains, consistent ones and free ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.harness.pair import Example, Size


def mixing_layer(x: Any) -> Any:
    """Return F(x) for numpy, JAX and PyTorch alike: it bends every channel, and mixes channels and tokens."""
    centre = x.mean(-2)[..., None, :]
    return 0.9 * x + 0.2 * x * x * x - 0.3 * centre * x + 0.4 * x.mean(-1)[..., None] * centre


def parameters(generator: np.random.Generator, d: int, m: int) -> tuple[np.ndarray, ...]:
    """Draw the parameters of an energy: masses, κ, s, w, b."""
    inverse_mass, scales = generator.uniform(0.5, 2.0, d), generator.uniform(0.1, 1.0, m)
    return inverse_mass, np.asarray(0.7), scales, generator.standard_normal((m, d)), generator.standard_normal(m)


def state(generator: np.random.Generator, size: Size) -> Example:
    """Draw one state and an energy."""
    return generator.standard_normal(2 * size["d"]), *parameters(generator, size["d"], size["m"])


def far_state(generator: np.random.Generator, size: Size) -> Example:
    """Draw a state far out, where every softplus is saturated on one side or the other."""
    x, *rest = state(generator, size)
    return 8.0 * x, *rest


def secant(generator: np.random.Generator, size: Size) -> Example:
    """Draw a gradient, a change of state and a change of energy."""
    gradient, change = generator.standard_normal((2, size["n"]))
    return gradient, change, np.asarray(gradient @ change + generator.standard_normal())


def at_rest(generator: np.random.Generator, size: Size) -> Example:
    """Draw a gradient for a state that does not move."""
    return generator.standard_normal(size["n"]), np.zeros(size["n"]), np.asarray(0.0)


def tangents(generator: np.random.Generator, size: Size) -> Example:
    """Draw two tangent vectors."""
    u, w = generator.standard_normal((2, 2 * size["d"]))
    return u, w


def energies(generator: np.random.Generator, size: Size) -> Example:
    """Draw energies of both signs."""
    return (generator.standard_normal((size["l"] + 1, size["s"])) + 0.5,)


def large_energies(generator: np.random.Generator, size: Size) -> Example:
    """Draw energies in a unit in which they are large."""
    return (1000.0 * energies(generator, size)[0],)


def supplied(generator: np.random.Generator, size: Size) -> Example:
    """Draw energies and the work done in every step."""
    return *energies(generator, size), generator.standard_normal((size["l"], size["s"]))


def closed_balance(generator: np.random.Generator, size: Size) -> Example:
    """Draw energies, discrete gradients and a resistance."""
    gradients = generator.standard_normal((size["l"], size["s"], size["n"]))
    return *energies(generator, size), gradients, generator.uniform(0.0, 1.0, size["n"])


def open_balance(generator: np.random.Generator, size: Size) -> Example:
    """Draw the same and the work done in every step."""
    return *closed_balance(generator, size), generator.standard_normal((size["l"], size["s"]))


def field(generator: np.random.Generator, size: Size) -> Example:
    """Draw increments, gradients and a resistance."""
    increments, gradients = generator.standard_normal((2, size["s"], 2 * size["d"]))
    return increments, gradients, generator.uniform(0.0, 1.0, 2 * size["d"])


def probes(generator: np.random.Generator, size: Size) -> Example:
    """Draw states and two probes for the layer above."""
    return mixing_layer, *generator.standard_normal((3, size["s"], size["n"], 2 * size["d"]))


def gradients(generator: np.random.Generator, size: Size) -> Example:
    """Draw gradients."""
    return (generator.standard_normal((size["s"], size["n"])),)


def writes(generator: np.random.Generator, size: Size) -> tuple[np.ndarray, ...]:
    """Draw keys, values, retention and write strengths."""
    t, k, v = size["t"], size["k"], size["v"]
    keys, values = generator.standard_normal((t, k)), generator.standard_normal((t, v))
    return keys, values, generator.uniform(0.3, 1.0, t), generator.uniform(0.1, 0.5, t)


def memory(generator: np.random.Generator, size: Size) -> Example:
    """Draw a memory that obeys its rule, and a budget that it exceeds."""
    keys, values, retention, eta = writes(generator, size)
    states = [generator.standard_normal((size["k"], size["v"]))]
    for a, e, k, v in zip(retention, eta, keys, values, strict=True):
        states.append(a * states[-1] + e * np.outer(k, v))
    norms = np.array([np.linalg.norm(s) for s in states[1:]])
    return np.stack(states), keys, values, retention, eta, norms * generator.uniform(0.5, 1.2, size["t"])


def broken_memory(generator: np.random.Generator, size: Size) -> Example:
    """Draw states that no such memory has, without a budget."""
    states = 2.0 * generator.standard_normal((size["t"] + 1, size["k"], size["v"]))
    return states, *writes(generator, size), None


def decays(generator: np.random.Generator, size: Size) -> Example:
    """Draw decays over four decades."""
    return (np.exp(generator.uniform(-7.0, 1.0, (size["t"], size["h"]))),)


def budgeted(generator: np.random.Generator, size: Size) -> Example:
    """Draw decays and their targets."""
    return *decays(generator, size), generator.uniform(0.05, 0.5, size["h"])


def narrow_decays(generator: np.random.Generator, size: Size) -> Example:
    """Draw decays whose half-lives are far outside of the histogram on one side."""
    return (generator.uniform(3.0, 5.0, (size["t"], size["h"])),)


def chain(generator: np.random.Generator, size: Size) -> Example:
    """Draw a dissipative chain with Hermitian hopping and the diagonal of its resolvent by inversion."""
    n = size["n"]
    width = generator.uniform(0.2, 1.0, n)
    hopping = generator.standard_normal(n - 1) + 1j * generator.standard_normal(n - 1)
    diagonal = generator.standard_normal(n) - 1j * width
    h = np.diag(diagonal) + np.diag(hopping, 1) + np.diag(hopping.conj(), -1)
    left, right = diagonal.copy(), diagonal.copy()
    for i in range(1, n):
        left[i] -= np.abs(hopping[i - 1]) ** 2 / left[i - 1]
        right[n - 1 - i] -= np.abs(hopping[n - 1 - i]) ** 2 / right[n - i]
    return np.diag(np.linalg.inv(h)).copy(), left, right, hopping, hopping.conj(), width


def free_chain(generator: np.random.Generator, size: Size) -> Example:
    """Draw numbers that belong to no chain, with real couplings."""
    n = size["n"]
    green, left, right = generator.standard_normal((3, n)) + 1j * generator.uniform(0.5, 2.0, (3, n))
    upper, lower = generator.standard_normal((2, n - 1))
    return green, left, right, upper, lower, generator.uniform(0.2, 1.0, n)


def ratios(generator: np.random.Generator, size: Size) -> Example:
    """Draw the left ratios of a chain."""
    return (2.0 * chain(generator, size)[1],)


def constraints(generator: np.random.Generator, size: Size) -> Example:
    """Draw a loss, constraints, multipliers and weights."""
    task, values = np.asarray(generator.uniform(1.0, 3.0)), generator.uniform(0.0, 1.0, size["k"])
    return task, values, generator.uniform(0.0, 2.0, size["k"]), generator.uniform(0.0, 2.0, size["k"])


def dual_step(generator: np.random.Generator, size: Size) -> Example:
    """Draw an update of which some entries end at 0 and some at the limit."""
    multipliers, values, targets, limits = generator.uniform(0.0, 1.0, (4, size["k"]))
    return multipliers, values, 3.0 * np.ones(size["k"]), targets, limits
