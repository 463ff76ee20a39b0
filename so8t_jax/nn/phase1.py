"""The Phase 1 language model: blocks of an AR-SSM mixer and a feed-forward part of low rank.

    x ← x + mixer(LN₁(x))        x ← x + feed_forward(LN₂(x))

Symbols: ids (T,) of one row; a token at position 0 begins a document, and nothing crosses into it. A state has a fixed
size: mixer (R, D), or (R,) of the core ``compat``, with 2R for R where they rotate, and band (taps − 1, D).
Definition: as in evaluation, without dropout and without samples of gates.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from so8t_jax.nn import semiseparable
from so8t_jax.nn.feed_forward import FeedForward
from so8t_jax.nn.language_model import RecurrentForCausalLM, RecurrentModel, State
from so8t_jax.nn.layer_norm import LayerNorm
from so8t_jax.nn.phase1_config import Phase1Config

__all__ = ["Phase1Block", "Phase1ForCausalLM", "Phase1Model"]


class Phase1Block(nnx.Module):
    """One block.

    Args:
        config: of the model.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

    def __init__(self, config: Phase1Config, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        width, kind = config.d_model, {"param_dtype": param_dtype, "rngs": rngs}
        outward = config.initializer_range * (2 * config.n_layers) ** -0.5
        norm = partial(LayerNorm, width, epsilon=config.layer_norm_eps, param_dtype=param_dtype)
        self.mixer_norm, self.ffn_norm = norm(), norm()
        self.mixer = semiseparable.AdaptiveRankSemiseparableLayer(
            width,
            config.ar_ssm_max_rank,
            config.ar_ssm_min_rank,
            gate_hidden_dim=config.ar_ssm_gate_hidden_dim,
            l1_regularization=config.ar_ssm_l1_regularization,
            core=config.ar_ssm_core,
            decays=config.ar_ssm_decays,
            adaptive_time_step=config.ar_ssm_adaptive_time_step,
            rotating=config.ar_ssm_complex,
            band_width=config.ar_ssm_band_width,
            gate_mode=config.ar_ssm_gate_mode,
            gumbel_temperature=config.ar_ssm_gumbel_temperature,
            **kind,
        )
        out, taps = self.mixer.output_proj.kernel, self.mixer.taps
        out[...] = out[...] * outward
        taps[...] = outward * jax.random.normal(rngs.params(), taps.shape, param_dtype)
        rank = (config.ffn_rank or max(width // 16, 1)) if config.ffn_compression_enabled else None
        inner = config.ffn_dim or 4 * width
        self.ffn = FeedForward(width, inner, rank=rank, sign_log=config.lns_enabled, outward=outward, **kind)

    def __call__(
        self,
        x: Float[Array, "t d"],
        state: State | None,
        positions: Int[Array, " t"],
        padding_mask: Bool[Array, " t"] | None = None,
    ) -> tuple[Float[Array, "t d"], State, Float[Array, ""]]:
        """Return the tokens, the state after them, and what the gates add to a loss.

        Args:
            x: activations.
            state: what the block returned for the tokens before; none at the beginning.
            positions: of each token in its document.
            padding_mask: False where a token is padding.
        """
        begins = positions == 0 if padding_mask is None else (positions == 0) & padding_mask
        if state is not None:
            # where the first token that counts begins a document
            first = begins[0] if padding_mask is None else begins[jnp.argmax(padding_mask)]
            state = {name: jnp.where(first, 0.0, value) for name, value in state.items()}
        entering = None if state is None else semiseparable.State(**state)
        mixed, found = self.mixer(self.mixer_norm(x), entering, jnp.cumsum(begins), padding_mask=padding_mask)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), found["state"]._asdict(), found["gate_l1_loss"]


class Phase1Model(RecurrentModel):
    """Embedding, blocks and a last norm."""

    block_class = Phase1Block


class Phase1ForCausalLM(RecurrentForCausalLM):
    """The language model."""

    body_class = Phase1Model
