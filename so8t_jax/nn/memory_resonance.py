"""A layer that sees a fast-weight memory in the zeta basis and attenuates the modes without energy.

    S′ = Q_kᵀ S Q_v        S ↦ S − w Q_k ((1 − m) ∘ S′) Q_vᵀ,   w = σ(resonance_gate)

Symbols: S (H, K, V) the states of H heads; Q_k, Q_v orthonormal bases made of the zeta zeros; m the gate of each mode
by its relative energy; w how far each head goes, learned, 0.018 at the start.
Definition: so8t_jax/ops/resonance.py. Derivation: docs/math/resonance.md.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from so8t_jax.nn.weights import Buffer
from so8t_jax.ops import resonance

__all__ = ["MemoryResonanceLayer", "ZetaBasisTransform"]

CLOSED = -4.0
"""Start of the learned gate: σ(−4) = 0.018."""


class ZetaBasisTransform(nnx.Module):
    """The bases of both sides of a memory, which are saved and never trained.

    Args:
        key_dim: K.
        value_dim: V; K where it is left out.
        param_dtype: of the bases.
    """

    def __init__(self, key_dim: int, value_dim: int | None = None, *, param_dtype: jnp.dtype = jnp.float32) -> None:
        self.key_basis = Buffer(resonance.basis(key_dim).astype(param_dtype))
        self.value_basis = Buffer(resonance.basis(key_dim if value_dim is None else value_dim).astype(param_dtype))

    def __call__(self, state: Float[Array, "h k v"]) -> Float[Array, "h k v"]:
        """Return S′ = Q_kᵀ S Q_v.

        Args:
            state: S of every head.
        """
        return resonance.transform(state, self.key_basis[...], self.value_basis[...])


class MemoryResonanceLayer(nnx.Module):
    """The filter with a learned strength for every head; it starts close to the identity.

    Args:
        head_dim: K.
        num_heads: H.
        energy_threshold: relative energy at which a mode passes by half; the mean over modes is 1.
        value_dim: V; K where it is left out.
        temperature: width of the transition, positive.
        energy: ``"row"`` or ``"diag"``, as in ``ops.resonance``.
        hard: gates are 0 or 1 in value, with the gradient of the soft ones.
        gate_init: start of ``resonance_gate`` (H,).
        param_dtype: of parameters and bases.
    """

    def __init__(
        self,
        head_dim: int = 64,
        num_heads: int = 8,
        energy_threshold: float = 0.1,
        *,
        value_dim: int | None = None,
        temperature: float = 0.05,
        energy: Literal["row", "diag"] = "row",
        hard: bool = False,
        gate_init: float = CLOSED,
        param_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.energy_threshold, self.temperature, self.energy, self.hard = energy_threshold, temperature, energy, hard
        self.transform = ZetaBasisTransform(head_dim, value_dim, param_dtype=param_dtype)
        self.resonance_gate = nnx.Param(jnp.full(num_heads, gate_init, param_dtype))

    def __call__(self, state: Float[Array, "h k v"]) -> resonance.Resonance:
        """Return the filtered states, the energy and the gate of every mode.

        Args:
            state: S of every head, as it enters a chunk of tokens.
        """
        return resonance.resonance(
            state,
            self.transform.key_basis[...],
            self.transform.value_basis[...],
            jax.nn.sigmoid(self.resonance_gate[...]),
            threshold=self.energy_threshold,
            temperature=self.temperature,
            energy=self.energy,
            hard=self.hard,
        )
