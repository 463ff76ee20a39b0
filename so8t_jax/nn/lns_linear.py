"""The affine map y = x Wᵀ + b computed in sign–log numbers, with the derivative of the map.

    x_ik = s·exp(ℓ)     y_ij = Σ_k x_ik W_jk + 1·b_j     (mode "sum")
                        y_ij = the term of largest magnitude among x_ik W_jk and 1·b_j, the first of equals ("max")

Symbols: x activations (M, K), W weight (N, K), b bias (N,). The derivative is that of the map, also where a factor is
exactly zero, and that of the chosen term alone in mode "max".
Definition: so8t_jax/ops/lns.py. Derivation: docs/math/lns.md.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from so8t_jax.ops import lns

__all__ = ["LNSLinear"]


class LNSLinear(nnx.Linear):
    """A linear layer in sign–log numbers: parameters and initialisation are those of ``nnx.Linear``.

    Args:
        in_features: K.
        out_features: N.
        use_bias: whether b is one more term of every sum.
        mode: ``"sum"``, or ``"max"``: the term of largest magnitude stands for the sum.
        cancellation_guard: τ in [0, 1); where |y_ij| < τ Σ_k|terms| that output passes no gradient. 0 means never.
        param_dtype: of the parameters.
        rngs: source of the initial weights.

    Raises:
        ValueError: an unknown mode, or a guard out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool = True,
        *,
        mode: Literal["sum", "max"] = "sum",
        cancellation_guard: float = 0.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if mode not in ("sum", "max") or not 0.0 <= cancellation_guard < 1.0 or (mode == "max" and cancellation_guard):
            raise ValueError(
                "expected mode 'sum' with a cancellation_guard in [0, 1), or 'max' with none, got "
                f"{mode!r} and {cancellation_guard!r}"
            )
        super().__init__(in_features, out_features, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self.mode, self.cancellation_guard = mode, cancellation_guard

    def __call__(self, inputs: Float[Array, "m k"]) -> Float[Array, "m n"]:
        """Return x Wᵀ + b through sign–log numbers.

        Args:
            inputs: x.
        """
        rows, columns = inputs, self.kernel[...]
        if self.bias is not None:
            rows = jnp.concatenate([rows, jnp.ones((len(rows), 1), rows.dtype)], 1)
            columns = jnp.concatenate([columns, self.bias[...][None]])
        encoded = (*lns.encode(rows), *lns.encode(columns))
        value = jax.lax.stop_gradient(lns.decode(*lns.matmul(*encoded, mode=self.mode)))
        if self.mode == "max":
            chosen = (encoded[1][:, :, None] + encoded[3][None]).argmax(1)
            linear = jnp.take_along_axis(rows, chosen, 1) * jnp.take_along_axis(columns, chosen, 0)
        else:
            linear = rows @ columns
        if self.cancellation_guard:
            cancels = self.cancellation_guard * lns.condition_number(*encoded) > 1
            linear = jnp.where(cancels, jax.lax.stop_gradient(linear), linear)
        # linear − linear is exactly zero: the value is that of sign–log numbers, the slope that of the map
        return value + (linear - jax.lax.stop_gradient(linear))
