"""What a model that is trained reads of a batch, and how its gates look."""

from __future__ import annotations

import inspect

from peft import PeftModel
from torch import nn

from so8t_torch.adapter import gate_summary

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What an adapted model reads of a batch."""

PACKED_INPUTS = ("segment_ids", "position_ids")
"""Where documents begin in packed rows, which have no padding and so no mask; a model reads the first that it knows."""


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Return which tensors of a batch the model's forward pass reads."""
    if isinstance(model, PeftModel):
        return INPUTS
    read = inspect.signature(model.forward).parameters
    return ("input_ids", *[name for name in PACKED_INPUTS if name in read][:1])


def geometry(model: nn.Module) -> dict[str, float]:
    """Return the gates' geometry: angles in radians overall and by layer, commutator distance, orthogonality error."""
    gates = gate_summary(model)
    if not gates:
        return {}
    each = list(gates.values())
    return {
        "gate/max_angle": max(gate.max_angle for gate in each),
        "gate/mean_angle": sum(gate.mean_angle for gate in each) / len(each),
        "gate/commutator": sum(gate.commutator for gate in each) / len(each),
        "gate/orthogonality_error": max(gate.orthogonality_error for gate in each),
    } | {f"gate_angle/{_short(name)}": gate.mean_angle for name, gate in gates.items()}


def _short(name: str) -> str:
    """Return ``"4.o_proj"`` for ``"…layers.4.self_attn.o_proj"``."""
    parts = name.split(".")
    return ".".join([*(part for part in parts if part.isdecimal()), parts[-1]])
