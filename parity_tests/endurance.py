"""More drawn examples than the test suite judges: every function of a room, in turn, until the room has had its share.

A function set is a room. Each round runs one situation of every pair, input strategy, size and dtype with examples that
no other round draws, forward and backward. Among thousands of draws some are ill-conditioned: no computation in their
precision is good there, and a budget declared for the suite's draws says nothing. What is red is therefore decided over
all rounds of a situation:

    in float64, where the truth is a float64 computation, too: a norm-wise error above 1e-11 (1e-10 for gradients), and
    every draw over the declared budget where half of them are
    below: an error above 1 eps and above four times the worst one of the definition evaluated in float32

Run: python -m parity_tests --examples 10000
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from parity_tests.harness.comparison import Deviation, ParityError
from parity_tests.harness.inputs import BATCH, size_label
from parity_tests.harness.judge import Truth, another_truth, judge_forward, judge_gradients, require
from parity_tests.harness.pair import OpPair, Size
from parity_tests.harness.production import run
from parity_tests.harness.values import sweep

_Kind = tuple[str, str, str, str]
"""Name of a pair, strategy, size and dtype."""
WITHIN, GRADIENTS_WITHIN = 1e-11, 1e-10
"""Largest norm-wise error in float64."""
LUCK = 4.0
"""Two sound computations of a sum that cancels differ by this much in error: 3.3 were seen (physics.decay_budget)."""
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
        drawn: dict[_Kind, list[_Draw]] = defaultdict(list)
        for number in itertools.count(1):
            if tally.examples >= examples:
                break
            for situation in situations:
                drawn[_kind(*situation)].append(_draw(*situation, number))
                tally.examples += BATCH
                if tally.examples >= examples:
                    break
        for kind, draws in drawn.items():
            _judge(tally, kind, draws)
        tally.seconds = time.monotonic() - began
        yield tally


class _Draw(NamedTuple):
    """One round of a situation: its number, what was measured, and the bars of the low precision by output."""

    number: int
    deviations: list[Deviation]
    bars: list[float | None]


def _kind(pair: OpPair, strategy: str, size: Size, dtype: str) -> _Kind:
    return pair.name, strategy, size_label(size), dtype


def _draw(pair: OpPair, strategy: str, size: Size, dtype: str, number: int) -> _Draw:
    expected = _where_both_are_not_finite(another_truth(pair, strategy, size, dtype, number))
    found = run(pair, expected.inputs, dtype, expected.cotangents if expected.gradients else None)
    deviations = [*judge_forward(expected, found), *judge_gradients(expected, found)]
    if found.structure != expected.structure:
        return _Draw(number, deviations, [None] * len(deviations))
    return _Draw(number, deviations, [e.straightforward for e in (*expected.outputs, *expected.gradients.values())])


def _judge(tally: Tally, kind: _Kind, draws: list[_Draw]) -> None:
    """Count the draws that are red by what all of them show."""
    allowed = _allowed(draws)
    for draw in draws:
        try:
            require([dataclasses.replace(d, allowed=allowed[d.what]) for d in draw.deviations])
        except ParityError as error:
            tally.failed += BATCH
            if len(tally.failures) < MOST_FAILURES:
                name, strategy, size, dtype = kind
                tally.failures.append(f"{name} {strategy} {size} {dtype}, situation {draw.number}: {error}")


def _allowed(draws: list[_Draw]) -> dict[str, float]:
    """Return the limit in eps of every output and gradient of a situation."""
    errors: dict[str, list[Deviation]] = defaultdict(list)
    bars: dict[str, list[float]] = defaultdict(list)
    for draw in draws:
        for deviation, bar in zip(draw.deviations, draw.bars, strict=True):
            errors[deviation.what].append(deviation)
            # where float32 overflows in plain arithmetic, it measures nothing
            bars[deviation.what] += [] if bar is None or not np.isfinite(bar) else [bar]
    found = {}
    for what, deviations in errors.items():
        dtype, budget = deviations[0].dtype, deviations[0].budget
        if bars[what]:
            found[what] = max(LUCK * max(bars[what]), 1.0)
        elif dtype not in ("float64", "complex128") or np.median([d.eps for d in deviations]) > budget:
            found[what] = budget
        else:
            within = GRADIENTS_WITHIN if what.startswith("gradient") else WITHIN
            found[what] = max(budget, within / float(np.finfo(dtype).eps))
    return found


def _where_both_are_not_finite(expected: Truth) -> Truth:
    """Return the same, with agreement on what is not finite as agreement: some draws cancel exactly."""
    outputs = tuple(dataclasses.replace(e, nonfinite=True) for e in expected.outputs)
    gradients = {position: dataclasses.replace(e, nonfinite=True) for position, e in expected.gradients.items()}
    return dataclasses.replace(expected, outputs=outputs, gradients=gradients)
