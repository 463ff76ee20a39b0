"""The table a reader sees: how far production is from the definition, pair by pair and dtype by dtype.

Each row is the worst case over all input strategies and, in the first dtype, over all sizes, and over all outputs or
all gradients of a pair. Everything is drawn from fixed seeds, so that the page changes only when the code does.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import Deviation, ParityError
from parity_tests.harness.judge import judge_forward, judge_gradients, require, truth
from parity_tests.harness.pair import OpPair, Size
from parity_tests.harness.production import run
from parity_tests.harness.values import sweep

PAGE = Path(__file__).parent.parent / "docs" / "numerics.md"
PACKAGES = ("torch", "jax", "jaxlib", "numpy")
HEADINGS = ("pair", "pass", "dtype", "max abs", "relative L2", "× eps", "ulp", "budget", "verdict")
COMMAND = "so8t parity"
CALL_ERRORS = (AssertionError, RuntimeError, ValueError, TypeError, NotImplementedError)
"""What makes a row red with its text instead of ending the report."""

NOT_PROVED = """\
## What this table does not prove

- It samples. The inputs are the named strategies of each declaration at fixed seeds, and the laws are drawn by
  hypothesis; an input that no strategy draws is not covered.
- It compares with the definition. Where the definition itself is wrong in the same way as its dense oracle and its
  laws, everything here is green.
- A budget is relative to the largest entry of each example. Small entries beside large ones may have a large
  relative error of their own and still pass.
- Below float64 the truth is the definition in float64 on the *rounded* inputs: the error made by rounding the
  inputs themselves is real in use and is not in the table.
- float64 has no higher truth here except where an oracle has one; its rows say that two float64 computations agree.
- The figures are those of the CPU path that `backend="auto"` takes. Other backends are judged by the same cases in
  the test suite; without a CUDA device the compiled Triton kernels are interpreted, never run.
- `torch.compile` is judged with its tracing and differentiation (`aot_eager`), not with the code that Inductor
  generates.
- Agreement is not speed, and not the quality of anything trained with it.
"""


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst deviation of one pair, forward or backward, in one dtype."""

    pair: str
    direction: str
    dtype: str
    worst: Deviation
    red: str | None

    @property
    def cells(self) -> tuple[str, ...]:
        """What is printed, with figures rounded so that they are stable."""
        if self.worst.problem is not None:
            return (self.pair, self.direction, self.dtype, "", "", "", "", "", self.verdict)
        w = self.worst
        figures = (f"{w.max_abs:.1e}", f"{w.relative_l2:.1e}", f"{w.eps:.2g}", f"{w.ulp:.2g}", f"{w.allowed:.3g}")
        return (self.pair, self.direction, self.dtype, *figures, self.verdict)

    @property
    def verdict(self) -> str:
        """``green``, or why not."""
        return "green" if self.red is None else f"RED: {self.red}"


def judge_pair(pair: OpPair) -> list[Row]:
    """Return the rows of one pair, forward and backward, in every dtype.

    Args:
        pair: the declaration.
    """
    found: dict[tuple[str, str], list[Deviation]] = {}
    for strategy, size, dtype in sweep(pair):
        for direction, judge in (("forward", _forward), ("gradient", _gradient)):
            if direction == "forward" or pair.wrt:
                found.setdefault((direction, dtype), []).extend(judge(pair, strategy, size, dtype))
    rows = [_row(pair, direction, dtype, deviations) for (direction, dtype), deviations in found.items()]
    return sorted(rows, key=lambda row: row.direction)


def _forward(pair: OpPair, strategy: str, size: Size, dtype: str) -> list[Deviation]:
    expected = truth(pair, strategy, size, dtype)
    try:
        found = run(pair, expected.inputs, dtype)
    except CALL_ERRORS as error:
        return [Deviation("call", dtype, problem=f"{type(error).__name__}: {error}")]
    return judge_forward(expected, found)


def _gradient(pair: OpPair, strategy: str, size: Size, dtype: str) -> list[Deviation]:
    expected = truth(pair, strategy, size, dtype)
    try:
        found = run(pair, expected.inputs, dtype, expected.cotangents)
    except CALL_ERRORS as error:
        return [Deviation("gradients", dtype, problem=f"{type(error).__name__}: {error}")]
    return judge_gradients(expected, found)


def _row(pair: OpPair, direction: str, dtype: str, deviations: list[Deviation]) -> Row:
    worst = max(deviations, key=_severity)
    try:
        require(deviations)
    except ParityError as error:
        return Row(pair.name, direction, dtype, worst, str(error).partition("\n")[0])
    return Row(pair.name, direction, dtype, worst, None)


def _severity(deviation: Deviation) -> tuple[bool, float]:
    share = deviation.eps / deviation.allowed if deviation.allowed > 0 else deviation.eps
    return deviation.problem is not None, share


def judge_cases(generated: Iterable[Case]) -> Iterator[tuple[Case, str | None]]:
    """Yield every case that can run in this process with the text of its failure, or ``None``.

    A known gap that no longer fails is a failure too.
    """
    for case in generated:
        if case.unavailable is not None:
            continue
        failure: str | None = None
        try:
            case.run()
        except CALL_ERRORS as error:
            failure = f"{type(error).__name__}: {error}"
        if case.known_gap is not None:
            failure = None if failure else f"declared as a known gap ({case.known_gap}), but it passes: remove it"
        yield case, failure


def judge_table(pairs: Iterable[OpPair], progress: Callable[[str], None] | None = None) -> list[Row]:
    """Return the rows of every pair.

    Args:
        pairs: the table.
        progress: told each pair's name before it is judged, if given.
    """
    rows = []
    for pair in pairs:
        if progress is not None:
            progress(pair.name)
        rows += judge_pair(pair)
    return rows


def rich_table(rows: Iterable[Row]) -> Table:
    """Return the table for a terminal."""
    table = Table(title="production against definition", header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold", justify="left" if heading in HEADINGS[:3] else "right")
    for row in rows:
        table.add_row(*row.cells, style=None if row.red is None else "bold red")
    return table


def markdown(rows: list[Row]) -> str:
    """Return the page ``docs/numerics.md``: fixed seeds, no times, no machine."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    green = sum(row.red is None for row in rows)
    lines = [
        "# Numerics",
        "",
        f"Written by `{COMMAND}` ({versions}). {green} of {len(rows)} rows are green.",
        "",
        "Each row is the case nearest to its limit over all declared inputs (and, in float64, all sizes). The error "
        "is max|x̂ − x| / max|x| of the worst example in units of eps of the result's dtype; *budget* is the accepted "
        "number of eps: the declared one, and below float64 never more than twice the error of the definition "
        "evaluated in float32 and rounded once (or 1 eps). *ulp* counts units in the last place of the largest entry.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(row.cells) + " |" for row in rows),
        "",
        NOT_PROVED,
    ]
    return "\n".join(lines)
