"""The feed-forward part of a block: two maps with a GELU between, dense or as products of low rank.

    y = W₂ gelu(W₁ x + b₁) + b₂        compressed: W₁ = B₁ A₁, W₂ = B₂ A₂ through r channels

Symbols: x activations (T, D), W₁ (F, D), W₂ (D, F), A₁ (r, D), B₁ (F, r), A₂ (r, F), B₂ (D, r).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from so8t_jax.nn.lns_linear import LNSLinear

__all__ = ["FeedForward"]


class FeedForward(nnx.Module):
    """Two maps and a GELU; weights start as N(0, 1/inputs), those of the last map times ``outward``.

    Args:
        d_model: D.
        inner: F.
        rank: r; ``None`` for dense maps.
        sign_log: whether the maps are computed in sign–log numbers.
        outward: size of what the last map gives at the start, beside that of what it takes.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        inner: int,
        *,
        rank: int | None = None,
        sign_log: bool = False,
        outward: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kind = LNSLinear if sign_log else nnx.Linear

        def linear(inputs: int, outputs: int, gain: float, use_bias: bool = True) -> nnx.Linear:
            layer = kind(inputs, outputs, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
            noise = jax.random.normal(rngs.params(), (inputs, outputs), param_dtype)
            layer.kernel[...] = noise * (gain * inputs**-0.5)
            return layer

        def through(inputs: int, outputs: int, gain: float = 1.0) -> nnx.Module:
            if rank is None:
                return linear(inputs, outputs, gain)
            return nnx.Sequential(linear(inputs, rank, 1.0, use_bias=False), linear(rank, outputs, gain))

        self.up, self.down = through(d_model, inner), through(inner, d_model, outward)

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        """Return y.

        Args:
            x: activations.
        """
        return self.down(jax.nn.gelu(self.up(x), approximate=False))
