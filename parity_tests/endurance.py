"""More drawn examples than the test suite judges: every function of a room, in turn, until the room has had its share.

A function set is a room. Each round judges one situation of every pair, input strategy, size and dtype with examples
that no other round draws, forward and backward, within the budgets of the declaration.

Run: python -m parity_tests --examples 10000
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from parity_tests.harness.comparison import ParityError
from parity_tests.harness.inputs import BATCH, size_label
from parity_tests.harness.judge import Truth, another_truth, judge_forward, judge_gradients, require
from parity_tests.harness.pair import OpPair, Size
from parity_tests.harness.production import run
from parity_tests.harness.values import sweep

MOST_FAILURES = 5
"""Failures of a room that are told; the rest are counted."""


@dataclass
class Tally:
    """How a room did: examples judged, those of red situations, the first failures, and seconds."""

    room: str
    examples: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def endure(pairs: Sequence[OpPair], examples: int) -> Iterator[Tally]:
    """Yield one tally per room after at least ``examples`` of its examples were judged.

    Args:
        pairs: declarations.
        examples: least number per room.
    """
    rooms: dict[str, list[OpPair]] = defaultdict(list)
    for pair in pairs:
        rooms[pair.name.partition(".")[0]].append(pair)
    for room, members in rooms.items():
        tally, began = Tally(room), time.monotonic()
        situations = [(pair, *each) for pair in members for each in sweep(pair)]
        for number in itertools.count(1):
            if tally.examples >= examples:
                break
            for situation in situations:
                _judge(tally, *situation, number)
                if tally.examples >= examples:
                    break
        tally.seconds = time.monotonic() - began
        yield tally


def _judge(tally: Tally, pair: OpPair, strategy: str, size: Size, dtype: str, number: int) -> None:
    expected = _where_both_are_not_finite(another_truth(pair, strategy, size, dtype, number))
    found = run(pair, expected.inputs, dtype, expected.cotangents if expected.gradients else None)
    tally.examples += BATCH
    try:
        require([*judge_forward(expected, found), *judge_gradients(expected, found)])
    except ParityError as error:
        tally.failed += BATCH
        if len(tally.failures) < MOST_FAILURES:
            where = f"{pair.name} {strategy} {size_label(size)} {dtype}, situation {number}"
            tally.failures.append(f"{where}: {error}")


def _where_both_are_not_finite(expected: Truth) -> Truth:
    """Return the same, with agreement on what is not finite as agreement: some draws cancel exactly."""
    outputs = tuple(dataclasses.replace(e, nonfinite=True) for e in expected.outputs)
    gradients = {position: dataclasses.replace(e, nonfinite=True) for position, e in expected.gradients.items()}
    return dataclasses.replace(expected, outputs=outputs, gradients=gradients)
