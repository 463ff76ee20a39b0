"""A causal filter of a few taps for each channel: what the keys of a memory are made of.

    y_t = Σ_j taps_j ⊙ x_{t−j},   j = 0 … K − 1

Symbols: x activations of one token (D,); taps (K, D); the state is the last K − 1 inputs, the latest last.
Derivation: docs/math/semiseparable.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

__all__ = ["ShortConvolution"]


class ShortConvolution(nnx.Module):
    """The filter; it starts as a step back by one token.

    Args:
        d_model: D.
        taps: K, at least 2.
        param_dtype: of the taps.
        rngs: source of the initial weights.
    """

    def __init__(self, d_model: int, taps: int = 4, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        noise = 0.02 * jax.random.normal(rngs.params(), (taps, d_model), param_dtype)
        self.taps = nnx.Param(noise.at[1].set(1.0))

    def step(self, x: Float[Array, " d"], state: Array) -> tuple[Float[Array, " d"], Array]:
        """Return the filtered token, and the last K − 1 inputs.

        Args:
            x: activations of one token.
            state: the K − 1 inputs before it, zeros where a document begins.
        """
        inputs = jnp.concatenate([state, x[None]])
        return (self.taps[...][::-1] * inputs).sum(0), inputs[1:]
