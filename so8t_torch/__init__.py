"""Production side in PyTorch and Triton.

Importing this package imports neither transformers, peft nor bitsandbytes; the first touch of an exported
name imports what it needs, and touching ``SO8TConfig`` registers the PEFT method.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "SO8TConfig": "so8t_torch.adapter",
    "SO8TModel": "so8t_torch.adapter",
    "load_adapter": "so8t_torch.adapter",
    "so8t_param_groups": "so8t_torch.adapter",
    "bake": "so8t_torch.adapter",
    "HolographicTTEmbedding": "so8t_torch.nn.tensor_train_embedding",
    "TensorTrainHead": "so8t_torch.nn.tensor_train_head",
    "LNSLinear": "so8t_torch.nn.lns_linear",
    "convert_linear_to_lns": "so8t_torch.nn.lns_linear",
    "lns_matmul": "so8t_torch.nn.lns_linear",
    "tt_contraction_memory_efficient": "so8t_torch.nn.tensor_train_embedding",
    "load_compressed": "so8t_torch.models.compression",
    "fused_associative_scan": "so8t_torch.nn.associative_scan",
    "AdaptiveRankSemiseparableLayer": "so8t_torch.nn.semiseparable",
    "DissipativeHebbianLayer": "so8t_torch.nn.hebbian",
    "NonHermitianPotential": "so8t_torch.nn.dissipative_bk",
    "DissipativeBKLayer": "so8t_torch.nn.dissipative_bk",
    "SNRMemoryFilter": "so8t_torch.nn.memory_selection",
    "MemoryImportanceEstimator": "so8t_torch.nn.memory_selection",
    "MemoryResonanceLayer": "so8t_torch.nn.memory_resonance",
    "ZetaBasisTransform": "so8t_torch.nn.memory_resonance",
    "ZetaEmbedding": "so8t_torch.nn.zeta_embedding",
    "ZetaInitializer": "so8t_torch.nn.zeta_initialization",
    "apply_zeta_initialization": "so8t_torch.nn.zeta_initialization",
    "get_zeta_statistics": "so8t_torch.nn.zeta_initialization",
    "HamiltonianBlock": "so8t_torch.nn.hamiltonian",
    "Phase1Config": "so8t_torch.models.configuration",
    "Phase1ForCausalLM": "so8t_torch.models.phase1",
    "Phase1Model": "so8t_torch.models.phase1",
    "Phase2Config": "so8t_torch.models.configuration",
    "Phase2ForCausalLM": "so8t_torch.models.phase2",
    "Phase2IntegratedModel": "so8t_torch.models.phase2",
    "Phase2Model": "so8t_torch.models.phase2",
    "create_phase1_model": "so8t_torch.models.factory",
    "create_phase2_model": "so8t_torch.models.factory",
    "convert_phase1_to_phase2": "so8t_torch.models.conversion",
    "estimate_memory": "so8t_torch.models.memory",
    "for_hardware": "so8t_torch.models.presets",
    "get_preset": "so8t_torch.models.presets",
    "get_phase2_preset": "so8t_torch.models.presets",
    "list_presets": "so8t_torch.models.presets",
    "list_phase2_presets": "so8t_torch.models.presets",
    "print_preset_comparison": "so8t_torch.models.presets",
    "SlotPool": "so8t_torch.models.slots",
    "quantization_cost": "so8t_torch.models.quantization",
    "round_cores": "so8t_torch.nn.int8_tensor_train",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'so8t_torch' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
