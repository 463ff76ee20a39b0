"""bitsandbytes layers: keep them trainable on a CPU, recognise them, and turn them back into plain ones.

In evaluation mode on a CPU, bitsandbytes repacks a 4-bit weight for speed at the first forward pass. Every later
backward pass and every later dequantisation reads the repacked bytes as if they were not, and is wrong without
an error. A 4-bit layer in training mode is never repacked, and computes the same function.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from so8t_torch.core.errors import AdapterError

_LAYERS = ("Linear4bit", "Linear8bitLt")


def quantization(module: Any) -> str:
    """Return how the layer stores its weight: ``"none"``, ``"nf4"``, ``"fp4"``, ``"int8"`` or ``"other"``."""
    if _is(module, "Linear4bit"):
        return module.weight.quant_type
    if _is(module, "Linear8bitLt"):
        return "int8"
    weight = getattr(module, "weight", None)
    return "none" if weight is not None and weight.is_floating_point() else "other"


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """Return the quantisation configuration with which the model was loaded; empty if it is not quantised."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return {}
    return dict(config) if isinstance(config, dict) else config.to_dict()


def keep_training_on_cpu(model: nn.Module) -> None:
    """Make every 4-bit layer of the model stay in training mode while its weight is on a CPU.

    ``train``, ``eval`` and direct changes of ``training`` are all answered, from whichever parent they come.

    Raises:
        AdapterError: a layer has been repacked already, so its gradients would be wrong.
    """
    for key, module in model.named_modules():
        if not _is(module, "Linear4bit"):
            continue
        check_not_repacked(key, module)
        if "train" not in vars(module):
            module.train = types.MethodType(_train, module)
            module.register_forward_pre_hook(_before_forward)
        module.train(module.training)


def check_not_repacked(key: str, module: nn.Module) -> None:
    """Raise if bitsandbytes has repacked this layer's weight for CPU inference.

    Args:
        key: the layer's name, for the error.
        module: any layer.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise AdapterError(
            f"module {key!r}: this 4-bit layer ran in evaluation mode on a CPU, and bitsandbytes repacked its weight; "
            "gradients and merges from it would be wrong. Load the base again and add the adapter before its first "
            "forward pass."
        )


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every bitsandbytes layer of a transformers model by a plain linear layer, in place.

    Args:
        model: loaded with a bitsandbytes ``quantization_config``.
        dtype: of the new weights.

    Raises:
        AdapterError: a layer has been repacked, or is stored in a way this function does not know.
    """
    for key, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or quantization(module) == "none":
            continue
        if not any(_is(module, name) for name in _LAYERS):
            raise AdapterError(f"module {key!r}: expected a bitsandbytes layer, got {type(module).__name__}.")
        check_not_repacked(key, module)
        model.set_submodule(key, _plain(module, dtype))
    _forget_quantizer(model)


def _forget_quantizer(model: Any) -> None:
    """Remove what transformers attached when it loaded the model quantised, so that it saves as a plain one."""
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, flag):
            setattr(model, flag, False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        # saving would run the quantiser's own conversions backwards, which it cannot
        model._weight_conversions = [c for c in conversions if not _belongs_to_quantizer(c)]


def _belongs_to_quantizer(conversion: Any) -> bool:
    return any("bitsandbytes" in type(operation).__module__ for operation in getattr(conversion, "operations", ()))


def _plain(module: Any, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes import functional

    if _is(module, "Linear4bit"):
        weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
        weight = functional.int8_vectorwise_dequant(module.weight.data, scale)
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
    return plain.train(module.training)


def _is(module: nn.Module, name: str) -> bool:
    # by name along the class tree, so that bitsandbytes is not imported for models that do not use it
    return any(cls.__name__ == name and cls.__module__.startswith("bitsandbytes") for cls in type(module).__mro__)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    return type(self).train(self, mode or self.weight.device.type == "cpu")


def _before_forward(module: nn.Module, inputs: tuple[object, ...]) -> None:
    del inputs
    if not module.training:
        module.train(False)
