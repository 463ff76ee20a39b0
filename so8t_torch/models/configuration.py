"""Configurations of the two language models: every field changes the model, and a wrong one is refused at once.

Targets for memory, speed and quality are no fields: they are what a preset aims at (so8t_torch/models/presets.py).
What a field does is said in the layer that it builds: so8t_torch/nn.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from so8t_torch.models.settings import RecurrentConfig, choice, flag, number, optional, setting, whole
from so8t_torch.nn.non_hermitian_potential import INITIAL_DECAY

__all__ = ["Phase1Config", "Phase2Config"]

_TARGET = "it is what a preset aims at and changes no model; see read_preset"
_MEASURED = "nothing is bounded by it; ask a forward pass for diagnostics='summary'"
_TILES = "the operation chooses its tiles for each shape and device"
_CHECKPOINTING = "call model.activation_checkpointing_enable(), or set it for the training run"


class Phase1Config(RecurrentConfig):
    """Of the model with an embedding as a tensor train, AR-SSM mixers and low-rank feed-forward parts.

    Args:
        ar_ssm_max_rank: rank channels of a mixer.
        ar_ssm_min_rank: channels that are open at every token.
        ar_ssm_gate_hidden_dim: width inside the gate; max(D/4, ar_ssm_min_rank) by default.
        ar_ssm_l1_regularization: weight of the mean gate in the loss.
        ar_ssm_core: ``"operator"`` or ``"compat"``.
        ar_ssm_decays: ``"multi_scale"``, ``"uniform"`` or ``"none"``.
        ar_ssm_adaptive_time_step: the step of time depends on the token.
        ar_ssm_complex: states rotate as they decay.
        ar_ssm_band_width: taps of the causal band.
        ar_ssm_gate_mode: ``"soft"``, ``"ste"`` or ``"gumbel"``.
        ar_ssm_gumbel_temperature: of the samples in mode ``"gumbel"``.
        checkpoint_ar_ssm: mixers are computed again in the backward pass instead of kept; gradient checkpointing does
            so with whole blocks, and has no need of it.
        htt_enabled: the embedding is a tensor train, and not a table.
        htt_complex: its cores are complex; real and imaginary parts of D/2 numbers each are the D channels.
        ffn_rank: inner rank of the feed-forward parts; D/16 by default.
        ffn_compression_enabled: both maps of a feed-forward part are products of rank ``ffn_rank``.
        lns_enabled: linear maps of feed-forward parts are computed in sign–log numbers.
    """

    model_type = "so8t_phase1"
    moved: ClassVar[dict[str, str]] = {
        "ar_ssm_enabled": "every block has a mixer; for a model without, take ar_ssm_max_rank 1",
        "ar_ssm_use_fused_scan": "the backend of the recurrence is backend",
        "htt_compression_target": "htt_rank sets the compression, print_preset_comparison computes it",
        "lns_block_size_m": _TILES,
        "lns_block_size_n": _TILES,
        "lns_block_size_k": _TILES,
        "lns_use_max_log": "LNSLinear(mode='max') has it; a model is trained in mode 'sum'",
        "stability_monitoring_enabled": _MEASURED,
        "stability_threshold": _MEASURED,
        "schatten_s1_bound": _MEASURED,
        "schatten_s2_bound": _MEASURED,
        "gradient_norm_threshold": "clipping belongs to the training run",
        "use_gradient_checkpointing": _CHECKPOINTING,
        "checkpoint_htt": "an embedding keeps ids alone for its backward pass",
        "target_vram_gb": _TARGET,
        "target_ppl_degradation": _TARGET,
        "target_speedup": _TARGET,
    }

    ar_ssm_max_rank: int = setting(32, whole())
    ar_ssm_min_rank: int = setting(4, whole())
    ar_ssm_gate_hidden_dim: int | None = setting(None, optional(whole()))
    ar_ssm_l1_regularization: float = setting(1e-3, number(zero=True))
    ar_ssm_core: Literal["operator", "compat"] = setting("operator", choice("operator", "compat"))
    ar_ssm_decays: Literal["multi_scale", "uniform", "none"] = setting(
        "multi_scale", choice("multi_scale", "uniform", "none")
    )
    ar_ssm_adaptive_time_step: bool = setting(False, flag)
    ar_ssm_complex: bool = setting(False, flag)
    ar_ssm_band_width: int = setting(3, whole())
    ar_ssm_gate_mode: Literal["soft", "ste", "gumbel"] = setting("soft", choice("soft", "ste", "gumbel"))
    ar_ssm_gumbel_temperature: float = setting(1.0, number())
    checkpoint_ar_ssm: bool = setting(False, flag)
    htt_enabled: bool = setting(True, flag)
    htt_complex: bool = setting(False, flag)
    ffn_rank: int | None = setting(None, optional(whole()))
    ffn_compression_enabled: bool = setting(True, flag)
    lns_enabled: bool = setting(False, flag)

    @property
    def embedding(self) -> Literal["dense", "tt", "complex_tt"]:
        """The kind of embedding, named as in ``Phase2Config``."""
        return ("complex_tt" if self.htt_complex else "tt") if self.htt_enabled else "dense"

    def _contradictions(self, sound: set[str]) -> list[str]:
        found = super()._contradictions(sound)
        if {"ar_ssm_max_rank", "ar_ssm_min_rank"} <= sound and self.ar_ssm_max_rank < self.ar_ssm_min_rank:
            found.append(
                f"ar_ssm_max_rank must be ≥ ar_ssm_min_rank {self.ar_ssm_min_rank}, got {self.ar_ssm_max_rank}"
            )
        if self.ar_ssm_decays == "none":
            names = [name for name in ("ar_ssm_adaptive_time_step", "ar_ssm_complex") if getattr(self, name) is True]
            found += [f"{name} needs decays, got ar_ssm_decays 'none'" for name in names]
        if self.htt_complex is True and self.htt_enabled is False:
            found.append("htt_complex needs htt_enabled, got a table")
        if self.ffn_rank is not None and self.ffn_compression_enabled is False:
            found.append(f"ffn_rank needs ffn_compression_enabled, got {self.ffn_rank} without it")
        return found


class Phase2Config(RecurrentConfig):
    """Of the model whose blocks are a dissipative resolvent, a fast-weight memory and a feed-forward part.

    Args:
        num_heads: heads H of the memory.
        head_dim: keys and values of a head.
        bk_channels: chains of the resolvent; H by default.
        bk_mode: ``"causal"``; ``"full"`` sees later tokens and is for encoders.
        bk_hermitian: hopping of the chains is symmetric.
        bk_adaptive_hopping: hopping depends on the token.
        is_encoder: the model gives hidden states alone and may see later tokens.
        base_decay: least decay rate of the chains.
        adaptive_decay: rates depend on the token.
        hebbian_enabled: without it the blocks have no memory: the ablation.
        hebbian_eta: strength of writing.
        hebbian_eta_mode: ``"constant"``, ``"head"`` or ``"token"``.
        hebbian_rule: ``"hebb"`` or ``"delta"``.
        hebbian_dt: time from token to token, or what it starts from.
        adaptive_time_step: it depends on token and head.
        short_conv: taps of the causal filter that keys are made of; 0 or 1 for none.
        memory_chunk: tokens that share what the next options make of the state that enters them, a power of two.
        snr_enabled: noise is forgotten faster, and signal written more strongly.
        snr_threshold: ratio of signal to noise where the two meet.
        snr_gamma_boost: factor of the rates of a head that is all noise.
        snr_eta_boost: factor of the strength of a head that is all signal.
        resonance_enabled: modes of the zeta basis without energy are attenuated.
        resonance_energy_threshold: energy of a mode, relative to the mean, where attenuation begins.
        feedback_enabled: the memory adds to the potential of the chains.
        use_zeta_init: linear maps start with singular values that fall like the inverse zeta zeros, and learn slower.
        embedding: ``"dense"``, ``"tt"`` (a tensor train) or ``"complex_tt"`` (of complex cores).
    """

    model_type = "so8t_phase2"
    attribute_map: ClassVar[dict[str, str]] = RecurrentConfig.attribute_map | {"num_attention_heads": "num_heads"}
    moved: ClassVar[dict[str, str]] = {
        "phase1_config": "give the model to convert_phase1_to_phase2",
        "use_triton_bk": "use backend 'triton' or 'eager'",
        "triton_block_size": _TILES,
        "schatten_p": _MEASURED,
        "stability_threshold": _MEASURED,
        "gamma_adjust_rate": "rates are learned, adaptive_decay lets them depend on tokens",
        "energy_monitor_enabled": "ask a forward pass for diagnostics='summary'",
        "target_vram_gb": _TARGET,
        "target_speedup_triton": _TARGET,
        "chunk_size": "the tokens that share the memory's options are memory_chunk",
    }

    position_embedding: Literal["zeta", "none"] = setting("zeta", choice("zeta", "none"))
    tie_word_embeddings: bool = setting(False, flag)
    num_heads: int = setting(8, whole())
    head_dim: int = setting(64, whole())
    bk_channels: int | None = setting(None, optional(whole()))
    bk_mode: Literal["causal", "full"] = setting("causal", choice("causal", "full"))
    bk_hermitian: bool = setting(True, flag)
    bk_adaptive_hopping: bool = setting(False, flag)
    is_encoder: bool = setting(False, flag)
    base_decay: float = setting(1e-3, number())
    adaptive_decay: bool = setting(True, flag)
    hebbian_enabled: bool = setting(True, flag)
    hebbian_eta: float = setting(0.1, number())
    hebbian_eta_mode: Literal["constant", "head", "token"] = setting("constant", choice("constant", "head", "token"))
    hebbian_rule: Literal["hebb", "delta"] = setting("hebb", choice("hebb", "delta"))
    hebbian_dt: float = setting(1.0, number())
    adaptive_time_step: bool = setting(False, flag)
    short_conv: int = setting(4, whole(0))
    memory_chunk: int = setting(128, whole(power_of_two=True))
    snr_enabled: bool = setting(True, flag)
    snr_threshold: float = setting(2.0, number())
    snr_gamma_boost: float = setting(2.0, number(1.0, zero=True))
    snr_eta_boost: float = setting(1.5, number(1.0, zero=True))
    resonance_enabled: bool = setting(True, flag)
    resonance_energy_threshold: float = setting(0.1, number())
    feedback_enabled: bool = setting(False, flag)
    use_zeta_init: bool = setting(False, flag)
    embedding: Literal["dense", "tt", "complex_tt"] = setting("dense", choice("dense", "tt", "complex_tt"))

    def _contradictions(self, sound: set[str]) -> list[str]:
        found = super()._contradictions(sound)
        if self.bk_mode == "full" and self.is_encoder is False:
            found.append("bk_mode 'full' sees later tokens and needs is_encoder true, got a language model")
        if {"base_decay", "adaptive_decay"} <= sound and self.adaptive_decay and self.base_decay >= INITIAL_DECAY:
            found.append(f"base_decay must be < {INITIAL_DECAY:g} with adaptive_decay, got {self.base_decay!r}")
        return found
