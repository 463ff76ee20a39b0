"""What the adaptive-rank layer refuses: options that do not fit each other, and tensors that do not fit the options."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none

__all__ = ["check_choices", "check_input", "check_sizes"]


def check_input(x: Tensor, segment_ids: Tensor | None, padding_mask: Tensor | None, d_model: int) -> None:
    """Raise unless x is real (B, T, D) with a token, and the others may stand beside it.

    Args:
        x: activations.
        segment_ids: whole numbers, judged by the operation.
        padding_mask: booleans (B, T).
        d_model: D.

    Raises:
        ShapeError: x is not (B, T, D) with a token, or the mask does not fit it.
        DomainError: x is not real.
    """
    expect_tensors("AdaptiveRankSemiseparableLayer", x=x)
    expect_tensors_or_none("AdaptiveRankSemiseparableLayer", segment_ids=segment_ids, padding_mask=padding_mask)
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != d_model:
        raise ShapeError(
            f"AdaptiveRankSemiseparableLayer: expected activations (B, T, {d_model}) with at least one token, "
            f"got {tuple(x.shape)}."
        )
    if not x.is_floating_point():
        raise DomainError(
            f"AdaptiveRankSemiseparableLayer: expected real activations, got {x.dtype}; give the real part, or "
            "real and imaginary parts as channels."
        )
    if padding_mask is not None and (padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool):
        raise ShapeError(
            f"AdaptiveRankSemiseparableLayer: expected a boolean padding_mask {tuple(x.shape[:2])}, True where a "
            f"token counts, got {padding_mask.dtype} {tuple(padding_mask.shape)}."
        )


def check_sizes(
    d_model: int, max_rank: int, min_rank: int, hidden: int, band_width: int, l1: float, chunk: int
) -> None:
    """Raise unless the sizes are positive, the ranks in order and the chunk a power of two.

    Args:
        d_model: D.
        max_rank: R.
        min_rank: channels that are always open.
        hidden: width inside the gate.
        band_width: taps.
        l1: weight of the mean gate.
        chunk: tokens that are taken together.

    Raises:
        ConfigError: they are not.
    """
    if min(d_model, hidden, band_width) < 1:
        raise ConfigError(
            "AdaptiveRankSemiseparableLayer: expected d_model, gate_hidden_dim and band_width of at least 1, "
            f"got {d_model}, {hidden} and {band_width}."
        )
    if not 1 <= min_rank <= max_rank:
        raise ConfigError(
            f"AdaptiveRankSemiseparableLayer: expected 1 ≤ min_rank ≤ max_rank, got {min_rank} and {max_rank}."
        )
    if not 0.0 <= l1 < math.inf:
        raise ConfigError(f"AdaptiveRankSemiseparableLayer: expected l1_regularization ≥ 0, got {l1!r}.")
    if chunk < 1 or chunk & (chunk - 1):
        raise ConfigError(f"AdaptiveRankSemiseparableLayer: expected a chunk that is a power of two, got {chunk!r}.")


def check_choices(choices: Mapping[str, tuple[str, tuple[str, ...]]], options: Mapping[str, bool]) -> None:
    """Raise unless values are among their choices, and options of decays have decays.

    Args:
        choices: value and choices by name; one of the names is ``decays``.
        options: those that need decays.

    Raises:
        ConfigError: they do not.
    """
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(
                f"AdaptiveRankSemiseparableLayer: expected {name} out of {', '.join(allowed)}, got {value!r}."
            )
    for name, wanted in options.items():
        if wanted and choices["decays"][0] == "none":
            raise ConfigError(f"AdaptiveRankSemiseparableLayer: {name} without decays does nothing; choose decays.")
