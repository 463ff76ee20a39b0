"""Inputs of the room ``hebbian``, and the sums of writes that judge it."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special

from parity_tests.harness.pair import Example, Size, Strategy
from so8t_jax.ops.hebbian import Balance

Array = np.ndarray


def plain(generator: np.random.Generator, size: Size) -> Example:
    """Draw tokens with half-lives from two to 700 tokens; nothing enters."""
    length, heads = size["T"], size["H"]
    q, k, v = (generator.standard_normal((length, heads, size[axis])) for axis in "KKV")
    rates, eta = 10.0 ** generator.uniform(-3.0, -0.5, (length, heads)), generator.uniform(0.1, 1.0, (length, heads))
    return q, k, v, rates, eta, None, None


def started(generator: np.random.Generator, size: Size) -> Example:
    """Draw tokens, and a state that enters."""
    *tokens, _, _ = plain(generator, size)
    return *tokens, generator.standard_normal((size["H"], size["K"], size["V"])), None


def packed(generator: np.random.Generator, size: Size) -> Example:
    """Draw segments of random lengths, and a state that enters the first."""
    *given, _ = started(generator, size)
    return *given, np.cumsum(generator.random(size["T"]) < 0.2)


def extreme(generator: np.random.Generator, size: Size) -> Example:
    """Draw a state that enters, and rates of 0, 1e-6, 0.1, 10 and 1,000 side by side."""
    q, k, v, rates, eta, initial, _ = started(generator, size)
    rates = generator.choice([0.0, 1e-6, 0.1, 10.0, 1e3], rates.shape, p=[0.3, 0.3, 0.2, 0.1, 0.1])
    return q, k, v, rates, eta, initial, None


def per_head(generator: np.random.Generator, size: Size) -> Example:
    """Draw one rate and one strength per head."""
    q, k, v, rates, eta, *_ = plain(generator, size)
    return q, k, v, rates[0], eta[0], None, None


def gentle(draw: Strategy) -> Strategy:
    """Return a strategy with small keys, for which the delta rule does not grow without a norm."""

    def strategy(generator: np.random.Generator, size: Size) -> Example:
        q, k, *given = draw(generator, size)
        return q, 0.4 * k, *given

    return strategy


def unread(draw: Strategy) -> Strategy:
    """Return a strategy without queries."""
    return lambda generator, size: draw(generator, size)[1:]


def one_token(generator: np.random.Generator, size: Size) -> Example:
    """Draw the arguments of one step."""
    *tokens, state, _ = started(generator, {**size, "T": 1})
    return state, *(x[0] for x in tokens)


def acting(k: Array, decay: Array, eta: Array, discretization: str, key_norm: str) -> tuple[Array, Array, Array]:
    """Return keys, retentions and strengths as they act."""
    decay, eta = (np.broadcast_to(x, k.shape[:-1]) for x in (decay, eta))
    keys = k / np.linalg.norm(k, axis=-1, keepdims=True) if key_norm == "l2" else k
    return keys, np.exp(-decay), eta * scipy.special.exprel(-decay) if discretization == "zoh" else eta


def states_by_products(
    k: Array,
    v: Array,
    decay: Array,
    eta: Array,
    initial: Array | None,
    segment_ids: Array | None,
    rule: str,
    discretization: str,
    key_norm: str,
) -> tuple[Array, Array]:
    """Return the states (T + 1, H, K, V): every write times the matrices of the tokens after it; and a_t (T, H)."""
    keys, a, strength = acting(k, decay, eta, discretization, key_norm)
    length, heads, width = k.shape
    ids = np.zeros(length) if segment_ids is None else segment_ids
    states = np.zeros((length + 1, heads, width, v.shape[-1]))
    states[0] = 0.0 if initial is None else initial
    for h in range(heads):
        erase = [np.outer(keys[t, h], keys[t, h]) * strength[t, h] * (rule == "delta") for t in range(length)]
        onward = [a[t, h] * (np.eye(width) - erase[t]) for t in range(length)]
        for s in range(-1, length):
            write = states[0, h] if s < 0 else strength[s, h] * np.outer(keys[s, h], v[s, h])
            if s >= 0:
                states[s + 1, h] += write
            for t in range(s + 1, length):
                if t > 0 and ids[t] != ids[t - 1]:
                    break
                write = onward[t] @ write
                states[t + 1, h] += write
    return states, a


def by_products(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    eta: Array,
    initial: Array | None = None,
    segment_ids: Array | None = None,
    *,
    rule: str = "hebb",
    discretization: str = "euler",
    key_norm: str = "l2",
) -> tuple[Array, Array]:
    """Return what the queries read from all states, and the last one."""
    states, _ = states_by_products(k, v, decay, eta, initial, segment_ids, rule, discretization, key_norm)
    return np.einsum("thkv,thk->thv", states[1:], q), states[-1]


def step_by_products(
    state: Array,
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    eta: Array,
    *,
    rule: str = "hebb",
    discretization: str = "euler",
    key_norm: str = "l2",
) -> tuple[Array, Array]:
    """Return what a run of one token returns."""
    options: dict[str, Any] = {"rule": rule, "discretization": discretization, "key_norm": key_norm}
    y, last = by_products(q[None], k[None], v[None], decay[None], eta[None], state, **options)
    return y[0], last


def balance_by_states(
    k: Array,
    v: Array,
    decay: Array,
    eta: Array,
    initial: Array | None = None,
    segment_ids: Array | None = None,
    *,
    rule: str = "hebb",
    discretization: str = "euler",
    key_norm: str = "l2",
) -> Balance:
    """Return energies of states before and after each token, and what decay alone and writing alone do to them."""
    states, a = states_by_products(k, v, decay, eta, initial, segment_ids, rule, discretization, key_norm)
    energy = (states**2).sum((-2, -1)) / 2
    entering = energy[:-1].copy()
    if segment_ids is not None:
        entering[1:][segment_ids[1:] != segment_ids[:-1]] = 0.0
    decayed = a**2 * entering
    return Balance(energy[1:], entering, entering - decayed, energy[1:] - decayed)


def bound_by_sums(
    k: Array,
    v: Array,
    decay: Array,
    eta: Array,
    initial: Array | None = None,
    segment_ids: Array | None = None,
    *,
    discretization: str = "euler",
    key_norm: str = "l2",
) -> Array:
    """Return the bounds as the states of 1 × 1 fast weights written with norms."""
    keys, a, strength = acting(k, decay, eta, discretization, key_norm)
    lengths = np.linalg.norm(keys, axis=-1) * np.linalg.norm(v, axis=-1) * np.abs(strength)
    ids = np.zeros(len(k)) if segment_ids is None else segment_ids
    bound = np.zeros(lengths.shape)
    for t in range(len(k)):
        reach = [s for s in range(t + 1) if (ids[s : t + 1] == ids[t]).all()]
        bound[t] = sum(a[s + 1 : t + 1].prod(0) * lengths[s] for s in reach)
        if initial is not None and len(reach) == t + 1:
            bound[t] += a[: t + 1].prod(0) * np.sqrt((initial**2).sum((-2, -1)))
    return bound
