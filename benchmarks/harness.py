"""Times rivals side by side and writes rows, a table and a plot.

A benchmark is a module with ``COMPONENT`` (name), ``ROOM`` (the room whose parity must be green) and ``cases()``.
Rivals of a case run interleaved on one thread; the unit is CPU time of the process, which a busy machine disturbs
least. Everything is run twice, with the C library's default memory settings and with settings that keep freed
memory, because a page fault costs as much as the arithmetic; the smaller ratio of the two is the honest one.
A speed is printed only after ``parity_tests`` has judged the room green in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the drawing backend has to be chosen first

RESULTS = Path(__file__).parent.parent / "docs" / "bench"
MALLOC = {
    "default": {},
    "kept": {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "MALLOC_TOP_PAD_": "268435456",
    },
}


@dataclass(frozen=True)
class Rival:
    """One implementation of a case; ``run`` does the work once, ``must`` is the ratio that ours has to reach."""

    name: str
    run: Callable[[], object]
    must: float | None = None


@dataclass(frozen=True)
class Case:
    """Rivals that do the same work; the first is ours."""

    name: str
    shape: str
    dtype: str
    rivals: tuple[Rival, ...]
    repeats: int = 15


@dataclass(frozen=True)
class Row:
    """One rival against ours under one memory setting; times are milliseconds of CPU time."""

    component: str
    case: str
    shape: str
    dtype: str
    malloc: str
    rival: str
    ours_ms: float
    ours_spread_ms: float
    rival_ms: float
    rival_spread_ms: float
    ratio: float
    must: float | None


def interleave(rivals: Sequence[Rival], repeats: int) -> dict[str, list[float]]:
    """Return CPU milliseconds of each rival, run in turn ``repeats`` times after two warm-up rounds."""
    times: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for round_ in range(repeats + 2):
        for rival in rivals:
            start = time.process_time()
            rival.run()
            if round_ >= 2:
                times[rival.name].append((time.process_time() - start) * 1e3)
    return times


def spread(samples: Sequence[float]) -> float:
    """Return half the interquartile range."""
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2


def rows(component: str, cases: Iterable[Case], malloc: str) -> list[Row]:
    """Time every case and compare its first rival with each of the others."""
    found = []
    for case in cases:
        times = interleave(case.rivals, case.repeats)
        ours = times[case.rivals[0].name]
        for rival in case.rivals[1:]:
            theirs = times[rival.name]
            medians = statistics.median(ours), statistics.median(theirs)
            found.append(
                Row(
                    component, case.name, case.shape, case.dtype, malloc, rival.name,
                    medians[0], spread(ours), medians[1], spread(theirs), medians[1] / medians[0], rival.must,
                )
            )  # fmt: skip
    return found


def environment() -> dict[str, str]:
    """Return what a reader needs to judge the figures: processor, threads and versions."""
    names = ("torch", "peft", "triton", "transformers", "numpy")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "threads": "1",
        "unit": "ms of process CPU time, median ± half interquartile range",
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def run(module: str) -> int:
    """Command line of a benchmark module; returns the exit status (1 when a ``must`` is missed)."""
    parser = argparse.ArgumentParser(description=importlib.import_module(module).__doc__)
    parser.add_argument("--child", choices=MALLOC, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    arguments = parser.parse_args()
    benchmark = importlib.import_module(module)
    if arguments.child:
        torch.set_num_threads(1)
        json.dump([asdict(row) for row in rows(benchmark.COMPONENT, benchmark.cases(), arguments.child)], sys.stdout)
        return 0
    judged = subprocess.run(
        [sys.executable, "-m", "parity_tests", "--pair", f"{benchmark.ROOM}.", "--no-write"], check=False
    )
    if judged.returncode:
        Console(stderr=True).print(f"parity of {benchmark.ROOM} is red: no speed is reported for a wrong result.")
        return 1
    found = [Row(**row) for malloc in MALLOC for row in _child(module, malloc)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "rows": [asdict(row) for row in found]}
    (arguments.output / f"{benchmark.COMPONENT}-cpu.json").write_text(json.dumps(document, indent=1) + "\n")
    _plot(found, arguments.output / f"{benchmark.COMPONENT}-cpu.png")
    Console(width=150).print(_table(found))
    return int(any(row.must is not None and row.ratio < row.must for row in found))


def _child(module: str, malloc: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", module, "--child", malloc]
    settings = {**os.environ, **MALLOC[malloc], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=settings, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _table(found: Sequence[Row]) -> Table:
    table = Table(title="CPU time, one thread; ratio > 1 means that ours is faster")
    for column in ("case", "shape", "dtype", "memory", "rival", "ours ms", "rival ms", "ratio", "must"):
        table.add_column(column, justify="left" if column in ("case", "rival") else "right")
    for row in found:
        colour = "" if row.must is None else "[green]" if row.ratio >= row.must else "[red]"
        table.add_row(
            row.case, row.shape, row.dtype, row.malloc, row.rival,
            f"{row.ours_ms:.2f} ± {row.ours_spread_ms:.2f}", f"{row.rival_ms:.2f} ± {row.rival_spread_ms:.2f}",
            f"{colour}{row.ratio:.2f}", "" if row.must is None else f"{row.must:g}",
        )  # fmt: skip
    return table


def _plot(found: Sequence[Row], path: Path) -> None:
    names = list(dict.fromkeys((row.case, row.dtype, row.rival, row.must) for row in found))
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.4), layout="constrained")
    for offset, (malloc, colour) in zip((-0.2, 0.2), (("default", "#4477aa"), ("kept", "#88ccee")), strict=True):
        ratios = {(r.case, r.dtype, r.rival, r.must): r.ratio for r in found if r.malloc == malloc}
        positions = [i + offset for i, name in enumerate(names) if name in ratios]
        bars = axes.barh(
            positions, [ratios[n] for n in names if n in ratios], 0.38, color=colour, label=f"memory: {malloc}"
        )
        axes.bar_label(bars, fmt="%.2f×", padding=3, fontsize=8)
    for i, name in enumerate(names):
        if name[3] is not None:
            axes.plot(
                [name[3]] * 2, [i - 0.45, i + 0.45], color="#cc3311", linewidth=2, label="goal" if i == 0 else None
            )
    axes.set_yticks(range(len(names)), [f"{case} ({dtype}) vs {rival}" for case, dtype, rival, _ in names])
    axes.invert_yaxis()
    axes.set_xlabel("rival's time ÷ our time")
    ratios = [row.ratio for row in found]
    if max(ratios) > 3:
        axes.set_xscale("log")
    axes.set_xlim(min(0.9, 0.8 * min(ratios)) if max(ratios) > 3 else 0, 1.6 * max(ratios))
    axes.axvline(1, color="black", linewidth=0.8)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
