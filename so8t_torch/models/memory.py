"""What a model needs in memory, from its configuration: counted where it can be counted, measured on one block else.

    training = parameters + gradients + optimiser + activations + logits        decoding = parameters + state

Parameters and states are those of the model built without data. Activations are what one block keeps for its backward
pass of a short row on the CPU, in bytes per token, times tokens and blocks; where blocks are computed twice, one block
and the input of each. Buffers of kernels, of the allocator and of autocast's copies of weights are not counted: it is
an estimate, for plans and comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from so8t_torch.core.errors import ConfigError
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.head_loss import CHUNK_ELEMENTS
from so8t_torch.models.phase1 import Phase1ForCausalLM
from so8t_torch.models.phase2 import Phase2ForCausalLM, Phase2Model

__all__ = ["MemoryEstimate", "estimate_memory", "kept_bytes", "skeleton"]

MEASURED_TOKENS = 256
"""Tokens of the row on which a block is measured."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Numbers and bytes of a model.

    Attributes:
        parameter_count: trained numbers, those that are shared once.
        embedding_count: those of the token embedding.
        parameters: bytes, like all that follow.
        gradients: one for each parameter.
        optimiser: what it keeps for each parameter.
        activations: kept for the backward pass, without logits.
        logits: those of a chunk, and the gradient of what they are made of; the loss alone (``skip_logits``) stores no
            more. A call that returns logits holds them all, twice in float32; float16 does so without them, too.
        decode_state: of one row while decoding, whatever its length.
    """

    parameter_count: int
    embedding_count: int
    parameters: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    decode_state: int

    @property
    def total(self) -> int:
        """Bytes of a training step."""
        return self.parameters + self.gradients + self.optimiser + self.activations + self.logits


def estimate_memory(
    config: Phase1Config | Phase2Config,
    *,
    batch_size: int = 1,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    optimiser_bytes: int = 8,
    gradient_checkpointing: bool = False,
) -> MemoryEstimate:
    """Return the memory of a training step, and of decoding.

    Args:
        config: of the model.
        batch_size: rows.
        length: tokens of a row; ``n_seq`` of the configuration without.
        dtype: of parameters and gradients.
        autocast: dtype of activations under autocast.
        optimiser_bytes: per parameter; 8 are the two moments of Adam in float32.
        gradient_checkpointing: whether blocks are computed again in the backward pass.

    Raises:
        ConfigError: a size below 1, or a wrong configuration.
    """
    length = config.n_seq if length is None else length
    if min(batch_size, length) < 1 or optimiser_bytes < 0:
        raise ConfigError(
            f"estimate_memory: expected batch_size and length > 0 and optimiser_bytes ≥ 0, got {batch_size}, {length} "
            f"and {optimiser_bytes}."
        )
    model = skeleton(config)
    body = getattr(model, "model", model)
    count = sum(p.numel() for p in model.parameters())
    embedding = sum(p.numel() for p in body.embed_tokens.parameters())
    tokens, kept = batch_size * length, config.d_model * (autocast or dtype).itemsize
    measured = min(length, MEASURED_TOKENS)
    if gradient_checkpointing and isinstance(config, Phase1Config):
        # a block that is computed again keeps all of itself meanwhile
        config = config.replace(checkpoint_ar_ssm=False)
    block = math.ceil(_block_bytes(body.block_class, config, measured, dtype, autocast) / measured)
    per_token = config.n_layers * kept + block if gradient_checkpointing else config.n_layers * block
    states = (layer.initial_state(1, torch.device("meta"), dtype).values() for layer in body.layers)
    return MemoryEstimate(
        parameter_count=count,
        embedding_count=embedding,
        parameters=count * dtype.itemsize,
        gradients=count * dtype.itemsize,
        optimiser=count * optimiser_bytes,
        activations=tokens * (per_token + 3 * kept),
        logits=_logit_bytes(model, config, tokens, autocast or dtype),
        decode_state=sum(s.numel() * s.element_size() for state in states for s in state) + 8,
    )


def skeleton(config: Phase1Config | Phase2Config) -> Any:
    """Return the model of a configuration without data.

    Args:
        config: of the model.

    Raises:
        ConfigError: a wrong configuration.
    """
    config.validate()
    if isinstance(config, Phase1Config):
        kind: Any = Phase1ForCausalLM
    else:
        kind = Phase2Model if config.is_encoder else Phase2ForCausalLM
    with torch.device("meta"):
        return kind(config)


def kept_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, beside the parameters of a module.

    Args:
        module: whose parameters do not count.
        forward: the pass.
    """
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in owned:
            # held, so that no other storage takes its place
            kept[place] = tensor.detach()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
        found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return found


def _block_bytes(
    block_class: Any, config: Phase1Config | Phase2Config, length: int, dtype: torch.dtype, autocast: torch.dtype | None
) -> int:
    """Return what one block keeps of a row."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        block = block_class(config).to(dtype).train()
        x = torch.randn(1, length, config.d_model, dtype=dtype).requires_grad_()
        positions = torch.arange(length)[None]
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return kept_bytes(block, lambda: block(x, None, positions=positions))


def _logit_bytes(model: nn.Module, config: Phase1Config | Phase2Config, tokens: int, dtype: torch.dtype) -> int:
    """Return what the loss alone needs: a chunk's logits and their slope, and that of all tokens; none of a train."""
    if getattr(model, "lm_head", None) is None:
        return 0
    if dtype == torch.float16:
        return tokens * config.vocab_size * (2 + 4 + 4)
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // config.vocab_size))
    narrow = dtype.itemsize if dtype.itemsize < 4 else 0
    return chunk * config.vocab_size * (4 + narrow) + tokens * config.d_model * dtype.itemsize
