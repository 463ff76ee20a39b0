"""Causal mixing by a semiseparable matrix of rank R, a band beside its diagonal, and the state of the two.

    operator: y_t = Σ_{s≤t} v_tᵀ diag(Π_{s<q≤t} α_q) u_s x_s        S_t = diag(α_t) S_{t−1} + u_t x_tᵀ,  y_t = S_tᵀ v_t
    compat:   y_t = k_t ⊙ v_t,  k_t = α_t ⊙ k_{t−1} + u_t           banded: y_t = Σ_{0≤j<K} taps_j ⊙ x_{t−j}

Symbols: t = 0 … T−1 counts tokens; x_t (D,) inputs; u_t, v_t (R,) what is written and read, zero where a rank channel
is closed; α_t (R,) decays in [0, 1]; S (R, D) and k (R,) the states. Below and on its diagonal the matrix of the
operator has the entries v_tᵀ diag(Π α) u_s, so that every block below the diagonal has rank at most R.
A run starts anew where the segment of a token differs from that of the token before it.
Cost: O(T R D) and O(T K D). Derivation: docs/math/semiseparable.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from so8t_jax.ops.linear_recurrence import linear_recurrence

__all__ = ["banded", "compat", "operator"]


def operator(
    x: Float[Array, "t d"],
    u: Float[Array, "t r"],
    v: Float[Array, "t r"],
    decay: Float[Array, "*#t r"],
    initial: Float[Array, "r d"] | None = None,
    segment_ids: Int[Array, " t"] | None = None,
    *,
    chunk: int = 64,  # noqa: ARG001
) -> tuple[Float[Array, "t d"], Float[Array, "r d"]]:
    """Return y_t = S_tᵀ v_t of S_t = diag(α_t) S_{t−1} + u_t x_tᵀ, and the last state.

    Args:
        x: inputs; computed in float32, or float64 for float64.
        u: what each token writes.
        v: what each token reads.
        decay: α of every token, or (R,) for all tokens.
        initial: the state that enters the segment of the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.
        chunk: tokens that production takes together; the definition takes one.

    Returns:
        y in the dtype of x, and the state in the dtype of initial, or of x without.
    """
    kind = _accumulation(x.dtype)
    start = jnp.zeros((u.shape[1], x.shape[1]), kind) if initial is None else initial.astype(kind)

    def step(state: Array, row: tuple[Array, ...]) -> tuple[Array, Array]:
        x_t, u_t, v_t, a_t, restart = row
        # both are replaced, so that neither an infinite state nor an infinite multiplier enters
        state = jnp.where(restart, 0, a_t)[:, None] * jnp.where(restart, 0, state) + jnp.outer(u_t, x_t)
        return state, v_t @ state

    rows = (*(z.astype(kind) for z in (x, u, v, jnp.broadcast_to(decay, u.shape))), _restarts(segment_ids, len(x)))
    final, y = jax.lax.scan(step, start, rows)
    return y.astype(x.dtype), final.astype(x.dtype if initial is None else initial.dtype)


def compat(
    u: Float[Array, "t r"],
    v: Float[Array, "t r"],
    decay: Float[Array, "*#t r"],
    initial: Float[Array, " r"] | None = None,
    segment_ids: Int[Array, " t"] | None = None,
) -> tuple[Float[Array, "t r"], Float[Array, " r"]]:
    """Return k_t ⊙ v_t of k_t = α_t ⊙ k_{t−1} + u_t, and the last k; with α = 1, k sums what was written.

    Args:
        u: what each token writes.
        v: what each token reads.
        decay: α of every token, or (R,) for all tokens.
        initial: the state that enters the segment of the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.

    Returns:
        k ⊙ v in the dtype of u, and the state in the dtype of initial, or of u without.
    """
    kind = _accumulation(u.dtype)
    start = jnp.zeros(u.shape[1:], kind) if initial is None else initial.astype(kind)
    k, final = linear_recurrence(decay.astype(kind), u.astype(kind), start, segment_ids)
    return (k * v.astype(kind)).astype(u.dtype), final.astype(u.dtype if initial is None else initial.dtype)


def banded(
    x: Float[Array, "t d"],
    taps: Float[Array, "k d"],
    initial: Float[Array, "k-1 d"] | None = None,
    segment_ids: Int[Array, " t"] | None = None,
) -> tuple[Float[Array, "t d"], Float[Array, "k-1 d"]]:
    """Return y_t = Σ_j taps_j ⊙ x_{t−j} over the tokens of a segment, and its last K − 1 inputs.

    Args:
        x: inputs.
        taps: taps_j multiplies the input j tokens back.
        initial: the K − 1 inputs before the first token, in the segment of the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.

    Returns:
        y in the dtype of x, and the last K − 1 inputs, zero where they belong to another segment than the last token,
        in the dtype of initial, or of x without.
    """
    kind, length, before = _accumulation(x.dtype), len(x), len(taps) - 1
    start = jnp.zeros((before, x.shape[1]), kind) if initial is None else initial.astype(kind)
    inputs = jnp.concatenate([start, x.astype(kind)])
    run = jnp.cumsum(_restarts(segment_ids, length))
    runs = jnp.concatenate([jnp.zeros(before, run.dtype), run])
    y = jnp.zeros(x.shape, kind)
    for j in range(before + 1):
        sources = slice(before - j, before - j + length)
        y = y + taps[j].astype(kind)[None] * jnp.where((runs[sources] == run)[:, None], inputs[sources], 0)
    last = jnp.where((runs[length:] == run[-1])[:, None], inputs[length:], 0)
    return y.astype(x.dtype), last.astype(x.dtype if initial is None else initial.dtype)


def _restarts(segment_ids: Int[Array, " t"] | None, length: int) -> Bool[Array, " t"]:
    """Return where a token does not continue the segment of the token before it."""
    if segment_ids is None:
        return jnp.zeros(length, bool)
    return jnp.concatenate([jnp.zeros(1, bool), segment_ids[1:] != segment_ids[:-1]])


def _accumulation(dtype: jnp.dtype) -> jnp.dtype:
    """Return float64 for float64 and float32 for every other dtype."""
    return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)
