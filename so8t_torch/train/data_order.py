"""The order in which training reads its samples: one endless stream, and the spans of it that are left out.

    sample at position p = π_e(p mod n),   e = ⌊p / n⌋,   π_e a permutation drawn from (seed, e)
    epoch k of the loop reads the positions that are not left out, numbers k n … (k + 1) n − 1 of them

n samples. The order depends on nothing but the seed and the spans, never on a generator's state, so a run that goes on
from a checkpoint reads what it would have read. A roll-back adds a span behind the checkpoint's position: everything
before it keeps its place, and what the run learned last is not read again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from so8t_torch.core.errors import DataError

Span = tuple[int, int]
"""Positions of the stream from the first to the second, which does not belong to it."""


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return the same positions as sorted spans that neither touch nor overlap.

    Raises:
        DataError: a span is empty or begins before the stream.
    """
    found: list[Span] = []
    for first, last in sorted((int(a), int(b)) for a, b in spans):
        if not 0 <= first < last:
            raise DataError(f"A span of the stream needs 0 <= first < last, got {first}..{last}.")
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def before(spans: Iterable[Span], position: int) -> tuple[Span, ...]:
    """Return the part of the spans that lies before a position."""
    return merged((first, min(last, position)) for first, last in spans if first < position)


class Stream(Sampler[int]):
    """The sampler of a run.

    Args:
        count: number of samples.
        seed: of the orders.
        skipped: spans of positions to leave out.

    Raises:
        DataError: there is no sample.
    """

    def __init__(self, count: int, seed: int, skipped: Iterable[Span] = ()) -> None:
        if count < 1:
            raise DataError(f"The stream of samples needs at least one, got {count}.")
        self._count, self._seed, self._epoch = count, seed, 0
        self._skipped = merged(skipped)

    @property
    def skipped(self) -> tuple[Span, ...]:
        """The spans that are left out, sorted and apart."""
        return self._skipped

    @skipped.setter
    def skipped(self, spans: Iterable[Span]) -> None:
        self._skipped = merged(spans)

    def skip(self, span: Span) -> None:
        """Leave out one more span."""
        self._skipped = merged([*self._skipped, span])

    def set_epoch(self, epoch: int) -> None:
        """Choose the part of the stream that the next iteration reads."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        position, order, drawn = self.place(self._epoch * self._count), self._order(0), 0
        for _ in range(self._count):
            position = self._beyond(position)
            epoch, index = divmod(position, self._count)
            if epoch != drawn:
                order, drawn = self._order(epoch), epoch
            yield int(order[index])
            position += 1

    def place(self, number: int) -> int:
        """Return the position of the ``number``-th sample that is not left out."""
        for first, last in self._skipped:
            if number < first:
                break
            number += last - first
        return number

    def span(self, first: int, last: int) -> Span:
        """Return the positions from the ``first``-th to before the ``last``-th sample that is not left out."""
        return self.place(first), self.place(last - 1) + 1

    def _beyond(self, position: int) -> int:
        return next((last for first, last in self._skipped if first <= position < last), position)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._count)


@dataclass(frozen=True)
class Consumption:
    """How many samples the optimiser steps read.

    Args:
        samples: n.
        batch: rows of a micro-batch.
        processes: that train together, each with micro-batches of its own.
        accumulation: micro-batches of a process in one step.
    """

    samples: int
    batch: int
    processes: int
    accumulation: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; the last may have fewer micro-batches."""
        batches = math.ceil(math.ceil(self.samples / self.batch) / self.processes)
        return math.ceil(batches / self.accumulation)

    def after(self, step: int) -> int:
        """Return how many samples, of those not left out, the first ``step`` steps have read."""
        epoch, within = divmod(step, self.steps_per_epoch)
        read = within * self.accumulation * self.processes * self.batch
        return epoch * self.samples + min(self.samples, read)
