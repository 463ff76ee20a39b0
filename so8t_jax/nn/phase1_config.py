"""The configuration of the Phase 1 model as far as it is mathematics: fields and defaults are production's.

What a field does is said in so8t_torch/models/configuration.py and in the layer that it builds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from so8t_jax.nn.model_config import RUNNING, ModelConfig

__all__ = ["Phase1Config"]


@dataclass(frozen=True)
class Phase1Config(ModelConfig):
    """Fields of the model; see the configuration of production for what each of them does."""

    model_type = "so8t_phase1"
    running = (*RUNNING, "checkpoint_ar_ssm")

    ar_ssm_max_rank: int = 32
    ar_ssm_min_rank: int = 4
    ar_ssm_gate_hidden_dim: int | None = None
    ar_ssm_l1_regularization: float = 1e-3
    ar_ssm_core: Literal["operator", "compat"] = "operator"
    ar_ssm_decays: Literal["multi_scale", "uniform", "none"] = "multi_scale"
    ar_ssm_adaptive_time_step: bool = False
    ar_ssm_complex: bool = False
    ar_ssm_band_width: int = 3
    ar_ssm_gate_mode: Literal["soft", "ste", "gumbel"] = "soft"
    ar_ssm_gumbel_temperature: float = 1.0
    htt_enabled: bool = True
    htt_complex: bool = False
    ffn_rank: int | None = None
    ffn_compression_enabled: bool = True
    lns_enabled: bool = False

    @property
    def embedding(self) -> Literal["dense", "tt", "complex_tt"]:
        """The kind of embedding, named as in ``Phase2Config``."""
        return ("complex_tt" if self.htt_complex else "tt") if self.htt_enabled else "dense"
