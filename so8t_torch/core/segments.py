"""Segment numbers of packed sequences from the cumulative lengths that flash-linear-attention and its kin use.

    cu_seqlens = (0, n_1, n_1 + n_2, …)        id_t = number of sequences that end at or before token t

Tokens at the end that belong to no sequence get a number of their own, so that nothing flows into or out of them.
Cost: O(T log S).
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from so8t_torch.core.errors import DomainError, ShapeError


def segment_ids_from_cu_seqlens(cu_seqlens: Int[Tensor, " s+1"], length: int) -> Int[Tensor, " t"]:
    """Return the number of the sequence that each token of a packed row belongs to.

    The boundaries are checked, which waits for the device: call this where a batch is made, not inside a model.

    Args:
        cu_seqlens: where each of S sequences begins and, last, where the last one ends; starts with 0, never falls.
        length: tokens in the row, T ≥ the last boundary.

    Returns:
        int64 numbers that never fall; those of empty sequences are left out. Padding after the last boundary has S.

    Raises:
        ShapeError: cu_seqlens has more than one axis or no sequence, or length is below the last boundary.
        DomainError: cu_seqlens is not of an integer dtype, does not start with 0, or falls.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ShapeError(
            f"segment_ids_from_cu_seqlens: expected boundaries (S + 1,) of at least one sequence, "
            f"got shape {tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise DomainError(
            f"segment_ids_from_cu_seqlens: expected boundaries of an integer dtype, got {cu_seqlens.dtype}."
        )
    boundaries = cu_seqlens.to(torch.int64)
    first, last = int(boundaries[0]), int(boundaries[-1])
    if first != 0 or bool((boundaries.diff() < 0).any()):
        raise DomainError(
            f"segment_ids_from_cu_seqlens: expected boundaries that start with 0 and never fall, "
            f"got {boundaries.tolist()}; give cumulative lengths, not lengths."
        )
    if last > length:
        raise ShapeError(
            f"segment_ids_from_cu_seqlens: expected a row of at least {last} tokens, the last boundary, got {length}."
        )
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(boundaries[1:].contiguous(), tokens, right=True)
