"""Bytes of a training run on a card, component by component, from shapes alone.

Weights, adapter, gradients and optimiser states are counted exactly. What the backward pass keeps is counted by running
one decoder layer on the meta device (shapes, no numbers) and adding up the storages autograd saves:

    with checkpointing      L · (B T D) layer inputs + what one recomputed layer saves
    without                 L · what one layer saves

Symbols: L layers, B rows, T tokens, D width, n numbers in a weight. NF4 holds n/2 bytes and one scale per 64 numbers:
4 bytes each, or with double quantisation 1 byte each and 4 bytes per 256 of them. The tests hold the exact parts to the
byte, and the whole of one step's transient memory on a CPU within a factor of 1.25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from so8t_torch.adapter import gated_layers, set_gate_routes
from so8t_torch.train.config import LoadingSection, TrainingSection

NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256
NF4_CODES, DYNAMIC_CODES = 16, 256
STATE_BLOCK, SMALLEST_8BIT = 256, 4096
FLOAT = 4


def nf4_bytes(numbers: int, *, double: bool) -> int:
    """Return the bytes of one weight in NF4 with its scales and code tables.

    Args:
        numbers: of the weight.
        double: whether the scales are quantised too.
    """
    blocks = math.ceil(numbers / NF4_BLOCK)
    scales = FLOAT * blocks
    if double:
        scales = blocks + FLOAT * math.ceil(blocks / NF4_OUTER_BLOCK) + FLOAT * DYNAMIC_CODES + FLOAT
    return math.ceil(numbers / 2) + scales + FLOAT * NF4_CODES


def int8_bytes(rows: int, columns: int) -> int:
    """Return the bytes of one weight in int8 with one scale per row."""
    return rows * columns + FLOAT * rows


def base_bytes(model: nn.Module, head: nn.Module, loading: LoadingSection, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of the frozen base: linear layers, and everything else (embeddings, norms, head).

    Args:
        model: the base, before adapting, on the meta device.
        head: its output embedding, which quantisation leaves alone.
        loading: dtype and quantisation.
        dtype: of what is not quantised.
    """
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    rest_size = FLOAT if loading.quantization != "none" and loading.float32_rest else dtype.itemsize
    sizes: dict[str, Callable[[nn.Linear], int]] = {
        "none": lambda m: m.weight.numel() * dtype.itemsize,
        "nf4": lambda m: nf4_bytes(m.weight.numel(), double=loading.double_quantization),
        "int8": lambda m: int8_bytes(m.out_features, m.in_features),
    }
    inside = {id(m.weight) for m in linear}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return {"linear": sum(map(sizes[loading.quantization], linear)), "rest": rest * rest_size}


def optimiser_bytes(model: nn.Module, optimiser: str) -> int:
    """Return the bytes of the optimiser's two moments over the trainable parameters.

    Gates keep 32-bit moments under every optimiser, as does a parameter of fewer than 4096 numbers.
    """
    gates = {id(p) for _, layer in gated_layers(model) for d in (layer.so8t_safe, layer.so8t_cmd) for p in d.values()}
    eight_bit = optimiser.endswith("8bit")
    return sum(
        _moments(p.numel(), eight_bit and id(p) not in gates and p.numel() >= SMALLEST_8BIT)
        for p in model.parameters()
        if p.requires_grad
    )


def _moments(numbers: int, eight_bit: bool) -> int:
    return 2 * (numbers + FLOAT * math.ceil(numbers / STATE_BLOCK)) if eight_bit else 2 * FLOAT * numbers


def saved_bytes(layer: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps of one forward pass, every storage once, parameters and buffers left out.

    Args:
        layer: the module whose own tensors do not count.
        forward: runs it.
    """
    own = {t.untyped_storage()._cdata for t in _tensors(layer)}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _Attention(torch.autograd.Function):
    """Stands for a fused attention on the meta device: the right output shape, and what such a kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        del gradients
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Answer as a fused attention kernel does, for the library's table of attention functions; shapes only."""
    del module, attention_mask, options
    return _Attention.apply(query, key, value), None


def activation_bytes(
    model: Any, batch: int, tokens: int, training: TrainingSection, dtype: torch.dtype
) -> dict[str, int]:
    """Return what the backward pass finds in memory: layer inputs, one layer's inside, and its temporaries.

    Args:
        model: the adapted model on the meta device, in training mode.
        batch: rows of a micro-batch.
        tokens: length of the longest row.
        training: whether layers are checkpointed.
        dtype: of the activations.
    """
    decoder = model.get_base_model().get_decoder()
    layers = list(decoder.layers)
    width = model.get_base_model().config.hidden_size
    stream = batch * tokens * width * dtype.itemsize
    set_gate_routes(model, torch.ones(batch, dtype=torch.bool, device="meta"))
    inside = [_layer_bytes(decoder, layer, batch, tokens, width, dtype) for layer in layers]
    largest = batch * tokens * max(p.shape[0] for p in decoder.layers.parameters() if p.ndim == 2) * dtype.itemsize
    held = len(layers) * stream + max(inside) if training.gradient_checkpointing else sum(inside)
    return {"activations": held + stream, "temporaries": 2 * largest}


def _layer_bytes(decoder: Any, layer: nn.Module, batch: int, tokens: int, width: int, dtype: torch.dtype) -> int:
    states = torch.empty(batch, tokens, width, device="meta", dtype=dtype, requires_grad=True)
    positions = torch.empty(1, tokens, device="meta", dtype=torch.int64)
    angles = decoder.rotary_emb(states, positions)
    return saved_bytes(layer, lambda: layer(states, attention_mask=None, position_embeddings=angles, use_cache=False))


def loss_bytes(vocabulary: int, training: TrainingSection, dtype: torch.dtype) -> int:
    """Return the bytes of one chunk of logits: as computed, in float32, and the gradient of both."""
    return training.loss_chunk * vocabulary * 2 * (FLOAT + dtype.itemsize)
