"""A tensor-train embedding whose cores are stored in 8 bits, for rows and logits that are computed as before.

    C_k[i, ρ, ρ', a] ≈ s_k[i, ρ, ρ'] q_k[i, ρ, ρ', a]      s = max_a |C_k[i, ρ, ρ', a]| / 127,  q rounded to [−127, 127]
    each entry is off by at most s / 2      error = ‖E − Ê‖ / ‖E‖ over all V × D entries

A scale stands for one rank of one slice, because the sizes of ranks of a decomposed table differ by their singular
values. Rows and heads take the cores written out anew; codes and scales are all that is stored in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding

__all__ = ["CoreRounding", "Int8TTEmbedding", "core_rounding", "round_cores"]

LEVELS = 127
_CHUNK = 4096


@dataclass(frozen=True)
class CoreRounding:
    """What 8-bit cores cost and save; the worst row is in units of the root mean square norm of a row."""

    relative_error: float
    worst_row: int
    worst_row_error: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"relative error {self.relative_error:.2e}, worst row {self.worst_row_error:.2e} (id {self.worst_row}); "
            f"{self.bytes_before:,} → {self.bytes_after:,} bytes ({self.bytes_after / self.bytes_before:.0%})"
        )


class Int8TTEmbedding(HolographicTTEmbedding):
    """The layer with the same rows up to rounding, for inference: nothing of it is trained.

    A state dict holds the cores written out under their usual names, so that files are those of the plain layer; what
    is read is rounded again, which changes nothing that was rounded before.

    Args:
        layer: whose cores are rounded; it stays as it is.

    Raises:
        DomainError: a core has an entry that is not finite.
    """

    def __init__(self, layer: HolographicTTEmbedding) -> None:
        nn.Module.__init__(self)
        vars(self).update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        for name in ("phase_shift", "id_permutation"):
            self.register_buffer(name, getattr(layer, name).detach().clone())
        for number, core in enumerate(layer.stored_cores(), start=1):
            codes, scales = _rounded(core.detach())
            self.register_buffer(f"codes{number}", codes, persistent=False)
            self.register_buffer(f"scales{number}", scales, persistent=False)

    def stored_cores(self) -> list[Tensor]:
        """Return the cores, written out."""
        pairs = [(getattr(self, f"codes{k + 1}"), getattr(self, f"scales{k + 1}")) for k in range(self.num_cores)]
        return [codes.to(scales.dtype) * scales for codes, scales in pairs]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: ARG002 - as the plain layer
        """Refuse: there is nothing to draw.

        Args:
            generator: not used.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("Int8TTEmbedding: expected cores that were rounded, got none; build it from a plain layer.")

    def get_parameter_counts(self) -> tuple[int, int]:
        """Return the numbers of a full table with rows of the same kind, and those stored here, scales left out."""
        numbers = 2 if self.complex_cores else 1
        stored = sum(core.numel() for core in self.stored_cores()) + self.phase_shift.numel() * self.phase_encoding
        return self.vocab_size * self.d_model * numbers, stored

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for number, core in enumerate(self.stored_cores(), start=1):
            destination[f"{prefix}core{number}"] = core

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        _, _, missing, unexpected, errors = rest
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for number in range(1, self.num_cores + 1):
            key, held = f"{prefix}core{number}", getattr(self, f"codes{number}")
            if key in unexpected:
                unexpected.remove(key)
            if key not in state_dict:
                missing.append(key)
            elif state_dict[key].shape != held.shape:
                errors.append(f"{key}: expected {tuple(held.shape)}, got {tuple(state_dict[key].shape)}.")
            else:
                codes, scales = _rounded(state_dict[key])
                held.copy_(codes)
                getattr(self, f"scales{number}").copy_(scales)


def round_cores(model: nn.Module) -> CoreRounding:
    """Give a model its tensor-train embedding, and the head tied to it, with cores of 8 bits, in place.

    Args:
        model: with ``get_input_embeddings`` and ``set_input_embeddings``.

    Returns:
        What that costs and saves.

    Raises:
        ConfigError: its embedding is no tensor train, or has cores of 8 bits already.
        DomainError: a core has an entry that is not finite.
    """
    taken: Any = model
    layer = taken.get_input_embeddings()
    if not isinstance(layer, HolographicTTEmbedding) or isinstance(layer, Int8TTEmbedding):
        raise ConfigError(
            f"round_cores: expected a model with a HolographicTTEmbedding, got {type(layer).__name__}; "
            "so8t compress-embedding makes one of a table."
        )
    rounded = Int8TTEmbedding(layer)
    found = core_rounding(layer, rounded)
    taken.set_input_embeddings(rounded)
    return found


@torch.no_grad()
def core_rounding(layer: HolographicTTEmbedding, rounded: Int8TTEmbedding) -> CoreRounding:
    """Return how far the rows of two layers are apart, and the bytes of both.

    Args:
        layer: with plain cores.
        rounded: made from it.
    """
    apart, total = [], 0.0
    for ids in torch.arange(layer.vocab_size, device=layer.id_permutation.device).split(_CHUNK):
        wanted = _rows(layer, ids)
        apart.append((wanted - _rows(rounded, ids)).abs().square().sum(1))
        total += float(wanted.abs().square().sum())
    squares = torch.cat(apart)
    worst, scale = int(squares.argmax()), max(total, torch.finfo(squares.dtype).tiny)
    return CoreRounding(
        relative_error=math.sqrt(float(squares.sum()) / scale),
        worst_row=worst,
        worst_row_error=math.sqrt(float(squares[worst]) * layer.vocab_size / scale),
        bytes_before=_bytes([*layer.stored_cores(), layer.phase_shift]),
        bytes_after=_bytes([buffer for name, buffer in rounded.named_buffers() if name != "id_permutation"]),
    )


def _rows(layer: HolographicTTEmbedding, ids: Int[Tensor, " n"]) -> Inexact[Tensor, "n d"]:
    rows = layer.forward_complex(ids) if layer.complex_cores else layer(ids)
    return rows.to(torch.complex128 if rows.is_complex() else torch.float64)


def _rounded(core: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, and scales with an axis of one for each that they hold for."""
    if not bool(torch.isfinite(core).all()):
        raise DomainError("Int8TTEmbedding: expected finite cores; an entry is infinite or not a number.")
    wide = core.float() if core.dtype.itemsize < 4 else core
    scales = wide.abs().amax(tuple(range(3, core.ndim)), keepdim=True) / LEVELS
    # the codes are those of the scales as they are stored
    scales = torch.where(scales == 0, 1.0, scales).to(core.dtype)
    codes = (wide / scales.to(wide.dtype)).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8), scales


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
