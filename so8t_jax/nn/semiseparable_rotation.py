"""Decays with a rotation: rank channels whose states are complex and turn while they fade.

    operator: S_t = diag(α_t e^{iωΔ_t}) S_{t−1} + u_t x_tᵀ,   y_t = Re(S_tᵀ v_t)
    compat:   k_t = α_t e^{iωΔ_t} ⊙ k_{t−1} + u_t,             y_t = Re(k_t ⊙ v_t)

Symbols: ω (R,) trained frequencies in radians per unit of time, Δ_t time steps, α_t decays; u, v complex (T, R), S
complex (R, D), k complex (R,), each given and returned as real and then imaginary parts.
Definition: so8t_jax/ops/linear_recurrence.py. Derivation: docs/math/semiseparable.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from so8t_jax.ops.linear_recurrence import linear_recurrence

__all__ = ["Rotation"]


class Rotation(nnx.Module):
    """Frequencies of rank channels, which start at a quarter of a turn in a half-life.

    Args:
        half_lives: of the channels (R,).
    """

    def __init__(self, half_lives: Float[Array, " r"]) -> None:
        self.frequencies = nnx.Param(0.5 * jnp.pi / half_lives)

    def __call__(
        self,
        x: Float[Array, "t d"] | None,
        u: Float[Array, "t c"],
        v: Float[Array, "t c"],
        decay: Float[Array, "t r"],
        step: Float[Array, "t r"],
        initial: Float[Array, " c *width"] | None = None,
        segment_ids: Int[Array, " t"] | None = None,
    ) -> tuple[Float[Array, "t width"], Float[Array, " c *width"]]:
        """Return y, and the last state.

        Args:
            x: inputs of the operator; none for ``compat``, whose width is R.
            u: what each token writes, C = 2R.
            v: what each token reads.
            decay: α.
            step: Δ.
            initial: the state that enters; zero by default.
            segment_ids: equal numbers for the tokens of one segment.
        """
        angle = self.frequencies[...][None] * step
        turn = jax.lax.complex(decay * jnp.cos(angle), decay * jnp.sin(angle))
        written, read = _joined(u, 1), _joined(v, 1)
        start = None if initial is None else _joined(initial, 0)
        if x is None:
            k, last = linear_recurrence(turn, written, start, segment_ids)
            return (k * read).real, jnp.concatenate([last.real, last.imag])
        (length, rank), width = written.shape, x.shape[1]
        products = (written[:, :, None] * x[:, None, :].astype(written.dtype)).reshape(length, rank * width)
        turns = jnp.repeat(turn, width, axis=1)
        states, last = linear_recurrence(turns, products, None if start is None else start.reshape(-1), segment_ids)
        y = jnp.einsum("tr,trd->td", read, states.reshape(length, rank, width)).real
        last = last.reshape(rank, width)
        return y, jnp.concatenate([last.real, last.imag])


def _joined(z: Array, axis: int) -> Array:
    """Return real and then imaginary parts along an axis as complex numbers."""
    return jax.lax.complex(*jnp.split(z, 2, axis))
