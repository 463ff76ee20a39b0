"""The adapter as a PEFT method: configuration, layer, tuner, loading, and folding into a plain checkpoint.

Importing this package registers the method with PEFT.
"""

from so8t_torch.adapter.bake import BakeReport, bake
from so8t_torch.adapter.config import SO8TConfig
from so8t_torch.adapter.layer import GeneratorCastWarning, SO8TLayer
from so8t_torch.adapter.loading import load_adapter
from so8t_torch.adapter.model import SO8TModel, set_gate_routes
from so8t_torch.adapter.parameter_groups import so8t_param_groups
from so8t_torch.adapter.registration import register
from so8t_torch.adapter.summary import GateSummary, gate_summary, gated_layers, rotation_angles

register(SO8TConfig, SO8TModel)

__all__ = [
    "BakeReport",
    "GateSummary",
    "GeneratorCastWarning",
    "SO8TConfig",
    "SO8TLayer",
    "SO8TModel",
    "bake",
    "gate_summary",
    "gated_layers",
    "load_adapter",
    "rotation_angles",
    "set_gate_routes",
    "so8t_param_groups",
]
