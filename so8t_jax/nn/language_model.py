"""What the two language models share: embedding, blocks with states of fixed size, last norm, and head.

    x = E[ids] + P[positions],   x ← block(x),   logits = head(norm(x))

Symbols: ids (T,) of one row; a token at position 0 begins a document, and nothing crosses into it. A token whose
``padding_mask`` is False is padding: whatever stands there, no other token and no state depends on it.
A block is called as ``block(x, state, positions, padding_mask) -> (x, state, aux_loss)``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from so8t_jax.nn.layer_norm import LayerNorm
from so8t_jax.nn.tensor_train_embedding import HolographicTTEmbedding
from so8t_jax.nn.zeta_embedding import ZetaEmbedding

__all__ = ["RecurrentForCausalLM", "RecurrentModel", "State"]

State = dict[str, Array]


class RecurrentModel(nnx.Module):
    """Embedding, blocks and a last norm; a subclass names the class of its blocks.

    Args:
        config: of the model.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

    block_class: ClassVar[Any]

    def __init__(self, config: Any, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = _token_embedding(config, param_dtype, rngs)
        self.embed_positions = nnx.data(None)
        if config.position_embedding == "zeta":
            scale = config.position_scale * math.sqrt(2.0) * config.initializer_range
            trained = config.zeta_embedding_trainable
            self.embed_positions = ZetaEmbedding(config.n_seq, config.d_model, trained, scale, param_dtype=param_dtype)
        self.layers = nnx.List(
            [self.block_class(config, param_dtype=param_dtype, rngs=rngs) for _ in range(config.n_layers)]
        )
        self.norm = LayerNorm(config.d_model, epsilon=config.layer_norm_eps, param_dtype=param_dtype)

    def __call__(
        self,
        ids: Int[Array, " t"],
        state: list[State] | None = None,
        positions: Int[Array, " t"] | None = None,
        padding_mask: Bool[Array, " t"] | None = None,
    ) -> tuple[Float[Array, "t d"], list[State]]:
        """Return hidden states, and the state of every block after the last token.

        Args:
            ids: of the tokens.
            state: what the call on the tokens before returned; none at the beginning.
            positions: of each token in its document; 0, 1, 2, … without.
            padding_mask: False where a token is padding, which has no position.
        """
        return self._run(ids, state, positions, padding_mask)[:2]

    def aux_loss(
        self,
        ids: Int[Array, " t"],
        state: list[State] | None = None,
        positions: Int[Array, " t"] | None = None,
        padding_mask: Bool[Array, " t"] | None = None,
    ) -> Float[Array, ""]:
        """Return what the blocks add to a loss.

        Args:
            ids: as for a call, like the others.
            state: see there.
            positions: see there.
            padding_mask: see there.
        """
        return self._run(ids, state, positions, padding_mask)[2]

    def _run(
        self, ids: Array, state: list[State] | None, positions: Array | None, padding_mask: Array | None
    ) -> tuple[Array, list[State], Array]:
        """Return hidden states, states, and the sum of what the blocks add to the loss."""
        if positions is None:
            counted = jnp.ones(len(ids), int) if padding_mask is None else padding_mask.astype(int)
            positions = jnp.cumsum(counted) - 1
        dense = isinstance(self.embed_tokens, nnx.Embed)
        x = self.embed_tokens.embedding[...][ids] if dense else self.embed_tokens(ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions).astype(x.dtype)
        last, added = [], jnp.zeros((), x.dtype)
        for number, block in enumerate(self.layers):
            x, after, aux = block(x, None if state is None else state[number], positions, padding_mask)
            last.append(after)
            added = added + aux
        return self.norm(x), last, added


class RecurrentForCausalLM(nnx.Module):
    """The language model; a subclass names the class of its body.

    Args:
        config: of the model.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

    body_class: ClassVar[Any]

    def __init__(self, config: Any, *, param_dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = self.body_class(config, param_dtype=param_dtype, rngs=rngs)
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            initial = nnx.initializers.normal(config.initializer_range)
            kind = {"use_bias": False, "kernel_init": initial, "param_dtype": param_dtype}
            self.lm_head = nnx.Linear(config.d_model, config.vocab_size, **kind, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, " t"],
        state: list[State] | None = None,
        positions: Int[Array, " t"] | None = None,
        padding_mask: Bool[Array, " t"] | None = None,
    ) -> tuple[Float[Array, "t v"], list[State]]:
        """Return the logits of the next tokens, and the state of every block after the last token.

        Args:
            ids: as for the body, like the others.
            state: see there.
            positions: see there.
            padding_mask: see there.
        """
        hidden, last = self.model(ids, state, positions, padding_mask)
        if self.lm_head is not None:
            return self.lm_head(hidden), last
        table = self.model.embed_tokens
        return (hidden @ table.embedding[...].T if isinstance(table, nnx.Embed) else table.logits(hidden)), last


def _token_embedding(config: Any, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """Return the embedding that the configuration names."""
    if config.embedding == "dense":
        initial = nnx.initializers.normal(config.initializer_range)
        return nnx.Embed(config.vocab_size, config.d_model, embedding_init=initial, param_dtype=param_dtype, rngs=rngs)
    whole = config.embedding == "complex_tt"
    return HolographicTTEmbedding(
        config.vocab_size,
        config.d_model // 2 if whole else config.d_model,
        config.htt_rank,
        config.htt_num_cores,
        config.htt_phase_encoding,
        init_scale=config.initializer_range,
        complex_cores=whole,
        emit="pair" if whole else "real",
        param_dtype=param_dtype,
        rngs=rngs,
    )
