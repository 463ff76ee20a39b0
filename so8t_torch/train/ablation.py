"""What each physics term of a run does: the run without any, with each alone, and with all, side by side.

"Without" means weight 0: every term is measured in every run, so that the table also says what a term does to the
others. All runs have the same seed, data and steps. Written beside the runs: ``ablation.json`` and ``ablation.png``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Column, Table

from so8t_torch.core.config import parse_config
from so8t_torch.core.errors import ConfigError
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.folder import read_metrics, write_json
from so8t_torch.train.run import RunResult, run_training

WITHOUT, ALL = "without", "all"
TAIL = 0.2
"""Share of the log entries, at the end, over which values are averaged."""


@dataclass(frozen=True)
class Outcome:
    """One run: losses in nats per token at the end, mean values and last multipliers of the terms, seconds."""

    train: float
    held_out: float | None
    values: dict[str, float]
    multipliers: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Ablation:
    """The runs by name, and where they lie."""

    directory: Path
    outcomes: dict[str, Outcome]

    def table(self) -> Table:
        """Return a row per run: its losses, and its own term without and with it; ``ablation.json`` has all terms."""
        without = self.outcomes[WITHOUT].values
        run = Column("run", overflow="fold")
        table = Table(run, "train", "held-out", "term without", "with", "multiplier", "s", title="physics terms")
        for name, found in self.outcomes.items():
            held_out = "" if found.held_out is None else f"{found.held_out:.4f}"
            own = ("", "", "")
            if name in without:
                own = (f"{without[name]:.3g}", f"{found.values[name]:.3g}", f"{found.multipliers[name]:.2g}")
            table.add_row(name, f"{found.train:.4f}", held_out, *own, f"{found.seconds:.0f}")
        return table


def run_ablation(config: TrainConfig, train: Callable[[TrainConfig], RunResult] = run_training) -> Ablation:
    """Train without physics terms, with each alone, and with all.

    Args:
        config: a run with at least one term of a weight; ``output_dir`` takes a folder for each run.
        train: trains one run.

    Returns:
        What came out.

    Raises:
        ConfigError: no term has a weight.
        SO8TError: whatever stops a run.
    """
    weighted = [name for name, term in config.physics.terms.items() if term.weight > 0]
    if not weighted:
        raise ConfigError("physics.terms: expected at least one term with a weight above 0, got none to leave out.")
    chosen: dict[str, list[str]] = {
        WITHOUT: [],
        **{name: [name] for name in weighted},
        **({ALL: weighted} if len(weighted) > 1 else {}),
    }
    curves: dict[str, list[dict[str, Any]]] = {}
    outcomes = {}
    for name, kept in chosen.items():
        result = train(_only(config, kept, config.output_dir / name))
        curves[name] = [row for row in read_metrics(result.directory / "metrics.jsonl") if row["kind"] == "train"]
        outcomes[name] = _outcome(result, curves[name], list(config.physics.terms))
    write_json(config.output_dir / "ablation.json", {name: asdict(found) for name, found in outcomes.items()})
    _draw(curves, list(config.physics.terms), config.output_dir / "ablation.png")
    return Ablation(config.output_dir, outcomes)


def _only(config: TrainConfig, kept: list[str], directory: Path) -> TrainConfig:
    """Return the settings with the weights of all but some terms at 0."""
    tree = json.loads(config.model_dump_json())
    for name, term in tree["physics"]["terms"].items():
        term["weight"] = term["weight"] if name in kept else 0.0
    return parse_config(TrainConfig, {**tree, "output_dir": str(directory)})


def _outcome(result: RunResult, rows: list[dict[str, Any]], terms: list[str]) -> Outcome:
    last = rows[-max(1, round(TAIL * len(rows))) :]
    values = {term: _mean(last or rows, f"physics/{term}") for term in terms}
    multipliers = {term: float(rows[-1][f"physics/{term}/multiplier"]) for term in terms}
    return Outcome(_mean(last, "loss/lm"), result.held_out_after, values, multipliers, round(result.seconds, 1))


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    """Return the mean over the entries that have the value; a term is not measured in every step."""
    found = [row[name] for row in rows if name in row]
    return sum(found) / len(found) if found else float("nan")


def _draw(curves: Mapping[str, list[dict[str, Any]]], terms: list[str], path: Path) -> None:
    names = ["loss/lm", *(f"physics/{term}" for term in terms)]
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.5 * columns, 3 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for name, axes in zip(names, panels, strict=False):
        for number, (label, rows) in enumerate(curves.items()):
            told = [(row["step"], row[name]) for row in rows if name in row]
            if told:
                axes.plot(*zip(*told, strict=True), label=label, color=f"C{number % 10}", linewidth=1.2)
        axes.set(title=name, xlabel="step")
        if name != "loss/lm" and any(line.get_ydata().min() > 0 for line in axes.lines):
            axes.set_yscale("log")
    for axes in list(panels):
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize="small")
    figure.savefig(path, dpi=110)
