"""The configuration of the Phase 2 model as far as it is mathematics: fields and defaults are production's.

What a field does is said in so8t_torch/models/configuration.py and in the layer that it builds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from so8t_jax.nn.model_config import ModelConfig

__all__ = ["Phase2Config"]


@dataclass(frozen=True)
class Phase2Config(ModelConfig):
    """Fields of the model; see the configuration of production for what each of them does."""

    model_type = "so8t_phase2"

    position_embedding: Literal["zeta", "none"] = "zeta"
    tie_word_embeddings: bool = False
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
    use_zeta_init: bool = False
    embedding: Literal["dense", "tt", "complex_tt"] = "dense"
