"""Weights of 8 and 4 bits through bitsandbytes: which linear maps stay as they are, and what the others cost.

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    loss of parity = mean −log p of the next token, quantised − plain, in nats

Maps that give rates, gates, steps and potentials stay: what they give is carried from token to token, where an error
does not average out but is multiplied up. Norms, embeddings, heads and bare parameters are no maps of the blocks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from so8t_torch.core.errors import ConfigError, ShapeError

__all__ = ["QuantizationCost", "quantization_cost", "with_kept_maps"]


@dataclass(frozen=True)
class QuantizationCost:
    """What quantised weights cost and save.

    Attributes:
        plain: mean loss of the plain model in nats a token.
        quantised: of the quantised one.
        tokens: that were told.
        plain_bytes: of parameters and buffers.
        quantised_bytes: of those of the quantised model, its scales included.
    """

    plain: float
    quantised: float
    tokens: int
    plain_bytes: int
    quantised_bytes: int

    @property
    def nats(self) -> float:
        """Loss of the quantised model above that of the plain one, in nats a token."""
        return self.quantised - self.plain

    def __str__(self) -> str:
        return (
            f"{self.plain:.4f} → {self.quantised:.4f} nats a token ({self.nats:+.4f}) on {self.tokens:,} tokens; "
            f"{self.plain_bytes:,} → {self.quantised_bytes:,} bytes ({self.quantised_bytes / self.plain_bytes:.0%})"
        )


def with_kept_maps(quantization_config: Any, kept: tuple[str, ...]) -> Any:
    """Return a copy of a bitsandbytes configuration that leaves maps as they are; others are returned untouched.

    Args:
        quantization_config: a ``BitsAndBytesConfig``, or its dict.
        kept: ends of the names of the maps. What the configuration leaves out itself stays left out as well.
    """
    if isinstance(quantization_config, dict):
        if not (quantization_config.get("load_in_8bit") or quantization_config.get("load_in_4bit")):
            return quantization_config
        quantization_config = BitsAndBytesConfig(**quantization_config)
    if not isinstance(quantization_config, BitsAndBytesConfig):
        return quantization_config
    found = copy.deepcopy(quantization_config)
    found.llm_int8_skip_modules = sorted({*(found.llm_int8_skip_modules or ()), *kept})
    return found


@torch.no_grad()
def quantization_cost(
    plain: PreTrainedModel, quantised: PreTrainedModel, input_ids: Int[Tensor, "b n"]
) -> QuantizationCost:
    """Return what quantised weights cost on a text and how many bytes they save.

    Args:
        plain: a language model.
        quantised: the same one, with weights of fewer bits.
        input_ids: rows of a text, at least two tokens each; both models tell each token from those before it.

    Raises:
        ConfigError: the models are not the same, or one is in training mode.
        ShapeError: rows of fewer than two tokens.
    """
    if type(plain) is not type(quantised) or plain.training or quantised.training:
        raise ConfigError(
            f"quantization_cost: expected two models of one class in evaluation mode, got {type(plain).__name__} and "
            f"{type(quantised).__name__}."
        )
    if input_ids.ndim != 2 or not len(input_ids) or input_ids.shape[1] < 2:
        raise ShapeError(f"quantization_cost: expected rows of 2 tokens or more, got {tuple(input_ids.shape)}.")
    return QuantizationCost(
        plain=_loss(plain, input_ids),
        quantised=_loss(quantised, input_ids),
        tokens=len(input_ids) * (input_ids.shape[1] - 1),
        plain_bytes=plain.get_memory_footprint(),
        quantised_bytes=quantised.get_memory_footprint(),
    )


def _loss(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Return the mean −log p of the next tokens, without what blocks add to a loss."""
    logits = model(input_ids.to(model.device), use_cache=False).logits[:, :-1].float()
    wanted = input_ids[:, 1:].flatten().to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted))
