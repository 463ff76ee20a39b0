"""``curves.png``: what a run did, drawn from ``metrics.jsonl``, with what befell it, from ``events.jsonl``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from so8t_torch.train.folder import read_metrics
from so8t_torch.train.journal import read_rows

Rows = list[dict[str, Any]]

TRAIN, HELD_OUT, THIRD = "#1f5a99", "#c8501e", "#4b8b3b"


MARKS = {
    "skip": "#999999",
    "clip": "#b8860b",
    "cool": "#1b9e9e",
    "rollback": "#8e44ad",
    "reinitialise": "#d02090",
    "out of memory": "#7f5539",
    "stop": "#b00020",
    "resume": "#222222",
}
"""Colour of each kind of event."""


def draw_curves(
    metrics: Path, picture: Path, events: Path | None = None, others: Mapping[str, float] | None = None
) -> None:
    """Draw losses, gradient norm, learning rates and throughput against the optimiser step.

    A run with an adapter has its penalty and the geometry of its gates as well; one on text, bits per byte beside those
    of other methods where they are known, and perplexity.

    Args:
        metrics: ``metrics.jsonl`` of a run.
        picture: PNG to write.
        events: ``events.jsonl`` of the run; recoveries and resumes are marked in every panel.
        others: bits per byte of other methods on the held-out text, by name.
    """
    rows = read_metrics(metrics)
    train = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row["kind"] == "eval"]
    marks = [] if events is None else list(dict.fromkeys(read_marks(events)))
    whole = any("eval/bits_per_byte" in row for row in held_out)
    columns = 3 if whole else 4
    figure = Figure(figsize=(4.25 * columns, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns)
    _language_model(axes[0, 0], train, held_out)
    if whole:
        _bits(axes[0, 1], held_out, {} if others is None else others)
        _perplexity(axes[1, 2], train, held_out)
    else:
        _penalty(axes[0, 1], train)
        _angles(axes[0, 3], train)
        _commutator(axes[1, 2], train)
        _orthogonality(axes[1, 3], train)
    _gradient(axes[0, 2], train)
    _rates(axes[1, 0], train)
    _throughput(axes[1, 1], train)
    for axis in axes.flat:
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.25)
        for step, kind in marks:
            axis.axvline(step, color=MARKS[kind], linewidth=0.9, linestyle=(0, (4, 2)), alpha=0.8, zorder=0.5)
    if marks:
        _mark_legend(figure, marks)
    figure.suptitle(f"{metrics.parent.name}: {train[-1]['step'] if train else 0} steps")
    figure.savefig(picture, dpi=110)


def read_marks(events: Path) -> list[tuple[int, str]]:
    """Return step and kind of each recovery and resume, in the order in which they happened.

    Args:
        events: ``events.jsonl`` of a run; other events, and kinds without a colour, are passed over.

    Raises:
        DataError: as for ``read_rows``.
    """
    return [mark for row in read_rows(events) if (mark := _mark(row)) is not None]


def _mark(row: dict[str, Any]) -> tuple[int, str] | None:
    if row["event"] == "resume" and row.get("checkpoint"):
        return int(str(row["checkpoint"]).rpartition("-")[2]), "resume"
    if row["event"] == "rollback":
        return row["step"], "rollback"
    if row["event"] == "recovery":
        kind = row.get("stage") if row["transition"] == "fault" else row["transition"]
        kind = "stop" if kind == "post-mortem" else kind
        return (row["step"], kind) if kind in MARKS else None
    return None


def _mark_legend(figure: Figure, marks: list[tuple[int, str]]) -> None:
    counts = Counter(kind for _, kind in marks)
    lines = [Line2D([], [], color=MARKS[kind], linestyle="--", label=f"{kind} × {counts[kind]}") for kind in counts]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9, frameon=False)


def _line(axis: Axes, rows: Rows, name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 40 else ""
        axis.plot(steps, values, label=label, linewidth=1.6, marker=marker, markersize=3, **style)


def _legend(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_ylabel(unit)
    if axis.get_lines():
        axis.legend(fontsize=8, frameon=False)
    else:
        axis.text(0.5, 0.5, "not in this run", ha="center", va="center", transform=axis.transAxes, color="grey")


def _language_model(axis: Axes, train: Rows, held_out: Rows) -> None:
    _line(axis, train, "loss/lm", "training", color=TRAIN)
    _line(axis, held_out, "eval/lm", "held out", color=HELD_OUT, linestyle="--")
    _legend(axis, "language-model loss", "nats per supervised token")


def _penalty(axis: Axes, train: Rows) -> None:
    if any(row.get("pet_weight") for row in train):
        _line(axis, train, "loss/pet", "PET", color=TRAIN)
        _line(axis, train, "loss/pet_weighted", "λ · PET", color=HELD_OUT)
        axis.set_yscale("log")
    _legend(axis, "second-difference penalty", "mean squared Δ²h")


def _bits(axis: Axes, held_out: Rows, others: Mapping[str, float]) -> None:
    _line(axis, held_out, "eval/bits_per_byte", "this run", color=HELD_OUT)
    for (name, bits), shade in zip(others.items(), (TRAIN, THIRD, "grey"), strict=False):
        axis.axhline(bits, color=shade, linestyle=":", label=name.replace("_", " "))
    _legend(axis, "held-out text", "bits per byte")


def _perplexity(axis: Axes, train: Rows, held_out: Rows) -> None:
    _line(axis, train, "perplexity", "training", color=TRAIN)
    _line(axis, held_out, "eval/perplexity", "held out", color=HELD_OUT, linestyle="--")
    if axis.get_lines():
        axis.set_yscale("log")
    _legend(axis, "perplexity", "per supervised token")


def _angles(axis: Axes, train: Rows) -> None:
    names = list(dict.fromkeys(name for row in train for name in row if name.startswith("gate_angle/")))
    for place, name in enumerate(names):
        _line(axis, train, name, name.removeprefix("gate_angle/"), color=_shade(place, len(names)))
    _line(axis, train, "gate/max_angle", "largest of all", color="black", linestyle=":")
    _legend(axis, "gate angles, mean of each layer", "radians")


def _shade(place: int, count: int) -> tuple[float, float, float]:
    share = place / max(1, count - 1)
    return (0.1 + 0.75 * share, 0.35, 0.75 - 0.6 * share)


def _commutator(axis: Axes, train: Rows) -> None:
    _line(axis, train, "gate/commutator", "‖[R_safe, R_cmd]‖", color=TRAIN)
    _legend(axis, "commutator distance of the two factors", "Frobenius norm, mean")
    # One untrained factor is the identity and commutes: without a floor the axis would magnify rounding.
    axis.set_ylim(0, max(1e-3, axis.get_ylim()[1]))


def _rates(axis: Axes, train: Rows) -> None:
    names = list(dict.fromkeys(name for row in train for name in row if name.startswith("lr/")))
    for name, color in zip(names, (TRAIN, HELD_OUT, THIRD), strict=False):
        _line(axis, train, name, name.removeprefix("lr/"), color=color)
    _legend(axis, "learning rate", "")


def _gradient(axis: Axes, train: Rows) -> None:
    _line(axis, train, "grad_norm", "before clipping", color=TRAIN)
    if any(row.get("grad_norm", 0) > 0 for row in train):
        axis.set_yscale("log")
    _legend(axis, "gradient norm", "Euclidean norm")


def _orthogonality(axis: Axes, train: Rows) -> None:
    _line(axis, train, "gate/orthogonality_error", "largest of all gates", color=TRAIN)
    _legend(axis, "orthogonality error of the gates", "max |RᵀR − I|")
    axis.set_ylim(bottom=0)


def _throughput(axis: Axes, train: Rows) -> None:
    _line(axis, train, "tokens_per_second", "tokens/s", color=TRAIN)
    _legend(axis, "throughput", "tokens per second")
    axis.set_ylim(bottom=0)
