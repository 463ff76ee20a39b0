"""Potentials and decay rates of the tokens of a chain, from one projection.

    v, Γ, Γ^mem = affine in x_t,  the rates through γ + softplus(·)      V_t = v_t − iΓ_t

Symbols: x activations (N, D) of one example; K channels, each a chain of its own over the tokens; v potentials and
Γ ≥ γ decay rates (N, K); Γ^mem decay rates (N, M) per unit of time for M heads of a memory; γ the floors.
Derivation: docs/math/tridiagonal.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float

__all__ = ["NonHermitianPotential", "Potential", "half_life_rates", "softplus_inverse"]

INITIAL_DECAY = 0.05
"""Γ of the chains at the start."""
HALF_LIVES = (4.0, 4096.0)
"""Shortest and longest half-life of the memory's heads at the start, in tokens."""


class Potential(NamedTuple):
    """What a potential gives for each token.

    Attributes:
        v: real part (N, K).
        gamma: decay rates Γ of the chains (N, K).
        memory_gamma: decay rates of the memory's heads (N, M).
    """

    v: Float[Array, "n k"]
    gamma: Float[Array, "n k"]
    memory_gamma: Float[Array, "n m"]

    @property
    def values(self) -> Complex[Array, "n k"]:
        """V = v − iΓ."""
        return jax.lax.complex(self.v, -self.gamma)


class NonHermitianPotential(nnx.Module):
    """Potentials and decay rates of each token from one projection with bias.

    Args:
        d_model: D.
        channels: K.
        memory_heads: M, 0 for none.
        base_decay: γ of the chains, the least rate.
        memory_base_decay: γ of the memory's heads.
        chain_decay: chains lose something; without it Γ = 0, and the rates are those of the memory alone.
        adaptive_decay: rates depend on the token; without it Γ is ``base_decay`` and Γ^mem is trained per head.
        dt: time from token to token, for half-lives.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        *,
        channels: int = 1,
        memory_heads: int = 0,
        base_decay: float = 1e-3,
        memory_base_decay: float = 1e-4,
        chain_decay: bool = True,
        adaptive_decay: bool = True,
        dt: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.channels, self.memory_heads = channels, memory_heads
        self.chain_decay, self.adaptive_decay = chain_decay, adaptive_decay
        self.base_decay, self.memory_base_decay = base_decay, memory_base_decay
        self.chain_rates = channels if adaptive_decay and chain_decay else 0
        memory = [softplus_inverse(rate - memory_base_decay) for rate in half_life_rates(memory_heads, HALF_LIVES, dt)]
        trained = memory_heads and not adaptive_decay
        self.memory_bias = nnx.Param(jnp.asarray(memory, param_dtype)) if trained else nnx.data(None)
        chains = [softplus_inverse(INITIAL_DECAY - base_decay)] * self.chain_rates
        bias = jnp.asarray([0.0] * channels + chains + ([] if trained else memory), param_dtype)
        self.projection = nnx.Linear(d_model, len(bias), param_dtype=param_dtype, rngs=rngs)
        scale = jnp.where(jnp.arange(len(bias)) < channels, 1.0, 0.1) * d_model**-0.5
        noise = jax.random.normal(rngs.params(), (d_model, len(bias)), param_dtype)
        self.projection.kernel[...] = noise * scale.astype(param_dtype)[None]
        self.projection.bias[...] = bias

    def __call__(self, x: Float[Array, "n d"]) -> Potential:
        """Return v, Γ and Γ^mem of each token.

        Args:
            x: activations.
        """
        raw = self.projection(x)
        v, rates = raw[:, : self.channels], raw[:, self.channels :]
        gamma, memory = rates[:, : self.chain_rates], rates[:, self.chain_rates :]
        if self.chain_rates:
            gamma = self.base_decay + jax.nn.softplus(gamma)
        else:
            gamma = jnp.full_like(v, self.base_decay if self.chain_decay else 0.0)
        if self.memory_bias is not None:
            memory = jnp.broadcast_to(self.memory_bias[...], (len(x), self.memory_heads))
        return Potential(v, gamma, self.memory_base_decay + jax.nn.softplus(memory))


def half_life_rates(heads: int, half_lives: tuple[float, float], dt: float) -> list[float]:
    """Return ln 2/(half-life dt) for half-lives even in their logarithm, longest last.

    Args:
        heads: how many.
        half_lives: shortest and longest, in tokens.
        dt: time from token to token.
    """
    low, high = map(math.log, half_lives)
    share = [head / max(heads - 1, 1) for head in range(heads)]
    return [math.log(2.0) / (math.exp(low + part * (high - low)) * dt) for part in share]


def softplus_inverse(y: float) -> float:
    """Return x with log(1 + eˣ) = y > 0."""
    return y + math.log(-math.expm1(-y))
