"""Recurrent states of the blocks in the cache of transformers: named tensors of a block, and one position per row.

A block's tensors lie in the linear-attention layer of the same number, in the order of the block's ``state_names``;
the position of a row, the number of its tokens so far in the last document, lies with the first block. Rows are the
first axis of all. A row of zeros is a row at its beginning, so rows can be taken out, put in and emptied one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from so8t_torch.core.errors import ConfigError, ShapeError

__all__ = [
    "RecurrentCache",
    "check_shapes",
    "read_positions",
    "read_states",
    "state_bytes",
    "write_positions",
    "write_states",
]

_FIRST = 1
"""The place of the first named tensor of a block; before it lies the position."""


class RecurrentCache(DynamicCache):
    """The cache that ``generate`` uses: linear-attention layers alone, which do not grow with the tokens.

    Args:
        config: of the model.
    """

    is_compileable = False
    """Whether ``generate`` compiles on its own account where this cache is used."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers have seen the same
        """Return the number of columns of tokens seen, padding included."""
        return self.columns

    def reset(self) -> None:
        """Return all rows to their beginning."""
        super().reset()
        self.columns = 0


def read_states(cache: Cache, block: int, names: Sequence[str], rows: int) -> dict[str, Tensor] | None:
    """Return the tensors of a block by name, or nothing before the first token.

    Args:
        cache: of linear-attention layers.
        block: its number.
        names: of the tensors, in the block's order.
        rows: of the call.

    Raises:
        ConfigError: the cache has no such layer, or tensors of other names.
        ShapeError: it holds another number of rows.
    """
    layer = _layer(cache, block)
    held = [layer.recurrent_states.get(place) for place in range(_FIRST, _FIRST + len(names))]
    if not layer.has_previous_state.get(_FIRST) or not held:
        return None
    found = {name: tensor for name, tensor in zip(names, held, strict=True) if tensor is not None}
    if len(found) < len(names):
        missing = ", ".join(name for name in names if name not in found)
        raise ConfigError(f"states: expected the cache to hold {missing} of block {block}; it is of another model.")
    count = sum(layer.recurrent_states.get(place) is not None for place in range(_FIRST, layer.number_of_states))
    if count > len(names):
        raise ConfigError(
            f"states: expected the cache to hold {', '.join(names)} of block {block} alone, got {count} tensors; it is "
            "of another model."
        )
    _check_rows(found[names[0]], rows)
    return found


def check_shapes(states: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless what a block was handed has the shapes of what it carries.

    Args:
        states: by name, rows first.
        shapes: by name, without the axis of rows.

    Raises:
        ConfigError: they are of a model of other sizes.
    """
    for name, shape in shapes.items():
        found = tuple(states[name].shape[1:])
        if found != shape:
            raise ConfigError(
                f"states: expected {name} {shape} in every row, got {found}; the cache is of a model of other sizes."
            )


def write_states(cache: Cache, block: int, states: Mapping[str, Tensor]) -> None:
    """Keep the tensors of a block, which do not change on the way: dtypes and gradients stay.

    Args:
        cache: of linear-attention layers.
        block: its number.
        states: in the block's order.

    Raises:
        ConfigError: the cache has no such layer.
    """
    layer = _layer(cache, block)
    for place, tensor in enumerate(states.values(), start=_FIRST):
        _keep(layer, place, tensor)


def read_positions(cache: Cache, rows: int) -> Int[Tensor, " b"] | None:
    """Return how many tokens of the last document of each row have been seen, or nothing before the first call.

    Args:
        cache: of linear-attention layers.
        rows: of the call.

    Raises:
        ConfigError: the cache has no such layer.
        ShapeError: it holds another number of rows.
    """
    layer = _layer(cache, 0)
    found = layer.recurrent_states.get(0) if layer.has_previous_state.get(0) else None
    if found is not None:
        _check_rows(found, rows)
    return found


def write_positions(cache: Cache, positions: Int[Tensor, " b"], columns: int) -> None:
    """Keep the positions after a call on so many columns of tokens.

    Args:
        cache: of linear-attention layers.
        positions: of each row.
        columns: of the call, padding included.
    """
    _keep(_layer(cache, 0), 0, positions)
    if isinstance(cache, RecurrentCache):
        cache.columns += columns


def state_bytes(cache: Cache) -> int:
    """Return the bytes of all that is carried from token to token, positions included; the length does not enter.

    Args:
        cache: of linear-attention layers.
    """
    tensors = [tensor for layer in cache.layers for tensor in _layer_tensors(layer)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _layer_tensors(layer: Any) -> list[Tensor]:
    return [tensor for tensor in layer.recurrent_states.values() if tensor is not None]


def _keep(layer: LinearAttentionLayer, place: int, tensor: Tensor) -> None:
    """Put a tensor in its place: into the memory that is there, or as it is where gradients flow through it."""
    if place >= layer.number_of_states:
        layer.number_of_states = place + 1
    for table, empty in (
        (layer.conv_states, None),
        (layer.recurrent_states, None),
        (layer.is_conv_states_initialized, False),
        (layer.is_recurrent_states_initialized, False),
        (layer.has_previous_state, False),
        (layer.conv_kernel_size, None),
    ):
        for missing in range(len(table), layer.number_of_states):
            table[missing] = empty
    held = layer.recurrent_states[place]
    if tensor.requires_grad or (held is not None and (held.requires_grad or held.shape != tensor.shape)):
        layer.recurrent_states[place] = tensor
        layer.is_recurrent_states_initialized[place] = True
    else:
        layer.update_recurrent_state(tensor, place)
    layer.has_previous_state[place] = True
    layer.device, layer.dtype = tensor.device, tensor.dtype


def _layer(cache: Cache, block: int) -> LinearAttentionLayer:
    layers = getattr(cache, "layers", ())
    if block >= len(layers) or not isinstance(layers[block], LinearAttentionLayer):
        kind = type(layers[block]).__name__ if block < len(layers) else f"none in {type(cache).__name__}"
        raise ConfigError(
            f"states: expected a linear-attention layer for block {block}, got {kind}; make the cache with "
            "RecurrentCache(model.config) or DynamicCache(config=model.config)."
        )
    return layers[block]


def _check_rows(tensor: Tensor, rows: int) -> None:
    if len(tensor) != rows:
        raise ShapeError(f"states: expected a cache of {rows} rows, as the call has, got one of {len(tensor)}.")
