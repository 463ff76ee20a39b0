"""Tasks that need a memory: associative recall, copying and selective copying across a chosen distance.

    recall          k₁ v₁ … k_n v_n   noise …   k_π(1) v_π(1) … k_π(n) v_π(n)
    copy            mark c₁ … c_n   noise …   mark c₁ … c_n
    selective_copy  mark, c₁ … c_n in order, each at a random place of 4n tokens of noise,   noise …   mark c₁ … c_n

Symbols: n items; k keys, all different in a row, v values, c letters; π a random order. What follows the last noise is
asked for: v after its key, c after the second mark and the letters before it. Every other label is ignored.
The distance is the least number of tokens from a key to the same key when it is asked, or from a letter to the token
that has to be followed by it. Noise has tokens of its own, so that nothing but what was written tells the answer.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from so8t_torch.core.config import Section
from so8t_torch.core.errors import ConfigError
from so8t_torch.data.chat import IGNORED

__all__ = ["TASKS", "Batch", "RecallSection"]

Task = Literal["recall", "copy", "selective_copy"]
TASKS: tuple[Task, ...] = ("recall", "copy", "selective_copy")
MARK = 0
SPREAD = 4
"""Tokens of the stretch over which the letters of a selective copy are scattered, per letter."""


class Batch(NamedTuple):
    """Rows of one length; ``labels`` repeats the tokens that are asked for, as a causal language model expects."""

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]


class RecallSection(Section):
    """What is to be remembered, and how many tokens there are: a mark, keys, values (the letters), noise."""

    task: Task = Field(default="recall", description="recall, copy or selective_copy.")
    items: int = Field(default=8, ge=1, description="Pairs or letters of a row.")
    symbols: int = Field(default=32, ge=2, description="Different keys, and different values.")
    noise: int = Field(default=32, ge=1, description="Different tokens of the noise.")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return 1 + 2 * self.symbols + self.noise

    @property
    def least_distance(self) -> int:
        """The distance without any noise between what is written and what is asked."""
        return 2 if self.task == "recall" else self.items

    def length(self, distance: int) -> int:
        """Return the number of tokens of a row."""
        written, asked = self._lengths()
        return written + self._gap(distance) + asked

    def batch(self, rows: int, distance: int, generator: torch.Generator) -> Batch:
        """Return rows that ask across a distance, on the CPU.

        Args:
            rows: B, at least 1.
            distance: see the module; at least ``least_distance``.
            generator: of all that is random, on the CPU.

        Raises:
            ConfigError: a number is too small, or a row has more pairs than there are keys.
        """
        if rows < 1:
            raise ConfigError(f"RecallSection: expected at least one row, got {rows}.")
        gap = self._gap(distance)
        noise = self._noise(rows, gap, generator)
        written, asked, answers = (self._pairs if self.task == "recall" else self._letters)(rows, generator)
        input_ids = torch.cat([written, noise, asked], 1)
        silent = torch.full((rows, written.shape[1] + gap), IGNORED)
        return Batch(input_ids, torch.cat([silent, torch.where(answers, asked, IGNORED)], 1))

    def _lengths(self) -> tuple[int, int]:
        """Return the number of tokens of what is written, and of what is asked."""
        if self.task == "recall":
            return 2 * self.items, 2 * self.items
        return 1 + self.items * (SPREAD if self.task == "selective_copy" else 1), 1 + self.items

    def _gap(self, distance: int) -> int:
        """Return the number of tokens of noise in between."""
        if distance < self.least_distance:
            raise ConfigError(
                f"RecallSection: expected a distance of {self.least_distance} or more for {self.items} items of the "
                f"task {self.task!r}, got {distance}; ask for fewer items or a longer distance."
            )
        if self.task == "recall" and self.items > self.symbols:
            raise ConfigError(
                f"RecallSection: expected at most as many pairs as keys, got items={self.items} and "
                f"symbols={self.symbols}; ask for more symbols."
            )
        return distance - self.least_distance

    def _noise(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        return 1 + 2 * self.symbols + torch.randint(self.noise, (rows, length), generator=generator)

    def _values(self, rows: int, generator: torch.Generator) -> Tensor:
        return 1 + self.symbols + torch.randint(self.symbols, (rows, self.items), generator=generator)

    def _pairs(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs, the pairs in another order, and where the latter are answers."""
        keys = 1 + torch.rand(rows, self.symbols, generator=generator).argsort(1)[:, : self.items]
        values = self._values(rows, generator)
        order = torch.rand(rows, self.items, generator=generator).argsort(1)
        written = torch.stack([keys, values], 2).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
        return written, asked, (torch.arange(2 * self.items) % 2 == 1).expand_as(asked)

    def _letters(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return a mark and the letters, perhaps within noise, then both again, and where the latter are answers."""
        letters = written = self._values(rows, generator)
        if self.task == "selective_copy":
            length = SPREAD * self.items
            places = torch.rand(rows, length, generator=generator).argsort(1)[:, : self.items].sort(1).values
            written = self._noise(rows, length, generator).scatter(1, places, letters)
        mark = torch.full((rows, 1), MARK)
        written, asked = (torch.cat([mark, part], 1) for part in (written, letters))
        return written, asked, (torch.arange(self.items + 1) > 0).expand_as(asked)
