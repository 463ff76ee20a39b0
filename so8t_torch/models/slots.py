"""A batch for decoding that sequences join and leave at any time, without running anything again.

A sequence that joins is read on its own, and its state is copied into a free row; a row that is free, or waits, is
padding in every step, and its state stays where it is. Memory depends on the number of rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.models.language_model import RecurrentForCausalLM
from so8t_torch.models.states import RecurrentCache, copy_row, state_bytes, write_positions, write_states

__all__ = ["SlotPool"]


class SlotPool:
    """Rows of states for sequences that are decoded together.

    Args:
        model: in evaluation mode.
        slots: rows, at least 1.

    Raises:
        ConfigError: no row, or a model in training mode.
    """

    def __init__(self, model: RecurrentForCausalLM, slots: int) -> None:
        if slots < 1:
            raise ConfigError(f"SlotPool: expected slots ≥ 1, got {slots}.")
        if model.training:
            raise ConfigError("SlotPool: expected a model in evaluation mode; call model.eval().")
        self.model, self.slots = model, slots
        self.taken: set[int] = set()
        self.cache = RecurrentCache(model.config)
        blocks: list[Any] = list(model.model.layers)
        for number, block in enumerate(blocks):
            write_states(self.cache, number, block.initial_state(slots, model.device, model.dtype))
        write_positions(self.cache, torch.zeros(slots, dtype=torch.int64, device=model.device), 0)

    @property
    def bytes(self) -> int:
        """Bytes of all rows, whatever their sequences have read."""
        return state_bytes(self.cache)

    @torch.no_grad()
    def join(self, prompt: Int[Tensor, " n"]) -> tuple[int, Float[Tensor, " v"]]:
        """Read a sequence, and return the row that it got and the logits of its next token.

        Args:
            prompt: ids.

        Raises:
            ConfigError: no row is free.
            ShapeError: the prompt is not one row of ids.
        """
        free = sorted(set(range(self.slots)) - self.taken)
        if not free:
            raise ConfigError(f"SlotPool: expected a free row, all {self.slots} are taken; let one leave first.")
        if prompt.ndim != 1:
            raise ShapeError(f"SlotPool: expected ids (N,), got {tuple(prompt.shape)}.")
        read = self.model(prompt[None], use_cache=True, logits_to_keep=1)
        copy_row(self.cache, free[0], read.past_key_values)
        self.taken.add(free[0])
        return free[0], read.logits[0, -1]

    @torch.no_grad()
    def step(self, tokens: Mapping[int, int]) -> dict[int, Float[Tensor, " v"]]:
        """Give some sequences a token each, and return the logits of what comes next, by row.

        Args:
            tokens: id by row; sequences without one wait.

        Raises:
            ConfigError: a row is not taken, or there is no token at all.
        """
        self._check(tokens)
        if not tokens:
            raise ConfigError("SlotPool: expected a token for at least one row, got none.")
        device, rows = self.model.device, list(tokens)
        ids, mask = (torch.zeros(self.slots, 1, dtype=torch.int64, device=device) for _ in range(2))
        ids[rows, 0], mask[rows, 0] = torch.tensor(list(tokens.values()), device=device), 1
        logits = self.model(ids, attention_mask=mask, past_key_values=self.cache, use_cache=True).logits
        return {row: logits[row, -1] for row in rows}

    def leave(self, row: int) -> None:
        """Free a row.

        Args:
            row: of a sequence.

        Raises:
            ConfigError: it is not taken.
        """
        self._check({row: 0})
        copy_row(self.cache, row, None)
        self.taken.remove(row)

    def _check(self, rows: Mapping[int, int]) -> None:
        unknown = sorted(rows.keys() - self.taken)
        if unknown:
            raise ConfigError(f"SlotPool: expected rows out of {sorted(self.taken)}, which are taken, got {unknown}.")
