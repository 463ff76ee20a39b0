"""Positions as sines and cosines whose frequencies are the inverse zeta zeros.

    E[p] = a·(sin φ_1, cos φ_1, sin φ_2, …),    φ_j = p·ω_max (γ_1/γ_j)^power

Symbols: p a position, a the amplitude, γ_j the j-th zero.
Definition: so8t_jax/ops/zeta.py. Derivation: docs/math/zeta.md.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from so8t_jax.ops import zeta

__all__ = ["ZetaEmbedding"]


class ZetaEmbedding(nnx.Module):
    """The vectors of positions; they are computed, so that no position is out of range.

    Args:
        max_len: rows of the table when it is trained; without training nothing is stored.
        d_model: width D.
        trainable: the first ``max_len`` rows are parameters that start at the formula.
        scale: amplitude a.
        omega_max: largest frequency in radians per position.
        power: exponent of γ_1/γ_j.
        mode: of ``zeta.frequencies``.
        param_dtype: of the rows.
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        trainable: bool = False,
        scale: float = 1.0,
        *,
        omega_max: float = math.pi / 2,
        power: float = 1.0,
        mode: zeta.Mode = "scaled",
        param_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.max_len, self.d_model, self.scale, self.param_dtype = max_len, d_model, scale, param_dtype
        self.omega_max, self.power, self.mode = omega_max, power, mode
        self.weight = nnx.Param(self.formula(jnp.arange(max_len))) if trainable else nnx.data(None)

    def formula(self, positions: Int[Array, " t"]) -> Float[Array, "t d"]:
        """Return a·(sin φ_1, cos φ_1, …) of any positions, trained rows or not.

        Args:
            positions: whole numbers.
        """
        found = zeta.embedding(
            positions, self.d_model, scale=self.scale, omega_max=self.omega_max, power=self.power, mode=self.mode
        )
        return found.astype(self.param_dtype)

    def __call__(self, positions: Int[Array, " t"]) -> Float[Array, "t d"]:
        """Return the vectors of positions.

        Args:
            positions: whole numbers; rows of the table where it is trained, the formula beyond it and below 0.
        """
        computed = self.formula(positions)
        if self.weight is None:
            return computed
        inside = (positions >= 0) & (positions < self.max_len)
        return jnp.where(inside[:, None], self.weight[...][jnp.where(inside, positions, 0)], computed)
