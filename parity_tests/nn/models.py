"""Declarations of whole models: logits, the state after the last token, and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flax import nnx

from parity_tests.harness import Budget, OpPair
from parity_tests.harness.pair import Size
from parity_tests.nn.twin import twin
from so8t_jax.nn import phase2 as definition
from so8t_jax.nn.phase2_config import Phase2Config as DefinedConfig
from so8t_torch.models.configuration import Phase2Config
from so8t_torch.models.phase2 import Phase2ForCausalLM, Phase2Model
from so8t_torch.models.states import read_states

SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "d_model": 8,
    "n_layers": 1,
    "n_seq": 6,
    "num_heads": 2,
    "head_dim": 4,
    "bk_channels": 3,
    "ffn_dim": 12,
    "memory_chunk": 4,
    "htt_rank": 2,
    "initializer_range": 0.5,
}
SIZES = ({"t": 13},)
BUDGET = Budget(forward=128, gradient=1024)
"""Measured: 30 and 190 eps in the worst entry. Reads and norms divide by their size, one after the other."""


def packed(generator: np.random.Generator, size: Size) -> tuple[Any, ...]:
    """Draw ids, and positions that begin again where a second document does."""
    ids = generator.integers(0, SMALL["vocab_size"], size["t"])
    start = int(generator.integers(1, size["t"]))
    return ids, np.concatenate([np.arange(start), np.arange(size["t"] - start)])


def language_model(name: str, **options: Any) -> OpPair:
    """Declare a language model."""
    fields = SMALL | options

    def call(model: Any, ids: Any, positions: Any) -> Any:
        found = model(input_ids=ids, position_ids=positions, use_cache=True)
        blocks = enumerate(model.model.layers)
        states = [read_states(found.past_key_values, i, block.state_names, len(ids)) for i, block in blocks]
        return found.logits, states

    return twin(
        f"nn.phase2:{name}",
        layer=lambda dtype: Phase2ForCausalLM(Phase2Config(**fields)).to(dtype),
        definition=lambda dtype: definition.Phase2ForCausalLM(
            DefinedConfig(**fields), param_dtype=dtype, rngs=nnx.Rngs(0)
        ),
        call=call,
        defined=lambda model, ids, positions: model(ids, None, positions),
        inputs={"packed": packed},
        sizes=SIZES,
        wrt=(),
        budget=BUDGET,
    )


def encoder() -> OpPair:
    """Declare the body that sees later tokens."""
    fields = SMALL | {"is_encoder": True, "bk_mode": "full", "embedding": "complex_tt", "hebbian_enabled": False}

    def layer(dtype: torch.dtype) -> Phase2Model:
        return Phase2Model(Phase2Config(**fields)).to(dtype)

    return twin(
        "nn.phase2:encoder",
        layer=layer,
        definition=lambda dtype: definition.Phase2Model(DefinedConfig(**fields), param_dtype=dtype, rngs=nnx.Rngs(0)),
        call=lambda model, ids, positions: model(input_ids=ids, position_ids=positions).last_hidden_state,
        defined=lambda model, ids, positions: model(ids, None, positions)[0],
        inputs={"packed": packed},
        sizes=SIZES,
        wrt=(),
        budget=BUDGET,
    )


MODELS = (
    language_model("default"),
    language_model(
        "feedback",
        feedback_enabled=True,
        tie_word_embeddings=True,
        bk_adaptive_hopping=True,
        bk_hermitian=False,
        hebbian_eta_mode="token",
        zeta_embedding_trainable=True,
    ),
    language_model(
        "delta",
        hebbian_rule="delta",
        adaptive_time_step=True,
        adaptive_decay=False,
        hebbian_eta_mode="head",
        hebbian_dt=0.5,
        snr_enabled=False,
        short_conv=0,
        embedding="tt",
        tie_word_embeddings=True,
    ),
    encoder(),
)
