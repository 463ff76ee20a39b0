"""First-order linear recurrences along tokens, and sums of everything so far as their simplest case.

    h_t = a_t ⊙ h_{t−1} + b_t,   h_{−1} = initial        H = L b,   L_{ts} = Π_{s<q≤t} a_q for s ≤ t, else 0
    reverse:  h_t = a_t ⊙ h_{t+1} + b_t,   h_T = initial

Symbols: t = 0 … T−1 counts tokens, ⊙ multiplies channel by channel, a_t multipliers (decays have |a| ≤ 1, nothing
requires it), b_t inputs, real or complex; the state that leaves is h_{T−1}, or h_0 where ``reverse``. Where the segment
of a token differs from that of the token before it, the state that would enter is dropped: h_t = b_t.
Cost: T C multiplications and additions. Derivation: docs/math/linear_recurrence.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Int

__all__ = ["cumulative_sum", "linear_recurrence"]


def linear_recurrence(
    a: Inexact[Array, "*#shape"],
    b: Inexact[Array, "t c"],
    initial: Inexact[Array, " c"] | None = None,
    segment_ids: Int[Array, " t"] | None = None,
    *,
    reverse: bool = False,
) -> tuple[Inexact[Array, "t c"], Inexact[Array, " c"]]:
    """Return every state of h_t = a_t h_{t−1} + b_t, and the last one.

    Args:
        a: multipliers of a shape that broadcasts to that of b: (T, C), (C,), (T, 1); real, or complex where b is.
        b: inputs; computed in float32, or float64 for float64.
        initial: the state that enters the segment of the first token of the run; zero by default.
        segment_ids: equal numbers for the tokens of one segment; the state does not cross from one to another.
        reverse: run from the last token to the first.

    Returns:
        h in the dtype of b, and the state after the last token of the run, in the dtype of initial, or of b without.
    """
    kind = _accumulation(b.dtype)
    multipliers = jnp.broadcast_to(a.astype(kind), b.shape)
    start = jnp.zeros(b.shape[1:], kind) if initial is None else initial.astype(kind)

    def step(h: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        a_t, b_t, restart = row
        # both are replaced, so that neither an infinite state nor an infinite multiplier enters
        h = jnp.where(restart, 0, a_t) * jnp.where(restart, 0, h) + b_t
        return h, h

    rows = multipliers, b.astype(kind), _restarts(segment_ids, b.shape[0], reverse)
    final, h = jax.lax.scan(step, start, rows, reverse=reverse)
    return h.astype(b.dtype), final.astype(b.dtype if initial is None else initial.dtype)


def cumulative_sum(x: Inexact[Array, "t c"], *, reverse: bool = False) -> Inexact[Array, "t c"]:
    """Return Σ_{s≤t} x_s, or Σ_{s≥t} x_s where reverse: the recurrence with a = 1.

    Args:
        x: terms; summed in float32, or float64 for float64.
        reverse: sum from the last token.
    """
    return jax.lax.cumsum(x.astype(_accumulation(x.dtype)), axis=0, reverse=reverse).astype(x.dtype)


def _restarts(segment_ids: Int[Array, " t"] | None, length: int, reverse: bool) -> Bool[Array, " t"]:
    """Return where a token does not continue the segment of the token that the run visited before it."""
    first = jnp.zeros(1, bool)
    if segment_ids is None:
        return jnp.zeros(length, bool)
    change = segment_ids[1:] != segment_ids[:-1]
    return jnp.concatenate([change, first] if reverse else [first, change])


def _accumulation(dtype: jnp.dtype) -> jnp.dtype:
    """Return float32 for the half dtypes and any other dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits == 16 else jnp.dtype(dtype)
