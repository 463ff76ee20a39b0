"""Layer normalisation with the variance of centred numbers, in whatever dtype the parameters have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

__all__ = ["LayerNorm"]


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm`` that does not lose digits to a large mean, and accepts strict dtype promotion.

    Args:
        width: number of channels.
        epsilon: added to the variance.
        param_dtype: of scale and bias.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, param_dtype: jnp.dtype = jnp.float32) -> None:
        super().__init__(width, epsilon=epsilon, param_dtype=param_dtype, use_fast_variance=False, rngs=nnx.Rngs(0))

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Return (x − mean)/√(variance + ε) · scale + bias.

        Args:
            x: activations.
        """
        # Flax widens half precision to float32 by promotion
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)
