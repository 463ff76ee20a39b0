"""The long fuzz of the readers: 100,000 mutants of sound inputs, each read or refused by name within its bounds."""

from __future__ import annotations

import logging
import resource
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.faults.mutations import SEEDS, command, drawn, judged

TRIALS = 100_000
GROWTH_MIB = 256
"""Largest growth of this process's memory over all mutants together."""


class Row(NamedTuple):
    """One line of the table: what was counted, how often, how often it failed, the bound, how to see a failure."""

    figure: str
    trials: int
    failures: int
    bound: str
    command: str


def run(report: Callable[[str], None] = print, trials: int = TRIALS) -> list[Row]:
    """Read mutants of every kind in equal numbers.

    Args:
        report: is told of every failure, with the command that reproduces it.
        trials: in all.
    """
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    before = _resident_mib()
    rows = [_row(name, trials // len(SEEDS), report) for name in SEEDS]
    grown = _resident_mib() - before
    memory = Row("R20 memory grown, MiB", round(grown), int(grown > GROWTH_MIB), f"<= {GROWTH_MIB}", "")
    return [*rows, memory]


def _row(name: str, trials: int, report: Callable[[str], None]) -> Row:
    failed = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(trials):
            found = judged(name, drawn(seed), Path(folder))
            if found is not None:
                failed.append(seed)
                report(f"{command(name, seed)}: {found}")
    bound = f"0 (rate below {3 / trials:.1e})" if trials else "0"
    return Row(f"R20 mutants of {name}", trials, len(failed), bound, command(name, failed[0] if failed else 0))


def _resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
