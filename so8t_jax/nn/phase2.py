"""The Phase 2 language model, token by token: a dissipative resolvent, a fast-weight memory, and a perceptron.

    x ← x + W₂ g(x̂),  x̂ = LN₁(x);   g the causal diagonal of the resolvent of a lossy chain, Γ its rates, and Γ^mem
    x ← x + memory(LN₂(x), Γ^mem)          keys of LN₂(x) filtered over a few tokens; judged where a chunk begins
    x ← x + W₄ gelu(W₃ LN₃(x))

Symbols: ids (T,) of one row; a token at position 0 begins a document, and nothing crosses into it. A state has a fixed
size: chain (C, 2), conv (taps − 1, D), memory (H, K, V), excess (H, 2), shift (C,), as far as a block has them.
Everything is what one token makes of the state that the token before left, so a row is a scan and pieces of a row are
the row; padding leaves the state as it is. Dropout is no part of the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from so8t_jax.nn.dissipative_bk import DissipativeBKLayer
from so8t_jax.nn.hebbian import DissipativeHebbianLayer
from so8t_jax.nn.language_model import RecurrentForCausalLM, RecurrentModel, State
from so8t_jax.nn.layer_norm import LayerNorm
from so8t_jax.nn.memory_resonance import MemoryResonanceLayer
from so8t_jax.nn.modulated_memory import MemoryState, ModulatedMemory, Selection
from so8t_jax.nn.phase2_config import Phase2Config
from so8t_jax.nn.short_convolution import ShortConvolution
from so8t_jax.ops import zeta

__all__ = ["Phase2Block", "Phase2ForCausalLM", "Phase2Model"]

SLOWEST_DECAY = 1e-4
"""Least decay rate of the memory per token."""


class Phase2Block(nnx.Module):
    """One block.

    Args:
        config: of the model.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

    def __init__(self, config: Phase2Config, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.channels = config, config.bk_channels or config.num_heads
        width, inner = config.d_model, config.ffn_dim or 4 * config.d_model
        outward = config.initializer_range * (2 * config.n_layers) ** -0.5
        norm = partial(LayerNorm, width, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        linear = partial(_linear, zeta_spectrum=config.use_zeta_init, param_dtype=param_dtype, rngs=rngs)
        self.bk_norm, self.ffn_norm = norm(), norm()
        self.memory_norm = norm() if config.hebbian_enabled else nnx.data(None)
        self.bk = DissipativeBKLayer(
            width,
            channels=self.channels,
            mode=config.bk_mode,
            hermitian=config.bk_hermitian,
            adaptive_hopping=config.bk_adaptive_hopping,
            memory_heads=config.num_heads if config.hebbian_enabled else 0,
            base_decay=config.base_decay,
            memory_base_decay=SLOWEST_DECAY / max(1.0, config.hebbian_dt),
            adaptive_decay=config.adaptive_decay,
            dt=config.hebbian_dt,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.bk_out = linear(2 * self.channels, width, outward)
        self.conv, self.memory = nnx.data(None), nnx.data(None)
        if config.hebbian_enabled:
            self.memory = _memory(config, self.channels, param_dtype, rngs)
            layer = self.memory.hebbian
            layer.out_proj.kernel[...] = layer.out_proj.kernel[...] * outward
            if config.short_conv > 1:
                self.conv = ShortConvolution(width, config.short_conv, param_dtype=param_dtype, rngs=rngs)
                layer.q_proj.kernel[...] = layer.k_proj.kernel[...]
        # the third is production's dropout, which has a number there
        gelu = partial(jax.nn.gelu, approximate=False)
        self.ffn = nnx.Sequential(linear(width, inner), gelu, _as_it_is, linear(inner, width, outward))

    def initial_state(self, dtype: jnp.dtype) -> State:
        """Return the state before the first token: zeros.

        Args:
            dtype: of the activations.
        """
        config = self.config
        sizes: dict[str, tuple[int, ...]] = {}
        if config.bk_mode == "causal":
            sizes["chain"] = (self.channels, 2)
        if self.conv is not None:
            sizes["conv"] = (config.short_conv - 1, config.d_model)
        if self.memory is not None:
            sizes["memory"] = (config.num_heads, config.head_dim, config.head_dim)
            if config.snr_enabled:
                sizes["excess"] = (config.num_heads, 2)
            if config.feedback_enabled:
                sizes["shift"] = (self.channels,)
        return {name: jnp.zeros(size, dtype) for name, size in sizes.items()}

    def __call__(
        self,
        x: Float[Array, "t d"],
        state: State | None,
        positions: Int[Array, " t"],
        padding_mask: Bool[Array, " t"] | None = None,
    ) -> tuple[Float[Array, "t d"], State, float]:
        """Return the tokens, the state after them, and what is added to a loss: nothing.

        Args:
            x: activations.
            state: what the block returned for the tokens before; none at the beginning.
            positions: of each token in its document.
            padding_mask: False where a token is padding; where later tokens enter, before or after all others.

        Raises:
            ValueError: a state, or a feedback, where later tokens enter.
        """
        start = self.initial_state(x.dtype) if state is None else state
        real = jnp.ones(len(x), bool) if padding_mask is None else padding_mask
        if self.config.bk_mode == "full":
            if state is not None or self.config.feedback_enabled:
                raise ValueError("expected no state and no feedback with bk_mode 'full', which reads the whole row")
            documents = jnp.where(real, jnp.cumsum(real & (positions == 0)), -1)
            mixed = self.bk(self.bk_norm(x), None, documents)
            x, rates = x + self.bk_out(mixed.features), mixed.potential.memory_gamma
            last, x = _scanned(self._remember, start, real, (x, rates, positions))
        else:
            last, x = _scanned(self._mix, start, real, (x, positions))
        return x + self.ffn(self.ffn_norm(x)), last, 0.0

    def _mix(self, state: State, x: Array, position: Array) -> tuple[State, Array]:
        """Return the state after a token, and the token after both mixers."""
        state = {name: jnp.where(position == 0, 0.0, value) for name, value in state.items()}
        if self.memory is not None and "shift" in state:
            turns = (position > 0) & (position % self.config.memory_chunk == 0)
            given_back = self.memory.hebbian.potential_feedback(self.memory.judge(state["memory"]).weights)
            state = state | {"shift": jnp.where(turns, given_back, state["shift"])}
        chain = jax.lax.complex(*state["chain"].T)
        shift = state["shift"][None] if "shift" in state else None
        mixed = self.bk(self.bk_norm(x[None]), chain, shift=shift)
        assert mixed.state is not None
        state = state | {"chain": jnp.stack([mixed.state.real, mixed.state.imag], -1)}
        return self._remember(state, x + self.bk_out(mixed.features)[0], mixed.potential.memory_gamma[0], position)

    def _remember(self, state: State, x: Array, rates: Array, position: Array) -> tuple[State, Array]:
        """Return the state after a token, and the token after the memory."""
        if self.memory is None:
            return state, x
        z = keyed = self.memory_norm(x)
        if self.conv is not None:
            before = jnp.where(position == 0, 0.0, state["conv"])
            keyed, inputs = self.conv.step(z, before)
            state = state | {"conv": inputs}
        excess = state["excess"] if "excess" in state else jnp.zeros((self.config.num_heads, 2), x.dtype)
        entered = self.memory.enter(MemoryState(state["memory"], excess), position)
        read, left = self.memory.step(z, keyed, rates, entered)
        state = state | {"memory": left.weights}
        if "excess" in state:
            state = state | {"excess": left.excess}
        return state, x + read


class Phase2Model(RecurrentModel):
    """Embedding, blocks and a last norm."""

    block_class = Phase2Block


class Phase2ForCausalLM(RecurrentForCausalLM):
    """The language model."""

    body_class = Phase2Model


def _scanned(
    step: Callable[..., tuple[State, Array]], state: State, real: Array, rows: tuple[Array, ...]
) -> tuple[State, Array]:
    """Return the state after the last token, and what each token became."""

    def masked(before: State, token: tuple[Array, ...]) -> tuple[State, Array]:
        counts, *inputs = token
        after, x = step(before, *inputs)
        return {name: jnp.where(counts, after[name], value) for name, value in before.items()}, x

    return jax.lax.scan(masked, state, (real, *rows))


def _as_it_is(x: Array) -> Array:
    return x


def _linear(
    inputs: int,
    outputs: int,
    gain: float = 1.0,
    *,
    zeta_spectrum: bool,
    param_dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Return a linear map whose outputs have ``gain`` times the size of its inputs."""
    initial = nnx.initializers.normal(gain * inputs**-0.5)
    layer = nnx.Linear(inputs, outputs, kernel_init=initial, param_dtype=param_dtype, rngs=rngs)
    if zeta_spectrum:
        rank = min(inputs, outputs)
        left, right = (jax.random.normal(rngs.params(), (size, rank), param_dtype) for size in (outputs, inputs))
        layer.kernel[...] = zeta.linear_init(left, right, gain=gain).T
    return layer


def _memory(config: Phase2Config, channels: int, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> ModulatedMemory:
    """Return the memory of a block."""
    layer = DissipativeHebbianLayer(
        config.d_model,
        config.num_heads,
        config.head_dim,
        eta=config.hebbian_eta,
        eta_mode=config.hebbian_eta_mode,
        rule=config.hebbian_rule,
        own_decay=False,
        dt=config.hebbian_dt,
        feedback_channels=channels if config.feedback_enabled else 0,
        param_dtype=param_dtype,
        rngs=rngs,
    )
    selection = Selection(config.snr_threshold, config.snr_gamma_boost, config.snr_eta_boost)
    sizes = (config.head_dim, config.num_heads, config.resonance_energy_threshold)
    return ModulatedMemory(
        layer,
        selection if config.snr_enabled else None,
        MemoryResonanceLayer(*sizes, param_dtype=param_dtype) if config.resonance_enabled else None,
        chunk=config.memory_chunk,
        adaptive_time_step=config.adaptive_time_step,
        param_dtype=param_dtype,
        rngs=rngs,
    )
