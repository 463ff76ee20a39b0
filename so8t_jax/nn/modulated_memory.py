"""A fast-weight memory that is judged where a chunk of tokens begins: noise is forgotten faster, faint modes fade.

    S = state that enters a chunk of C tokens of a document, counted from its first token; the first chunk has S = 0
    Γ_t ↦ Γ_t (1 + e^Γ),  η_t ↦ η_t (1 + e^η)  for its tokens     (e from the signal-to-noise ratios of S; 0 for S = 0)
    S ↦ resonance(S)                                               before the first of them
    adaptive time steps: Γ_t ↦ Γ_t δ_t,  η_t ↦ η_t δ_t,  δ_t = softplus(affine in x_t)

Symbols: S (H, K, V); Γ decay and η strength of a token (H,); e ≥ 0 excesses (H,). Here a token comes after another,
and where a chunk begins follows from its position in the document.
Definitions: so8t_jax/ops/hebbian.py, snr_filter.py, resonance.py. Derivation: docs/math/hebbian.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from so8t_jax.nn.hebbian import DissipativeHebbianLayer
from so8t_jax.nn.memory_resonance import MemoryResonanceLayer
from so8t_jax.ops import hebbian, snr_filter

__all__ = ["MemoryState", "ModulatedMemory", "Selection"]


class Selection(NamedTuple):
    """Options of ``ops.snr_filter``: where entries count half as signal, and factors of rates and strengths."""

    threshold: float = 2.0
    gamma_boost: float = 2.0
    eta_boost: float = 1.5


class MemoryState(NamedTuple):
    """What tokens leave for later ones; zeros at the beginning of a document.

    Attributes:
        weights: S (H, K, V).
        excess: e^Γ and e^η of the chunk that is under way (H, 2).
    """

    weights: Array
    excess: Array


class ModulatedMemory(nnx.Module):
    """A memory whose rates, strengths and modes depend on the state that enters a chunk.

    Args:
        layer: the memory; its rates come with every call.
        selection: judges noise; none for rates as they are.
        resonance: attenuates modes; none for states as they are.
        chunk: C.
        adaptive_time_step: tokens have time steps of their own.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        layer: DissipativeHebbianLayer,
        selection: Selection | None = None,
        resonance: MemoryResonanceLayer | None = None,
        *,
        chunk: int = 128,
        adaptive_time_step: bool = False,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.hebbian, self.selection, self.resonance, self.chunk = layer, selection, nnx.data(resonance), chunk
        self.time_step = nnx.data(None)
        if adaptive_time_step:
            width, heads = layer.d_model, layer.num_heads
            initial = nnx.initializers.normal(0.1 * width**-0.5)
            self.time_step = nnx.Linear(width, heads, kernel_init=initial, param_dtype=param_dtype, rngs=rngs)
            self.time_step.bias[...] = jnp.full(heads, math.log(math.expm1(1.0)), param_dtype)

    def enter(self, state: MemoryState, position: Int[Array, ""]) -> MemoryState:
        """Return the state that a token works with.

        Args:
            state: what the token before left.
            position: of the token in its document.
        """
        judged = self.judge(state.weights)
        begins, turns = position == 0, position % self.chunk == 0
        return MemoryState(
            *(
                jnp.where(begins, 0.0, jnp.where(turns, new, as_it_is))
                for new, as_it_is in zip(judged, state, strict=True)
            )
        )

    def judge(self, weights: Float[Array, "h k v"]) -> MemoryState:
        """Return the state that a chunk begins with instead of this one, and its excesses.

        Args:
            weights: S.
        """
        excess = jnp.zeros((len(weights), 2), weights.dtype)
        if self.selection is not None:
            one = jnp.ones((1, len(weights)), weights.dtype)
            found = snr_filter.snr_filter(weights, one, one, **self.selection._asdict())
            weights, excess = found.state, jnp.stack([found.decay[0], found.eta[0]], -1) - 1.0
        if self.resonance is not None:
            weights = self.resonance(weights).state
        return MemoryState(weights, excess)

    def step(
        self, x: Float[Array, " d"], keyed: Float[Array, " d"], gamma: Float[Array, " h"], state: MemoryState
    ) -> tuple[Float[Array, " d"], MemoryState]:
        """Return one mixed token, and the state that it leaves.

        Args:
            x: activations of the token.
            keyed: what its key is made of.
            gamma: its decay rates per unit of time.
            state: what ``enter`` returned.
        """
        q, k, v, decay, eta = (part[0] for part in self.hebbian.tokens(x[None], gamma=gamma[None], keyed=keyed[None]))
        if self.time_step is not None:
            delta = jax.nn.softplus(self.time_step(x))
            decay, eta = decay * delta, eta * delta
        decay, eta = decay * (1.0 + state.excess[:, 0]), eta * (1.0 + state.excess[:, 1])
        y, weights = hebbian.step(state.weights, q, k, v, decay, eta, **self.hebbian.options())
        return self.hebbian.out(y[None])[0], state._replace(weights=weights)
