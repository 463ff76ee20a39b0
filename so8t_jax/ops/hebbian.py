"""Fast weights: a matrix per head that forgets, is written by outer products, and is read by queries.

    S_t = a_t S_{t−1} + η_t k_t u_tᵀ,   y_t = S_tᵀ q_t,   a_t = e^{−Γ_t}
    hebb: u_t = v_t        delta: u_t = v_t − (a_t S_{t−1})ᵀ k_t
    euler: η_t as given    zoh: η_t ↦ η_t (1 − e^{−Γ_t})/Γ_t, and η_t at Γ_t = 0

Symbols: t = 0 … T−1 counts tokens; for each of H heads S (K, V) fast weights, q queries and k keys (K,), v values (V,),
Γ ≥ 0 decay and η write strength per token, u what is written. Keys are divided by their norms (``key_norm="l2"``); a
key of zeros stays one, with gradient zero. Where the segment of a token differs from that of the token before it, the
state that would enter is dropped: S_t = η_t k_t v_tᵀ.
Cost: O(T H K V), token by token. Derivation: docs/math/hebbian.md.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["energy_balance", "hebbian", "state_bound", "step"]

Rule = Literal["hebb", "delta"]
Discretization = Literal["euler", "zoh"]
KeyNorm = Literal["l2", "none"]
SERIES_BELOW, SERIES_TERMS = 0.5, 16
"""Where (1 − e^{−Γ})/Γ and its derivatives cancel, and how many terms of its series stand for it there."""


class Balance(NamedTuple):
    """The energy E_t = ½‖S_t‖² of every token and head (T, H), and where it came from.

    Attributes:
        energy: E_t.
        entering: E_{t−1}, of the state that enters; 0 where it is dropped.
        dissipation: (1 − a_t²) E_{t−1}, what forgetting took.
        supply: a_t η_t ⟨S_{t−1}, k_t u_tᵀ⟩ + ½ η_t² |k_t|² |u_t|², what writing brought.
    """

    energy: Array
    entering: Array
    dissipation: Array
    supply: Array

    @property
    def residual(self) -> Array:
        """E_t − E_{t−1} + dissipation − supply: rounding errors."""
        return self.energy - self.entering + self.dissipation - self.supply


def hebbian(
    q: Float[Array, "t h k"],
    k: Float[Array, "t h k"],
    v: Float[Array, "t h v"],
    decay: Float[Array, "*#tokens"],
    eta: Float[Array, "*#tokens"],
    initial: Float[Array, "h k v"] | None = None,
    segment_ids: Int[Array, " t"] | None = None,
    *,
    rule: Rule = "hebb",
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
) -> tuple[Float[Array, "t h v"], Float[Array, "h k v"]]:
    """Return what every token reads, and the state after the last one.

    Args:
        q: queries, as they are: a query equal to a normalised key reads the value stored under it.
        k: keys.
        v: values.
        decay: Γ ≥ 0 per token, of a shape that broadcasts to (T, H): (T, H), (H,), (T, 1).
        eta: η, likewise.
        initial: the state that enters the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.
        rule: what is written: the value, or what the state does not yet read under the key.
        discretization: whether η is a weight, or a rate that acts for the whole token while Γ does.
        key_norm: whether keys are divided by their Euclidean norms.

    Returns:
        y in the dtype of v, and the state in the dtype of initial, or of v without.
    """
    kind = _accumulation(v.dtype)
    keys, retention, strength = _prepared(k, decay, eta, kind, discretization, key_norm)

    def advance(state: Array, row: tuple[Array, ...]) -> tuple[Array, Array]:
        q_t, *write, restart = row
        state = _written(_entering(state, restart), *write, rule=rule)[0]
        return state, jnp.einsum("hkv,hk->hv", state, q_t)

    rows = q.astype(kind), keys, v.astype(kind), retention, strength, _restarts(segment_ids, v.shape[0])
    final, y = jax.lax.scan(advance, _start(initial, k, v, kind), rows)
    return y.astype(v.dtype), final.astype(v.dtype if initial is None else initial.dtype)


def step(
    state: Float[Array, "h k v"],
    q: Float[Array, "h k"],
    k: Float[Array, "h k"],
    v: Float[Array, "h v"],
    decay: Float[Array, "#h"],
    eta: Float[Array, "#h"],
    *,
    rule: Rule = "hebb",
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
) -> tuple[Float[Array, "h v"], Float[Array, "h k v"]]:
    """Return what one token reads, and the state that it leaves.

    Args:
        state: what the token before left.
        q: query.
        k: key.
        v: value.
        decay: Γ ≥ 0 of this token.
        eta: η of this token.
        rule: as for ``hebbian``.
        discretization: as for ``hebbian``.
        key_norm: as for ``hebbian``.

    Returns:
        y in the dtype of v, and the state in its own.
    """
    kind = _accumulation(v.dtype)
    key, retention, strength = _prepared(k, decay, eta, kind, discretization, key_norm)
    found = _written(state.astype(kind), key, v.astype(kind), retention, strength, rule=rule)[0]
    y = jnp.einsum("hkv,hk->hv", found, q.astype(kind))
    return y.astype(v.dtype), found.astype(state.dtype)


def energy_balance(
    k: Float[Array, "t h k"],
    v: Float[Array, "t h v"],
    decay: Float[Array, "*#tokens"],
    eta: Float[Array, "*#tokens"],
    initial: Float[Array, "h k v"] | None = None,
    segment_ids: Int[Array, " t"] | None = None,
    *,
    rule: Rule = "hebb",
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
) -> Balance:
    """Return the energy of the state after every token, what took from it, and what brought it.

    Args:
        k: keys.
        v: values.
        decay: Γ ≥ 0 per token.
        eta: η.
        initial: the state that enters the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment; a state that is dropped belongs to no balance.
        rule: as for ``hebbian``.
        discretization: as for ``hebbian``.
        key_norm: as for ``hebbian``.

    Returns:
        (T, H) each, in float32 (float64 for float64).
    """
    kind = _accumulation(v.dtype)
    keys, retention, strength = _prepared(k, decay, eta, kind, discretization, key_norm)

    def advance(state: Array, row: tuple[Array, ...]) -> tuple[Array, Balance]:
        key, value, a, strength_t, restart = row
        before = _entering(state, restart)
        after, written = _written(before, key, value, a, strength_t, rule=rule)
        enter, energy = _energy(before), _energy(after)
        overlap = jnp.einsum("hkv,hk,hv->h", before, key, written)
        write = strength_t**2 * (key**2).sum(-1) * (written**2).sum(-1) / 2
        dissipation, supply = (1 - a**2) * enter, a * strength_t * overlap + write
        return after, Balance(energy, enter, dissipation, supply)

    rows = keys, v.astype(kind), retention, strength, _restarts(segment_ids, v.shape[0])
    return jax.lax.scan(advance, _start(initial, k, v, kind), rows)[1]


def state_bound(
    k: Float[Array, "t h k"],
    v: Float[Array, "t h v"],
    decay: Float[Array, "*#tokens"],
    eta: Float[Array, "*#tokens"],
    initial: Float[Array, "h k v"] | None = None,
    segment_ids: Int[Array, " t"] | None = None,
    *,
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
) -> Float[Array, "t h"]:
    """Return B_t = a_t B_{t−1} + |η_t| |k_t| |v_t|, B_{−1} = ‖initial‖: no state of the rule "hebb" has a larger norm.

    Args:
        k: keys.
        v: values.
        decay: Γ ≥ 0 per token.
        eta: η.
        initial: the state that enters the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.
        discretization: as for ``hebbian``.
        key_norm: as for ``hebbian``.

    Returns:
        Bounds of ‖S_t‖ (Frobenius), in float32 (float64 for float64).
    """
    kind = _accumulation(v.dtype)
    keys, retention, strength = _prepared(k, decay, eta, kind, discretization, key_norm)
    write = jnp.abs(strength) * _norm(keys) * _norm(v.astype(kind))

    def advance(bound: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        a, write_t, restart = row
        bound = a * jnp.where(restart, 0, bound) + write_t
        return bound, bound

    start = _start(initial, k, v, kind)
    rows = retention, write, _restarts(segment_ids, v.shape[0])
    return jax.lax.scan(advance, _norm(start.reshape(start.shape[0], -1)), rows)[1]


def _prepared(
    k: Array, decay: Array, eta: Array, kind: jnp.dtype, discretization: Discretization, key_norm: KeyNorm
) -> tuple[Array, Array, Array]:
    """Return keys, retention a and write strength η as they act."""
    shape = k.shape[:-1]
    rate, strength = (jnp.broadcast_to(x.astype(kind), shape) for x in (decay, eta))
    keys = k.astype(kind)
    if key_norm == "l2":
        keys = keys / jnp.where(_is_zero(keys), 1.0, _norm(keys))[..., None]
        # the select ends the gradient of a key of zeros
        keys = jnp.where(_is_zero(k)[..., None], 0.0, keys)
    return keys, jnp.exp(-rate), strength * _held(rate) if discretization == "zoh" else strength


def _written(state: Array, key: Array, value: Array, a: Array, strength: Array, *, rule: Rule) -> tuple[Array, Array]:
    """Return the state after one token, and what was written."""
    kept = a[:, None, None] * state
    if rule == "delta":
        value = value - jnp.einsum("hkv,hk->hv", kept, key)
    return kept + strength[:, None, None] * jnp.einsum("hk,hv->hkv", key, value), value


def _held(rate: Array) -> Array:
    """Return (1 − e^{−Γ})/Γ, by its series where the quotient's derivatives cancel."""
    near = rate < SERIES_BELOW
    small, large = jnp.where(near, rate, 0.0), jnp.where(near, 1.0, rate)
    series = jnp.ones_like(rate)
    for n in range(SERIES_TERMS, 1, -1):
        series = 1.0 - small / n * series
    return jnp.where(near, series, -jnp.expm1(-large) / large)


def _norm(x: Array) -> Array:
    """Return the Euclidean norm along the last axis, 0 with gradient 0 for zeros, without overflow of squares."""
    largest = jax.lax.stop_gradient(jnp.abs(x).max(-1))
    scale = jnp.where(largest > 0, largest, 1.0)
    square = ((x / scale[..., None]) ** 2).sum(-1)
    return jnp.where(largest > 0, scale * jnp.sqrt(jnp.where(largest > 0, square, 1.0)), 0.0)


def _is_zero(x: Array) -> Array:
    return (x == 0).all(-1)


def _entering(state: Array, restart: Array) -> Array:
    return jnp.where(restart, 0.0, state)


def _energy(state: Array) -> Array:
    return (state**2).sum((-2, -1)) / 2


def _start(initial: Array | None, k: Array, v: Array, kind: jnp.dtype) -> Array:
    return jnp.zeros((*k.shape[1:], v.shape[-1]), kind) if initial is None else initial.astype(kind)


def _restarts(segment_ids: Int[Array, " t"] | None, length: int) -> Bool[Array, " t"]:
    """Return where a token does not continue the segment of the token before it."""
    if segment_ids is None:
        return jnp.zeros(length, bool)
    return jnp.concatenate([jnp.zeros(1, bool), segment_ids[1:] != segment_ids[:-1]])


def _accumulation(dtype: jnp.dtype) -> jnp.dtype:
    """Return float64 for float64 and float32 for every other floating dtype."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)
