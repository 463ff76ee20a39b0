"""The configuration of the Phase 2 model as far as it is mathematics: fields and defaults are production's.

What a field does is said in so8t_torch/models/configuration.py and in the layer that it builds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["RUNNING", "Phase2Config"]

RUNNING = ("backend", "bos_token_id", "dropout", "eos_token_id", "pad_token_id", "use_cache")
"""Fields of production that change how a model runs, trains or generates, and not what it computes."""
LIBRARY = (
    *(
        "_name_or_path",
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
    ),
    *("label2id", "layer_types", "model_type", "output_attentions", "output_hidden_states", "problem_type"),
    *("return_dict", "tokenizer_class", "torch_dtype", "transformers_version"),
)
"""Keys that transformers writes beside the fields."""


@dataclass(frozen=True)
class Phase2Config:
    """Fields of the model; see the configuration of production for what each of them does."""

    vocab_size: int = 50257
    d_model: int = 512
    n_layers: int = 6
    n_seq: int = 1024
    ffn_dim: int | None = None
    layer_norm_eps: float = 1e-5
    position_embedding: Literal["zeta", "none"] = "zeta"
    position_scale: float = 0.05
    zeta_embedding_trainable: bool = False
    htt_rank: int = 16
    htt_num_cores: int = 2
    htt_phase_encoding: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    num_heads: int = 8
    head_dim: int = 64
    bk_channels: int | None = None
    bk_mode: Literal["causal", "full"] = "causal"
    bk_hermitian: bool = True
    bk_adaptive_hopping: bool = False
    is_encoder: bool = False
    base_decay: float = 1e-3
    adaptive_decay: bool = True
    hebbian_enabled: bool = True
    hebbian_eta: float = 0.1
    hebbian_eta_mode: Literal["constant", "head", "token"] = "constant"
    hebbian_rule: Literal["hebb", "delta"] = "hebb"
    hebbian_dt: float = 1.0
    adaptive_time_step: bool = False
    short_conv: int = 4
    memory_chunk: int = 128
    snr_enabled: bool = True
    snr_threshold: float = 2.0
    snr_gamma_boost: float = 2.0
    snr_eta_boost: float = 1.5
    resonance_enabled: bool = True
    resonance_energy_threshold: float = 0.1
    feedback_enabled: bool = False
    use_zeta_init: bool = True
    embedding: Literal["dense", "tt", "complex_tt"] = "dense"

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Phase2Config:
        """Return the configuration that a ``config.json`` holds.

        Args:
            tree: its content.

        Raises:
            ValueError: it is of another model, or has a key that is no field here.
        """
        kind = tree.get("model_type", "so8t_phase2")
        if kind != "so8t_phase2":
            raise ValueError(f"expected the configuration of a model 'so8t_phase2', got {kind!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(tree.keys() - names - {*RUNNING, *LIBRARY})
        if unknown:
            raise ValueError(f"the definition of the Phase 2 model has no field {', '.join(unknown)}")
        return cls(**{name: value for name, value in tree.items() if name in names})
