"""How the tokens of a call lie in their rows: padding moved behind them, documents numbered, positions counted.

    order: tokens first, in their order, padding after them        inverse: back to the columns of the call
    position of a token = tokens of its document before it, those of earlier calls included

So that a block meets padding at the end of a row alone, and a row that is padded on the left runs like one that is not.
Masks and beginnings of documents are looked at, which waits for a device, so that rows without padding or without a
second document take the short way. Compiled and captured graphs cannot look, and take the long one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.core.readable import readable

__all__ = ["Rows", "lay_out"]


class Rows(NamedTuple):
    """The layout of B rows of N tokens.

    Attributes:
        positions: of each token in its document (B, N).
        counts: positions after the call (B,).
        real: False where a token is padding (B, N), which comes last in its row; nothing where there is none.
        documents: the number of each token's document in its row (B, N), that of the token before for padding; nothing
            where no row has a second one.
        order: column of the call that each place takes (B, N); nothing where they stay.
        inverse: place that each column went to.
        fresh: rows that begin a document where earlier calls left another (B,); nothing where none can.
    """

    positions: Int[Tensor, "b n"]
    counts: Int[Tensor, " b"]
    real: Bool[Tensor, "b n"] | None = None
    documents: Int[Tensor, "b n"] | None = None
    order: Int[Tensor, "b n"] | None = None
    inverse: Int[Tensor, "b n"] | None = None
    fresh: Bool[Tensor, " b"] | None = None

    def entering(self, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return what enters the call: nothing of it where a row begins a document."""
        if state is None or self.fresh is None:
            return state
        return {k: torch.where(self.fresh.view(-1, *(1,) * (t.ndim - 1)), 0, t) for k, t in state.items()}

    def lay(self, x: Tensor) -> Tensor:
        """Return columns (B, N, ...) in their places."""
        return _taken(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Return places (B, N, ...) in the columns of the call."""
        return _taken(x, self.inverse)


def lay_out(
    sizes: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    entering: Int[Tensor, " b"] | None = None,
) -> Rows:
    """Return the layout of a call.

    Args:
        sizes: B and N.
        device: of the call.
        attention_mask: 0 where a token is padding, (B, N) or longer: its last N columns count.
        segment_ids: equal numbers for the tokens of one document, (B, N) or (N,).
        position_ids: without segment_ids, a 0 begins a document; nothing else of them is read, because positions are
            counted.
        entering: positions that earlier calls left; the rows begin without.

    Raises:
        ShapeError: a shape does not fit.
        DomainError: segment or position ids are no whole numbers.
    """
    rows, length = sizes
    mask = _mask(attention_mask, rows, length)
    starts = _starts(segment_ids, position_ids, rows, length, mask)
    fresh = None
    if segment_ids is None and position_ids is not None and entering is not None:
        zeros = _numbers("position_ids", position_ids, rows, length) == 0
        first = zeros[:, :1] if mask is None else zeros.gather(1, mask.long().argmax(1, keepdim=True))
        fresh = first[:, 0] if mask is None else first[:, 0] & mask.any(1)
        entering = torch.where(fresh, 0, entering)
    order = inverse = None
    if mask is not None and length > 1:
        order = (~mask).long().argsort(dim=1, stable=True)
        inverse = order.argsort(dim=1)
        mask = mask.gather(1, order)
    began = torch.zeros(rows, dtype=torch.int64, device=device) if entering is None else entering
    places = torch.arange(length, device=device)
    counted = mask.sum(1) if mask is not None else torch.full_like(began, length)
    starts = None if starts is None else _document_starts(starts, mask, order)
    if starts is None or _none(starts):
        return Rows(began[:, None] + places, began + counted, mask, None, order, inverse, fresh)
    documents = starts.long().cumsum(1)
    positions = places - torch.where(starts, places, -began[:, None]).cummax(1).values
    last = positions.gather(1, (counted - 1).clamp(min=0)[:, None])[:, 0] + 1
    return Rows(positions, torch.where(counted > 0, last, began), mask, documents, order, inverse, fresh)


def _mask(attention_mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Return where tokens are real, or nothing where all are."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or len(attention_mask) != rows or attention_mask.shape[1] < length:
        raise ShapeError(
            f"expected an attention_mask ({rows}, {length}), or longer by what was seen before, got "
            f"{tuple(attention_mask.shape)}; recurrent blocks know padding alone, no mask between pairs of tokens."
        )
    mask = attention_mask[:, -length:] != 0
    return None if _none(~mask) else mask


def _starts(
    segment_ids: Tensor | None, position_ids: Tensor | None, rows: int, length: int, mask: Tensor | None
) -> Tensor | None:
    """Return numbers whose change begins a document (B, N), in the columns of the call, or nothing."""
    if segment_ids is not None:
        return _numbers("segment_ids", segment_ids, rows, length)
    if position_ids is None or length == 1:
        return None
    begins = _numbers("position_ids", position_ids, rows, length) == 0
    if mask is not None:
        # the first token that counts begins its row, wherever it stands
        begins = begins & mask & (mask.long().cumsum(1) > 1)
    return pad(begins[:, 1:], (1, 0)).long().cumsum(1)


def _numbers(name: str, ids: Tensor, rows: int, length: int) -> Tensor:
    if ids.shape not in ((length,), (1, length), (rows, length)):
        raise ShapeError(f"expected {name} ({rows}, {length}) or ({length},), got {tuple(ids.shape)}.")
    if ids.is_floating_point() or ids.is_complex():
        raise DomainError(f"expected whole numbers in {name}, got {ids.dtype}; convert them.")
    return ids.expand(rows, length)


def _document_starts(numbers: Tensor, mask: Tensor | None, order: Tensor | None) -> Tensor:
    """Return which places begin a document inside the call; padding begins none."""
    numbers = _taken(numbers, order)
    starts = pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))
    return starts if mask is None else starts & mask


def _none(marks: Tensor) -> bool:
    """Return whether no mark is set, which a device is waited for; where there are no values yet, that one may be."""
    return readable(marks, waiting=True) and not bool(marks.any())


def _taken(x: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return x
    return x.gather(1, index.reshape(*index.shape, *(1,) * (x.ndim - 2)).expand_as(x))
