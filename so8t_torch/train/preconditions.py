"""What must hold of a model and its parameter groups before a step can be taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from so8t_torch.core.errors import TrainingError
from so8t_torch.core.tensors import listed, not_finite

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the stack of layers and the output embedding of a causal language model, adapted or not.

    Raises:
        TrainingError: the model changes its logits after the head, which the chunked loss does not.
    """
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name in LOGIT_TRANSFORMS:
        if getattr(plain.config, name, None) not in (None, 1, 1.0):
            raise TrainingError(f"{type(plain).__name__} applies {name} to its logits; the chunked loss does not.")
    return plain.get_decoder(), plain.get_output_embeddings()


def check_trainable(model: nn.Module) -> None:
    """Stop unless something is trainable, all of it is finite, and every gate parameter is float32.

    Raises:
        TrainingError: naming what is missing, or the parameters that are not as they must be.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError("Nothing is trainable: every parameter of the model is frozen; check the adapter section.")
    if broken := not_finite(trainable):
        raise TrainingError(
            f"Training cannot begin with NaN or infinity in {listed(broken)}; take weights from before they broke."
        )
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
