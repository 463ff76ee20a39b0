"""What a model needs to be trained here: its decoder and head, something that learns, and its gates' geometry."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from so8t_torch.adapter import gate_summary
from so8t_torch.core.errors import TrainingError
from so8t_torch.nn.tensor_train_head import TensorTrainHead

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What an adapted model reads of a batch."""

PACKED_INPUTS = ("segment_ids", "position_ids")
"""Where documents begin in packed rows, which have no padding and so no mask; a model reads the first that it knows."""


def plain_model(model: nn.Module) -> Any:
    """Return the language model itself, without an adapter's wrapping."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Return which tensors of a batch the model's forward pass reads."""
    if isinstance(model, PeftModel):
        return INPUTS
    read = inspect.signature(model.forward).parameters
    return ("input_ids", *[name for name in PACKED_INPUTS if name in read][:1])


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the stack of layers and the output embedding of a causal language model, adapted or not.

    An embedding that is a tensor train is its own head, which is no part of the model.

    Raises:
        TrainingError: the model changes its logits after the head, which the chunked loss does not.
    """
    plain = plain_model(model)
    for name in LOGIT_TRANSFORMS:
        if getattr(plain.config, name, None) not in (None, 1, 1.0):
            raise TrainingError(f"{type(plain).__name__} applies {name} to its logits; the chunked loss does not.")
    decoder, head = plain.get_decoder(), plain.get_output_embeddings()
    return decoder, TensorTrainHead(plain.get_input_embeddings()) if head is None else head


def check_trainable(model: nn.Module) -> None:
    """Stop unless something is trainable and every gate parameter is float32.

    Raises:
        TrainingError: naming what is missing or the parameter of the wrong dtype.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError("Nothing is trainable: every parameter of the model is frozen; check the adapter section.")
    for name, parameter in model.named_parameters():
        if ("so8t_safe" in name or "so8t_cmd" in name) and parameter.dtype != torch.float32:
            raise TrainingError(f"{name} is {parameter.dtype}; gate generators must be float32 or they cannot move.")


def check_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Stop unless the groups hold exactly the trainable parameters, each once.

    Raises:
        TrainingError: naming parameters that no group or two groups hold.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = [id(p) for group in groups for p in group["params"]]
    wrong = [name for key, name in names.items() if held.count(key) != 1]
    if wrong or len(held) != len(names):
        raise TrainingError(f"The optimiser must hold every trainable parameter once; not so for {wrong[:5]}.")


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
