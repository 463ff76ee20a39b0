"""A linear layer with a rotation gate on its output, a low-rank update, or both.

    y = R(W x + b + s B A x),   R = R_cmd R_safe,   R_• = chart(A_•)

Symbols: x (T, in) of one example; y (T, out); A_safe, A_cmd (out/8, 28) coordinates in so(8), or (1, 28) when one
serves all blocks; A (r, in), B (out, r), s the scale of the update. A_• = 0 and B = 0 at the start.
Definition: so8t_jax/ops/rotation.py. Derivation: docs/math/rotation.md.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from so8t_jax.nn.weights import Buffer
from so8t_jax.ops import rotation

__all__ = ["SO8TLayer"]

CHARTS = {"exp": rotation.exponential, "cayley": rotation.cayley}
"""Charts by name, in the order of the number that is stored with the weights."""


class SO8TLayer(nnx.Module):
    """A linear layer with one adapter, named as production names its parameters.

    Args:
        in_features: width of x.
        out_features: width of y, a multiple of 8.
        chart: ``"exp"`` or ``"cayley"``.
        shared: one rotation for all blocks.
        train_gates: the factor that learns, ``"safe"`` or ``"cmd"``; the other is constant.
        rank: r of the low-rank update, 0 for none.
        scaling: s.
        use_bias: of the wrapped layer.
        adapter: name of the adapter.
        param_dtype: of the parameters.
        rngs: source of the initial weights.

    Raises:
        ValueError: an unknown chart or factor, or a width that eight does not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        chart: Literal["exp", "cayley"] = "exp",
        shared: bool = False,
        train_gates: Literal["safe", "cmd"] = "safe",
        rank: int = 0,
        scaling: float = 1.0,
        use_bias: bool = True,
        adapter: str = "default",
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if chart not in CHARTS or train_gates not in ("safe", "cmd") or out_features % 8:
            raise ValueError(
                f"expected a chart out of {', '.join(CHARTS)}, train_gates 'safe' or 'cmd' and a width divisible by 8, "
                f"got {chart!r}, {train_gates!r} and {out_features}"
            )
        self.chart, self.train_gates, self.scaling, self.adapter = chart, train_gates, scaling, adapter
        self.base_layer = nnx.Linear(in_features, out_features, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        blocks = 1 if shared else out_features // 8
        self.so8t_safe, self.so8t_cmd = (
            nnx.Dict({adapter: nnx.Param(jnp.zeros((blocks, 28), param_dtype))}) for _ in range(2)
        )
        self.so8t_chart = nnx.Dict({adapter: Buffer(jnp.asarray([list(CHARTS).index(chart)], jnp.uint8))})
        self.so8t_lora_A, self.so8t_lora_B = nnx.data(None), nnx.data(None)
        if rank:
            down = jax.random.uniform(rngs.params(), (rank, in_features), param_dtype, -1.0, 1.0) * in_features**-0.5
            self.so8t_lora_A = nnx.Dict({adapter: nnx.Param(down)})
            self.so8t_lora_B = nnx.Dict({adapter: nnx.Param(jnp.zeros((out_features, rank), param_dtype))})

    def gate_rotation(self) -> Float[Array, "blocks 8 8"]:
        """Return R = R_cmd R_safe; the factor that does not learn sends no gradient."""
        chart = jax.vmap(CHARTS[self.chart])
        safe, cmd = chart(self.so8t_safe[self.adapter][...]), chart(self.so8t_cmd[self.adapter][...])
        if self.train_gates == "safe":
            cmd = jax.lax.stop_gradient(cmd)
        else:
            safe = jax.lax.stop_gradient(safe)
        return jax.vmap(rotation.compose)(safe, cmd)

    def __call__(self, x: Float[Array, "t inputs"]) -> Float[Array, "t outputs"]:
        """Return R(W x + b + s B A x).

        Args:
            x: activations.
        """
        y = self.base_layer(x)
        if self.so8t_lora_A is not None:
            down, up = self.so8t_lora_A[self.adapter][...], self.so8t_lora_B[self.adapter][...]
            y = y + self.scaling * (x @ down.T @ up.T)
        R = self.gate_rotation().astype(y.dtype)
        return jax.vmap(lambda row: rotation.apply(R, row))(y)
