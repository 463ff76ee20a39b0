"""Encoded conversations into padded tensors.

A batch is padded to its longest row, on the side the tokenizer names. Position ids count real tokens only, so both
sides give the same loss. With routing, ``routes[b]`` is true where row b is labelled ESCALATE or REFUSE: its gradient
belongs to the safe factor of each gate, the gradient of ALLOW rows to the command factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from so8t_torch.core.errors import DataError
from so8t_torch.data.chat import IGNORED, Encoded
from so8t_torch.data.labels import Label


@dataclass(frozen=True)
class Collator:
    """Stack encoded rows into one batch.

    Args:
        pad_id: token id written into padding.
        side: where padding goes.
        routed: whether to add ``routes``, one boolean per row; every row then needs a label.
    """

    pad_id: int
    side: Literal["left", "right"]
    routed: bool = False

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels``, ``attention_mask``, ``position_ids`` (B, T) and perhaps ``routes`` (B,)."""
        for row in rows:
            if not row.supervised:
                raise DataError(f"{row.source}: the row has no supervised token; nothing can be learned from it.")
        length = max(len(row.input_ids) for row in rows)
        mask = torch.stack([self._pad([1] * len(row.input_ids), length, 0) for row in rows])
        batch = {
            "input_ids": torch.stack([self._pad(row.input_ids, length, self.pad_id) for row in rows]),
            "labels": torch.stack([self._pad(row.labels, length, IGNORED) for row in rows]),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1) * mask,
        }
        return batch | {"routes": torch.tensor([self._route(row) for row in rows])} if self.routed else batch

    def _pad(self, values: Sequence[int], length: int, fill: int) -> Tensor:
        padding = [fill] * (length - len(values))
        whole = [*padding, *values] if self.side == "left" else [*values, *padding]
        return torch.tensor(whole, dtype=torch.int64)

    def _route(self, row: Encoded) -> bool:
        if row.label is None:
            raise DataError(f"{row.source}: adapter.train_gates=routed needs a label for every row; this one has none.")
        return row.label > Label.ALLOW
