"""How the quick start is shown: tables for the terminal, the same numbers in Markdown, and one picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from so8t_torch.safety.evaluation import TriageReport
from so8t_torch.safety.intervals import Rate
from so8t_torch.train.folder import read_metrics

if TYPE_CHECKING:
    from so8t_torch.train.demo import Comparison, Outcome

TITLES = {"base": "base alone", "lora": "LoRA", "gates": "gates", "lora_gates": "LoRA + gates"}
COLORS = {"base": "#9a9a9a", "lora": "#1f5a99", "gates": "#4b8b3b", "lora_gates": "#c8501e"}
KINDS = {"state": "unseen states", "frame": "unseen frames", "both": "both unseen"}
Rows = list[tuple[str, ...]]


def render(comparison: Comparison) -> Group:
    """Return the comparison for a terminal."""
    tables = [
        _table("held-out accuracy [95 % interval, one observation per state]", *_accuracy(comparison)),
        _table("all held-out tellings: safety first, then what was written and forgotten", *_safety(comparison)),
        _table("geometry of the gates, angles in radians", *_geometry(comparison.outcomes)),
        comparison.baked.table(),
    ]
    return Group(*tables, *(f"• {sentence}" for sentence in findings(comparison)))


def write_markdown(comparison: Comparison, path: Path) -> None:
    """Write the tables and findings as Markdown.

    Args:
        comparison: what was measured.
        path: file to write.
    """
    parts = [
        "# Quick start",
        "Held-out accuracy by likelihood of the label, with 95 % Wilson intervals of one observation per state.",
        _markdown(*_accuracy(comparison)),
        _markdown(*_safety(comparison)),
        "Angles in radians.",
        _markdown(*_geometry(comparison.outcomes)),
        "\n".join(f"- {sentence}" for sentence in findings(comparison)),
        "![comparison](comparison.png)",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def findings(comparison: Comparison) -> list[str]:
    """Return what the numbers say, in sentences; the winner is named whoever it is."""
    by_name = {outcome.name: outcome for outcome in comparison.outcomes}
    ranked = sorted(by_name.values(), key=lambda o: -_share(o.by_novelty["state"].likelihood.accuracy))
    best, second = ranked[0], ranked[1]
    first, next_one = (o.by_novelty["state"].likelihood.accuracy for o in (best, second))
    ahead, groups = _share(first) - _share(next_one), first.groups
    gates, lora = by_name["gates"], by_name["lora"]
    reading = comparison.base["reading"]
    baked, machine = comparison.baked, comparison.machine
    return [
        f"On unseen states {TITLES[best.name]} leads {TITLES[second.name]} by {ahead:.2f}; with {groups} unseen states "
        f"a difference under about {2 * 0.5 / groups**0.5:.2f} may be chance.",
        f"Gates alone ({gates.trainable:,} numbers) fit {_share(gates.fitted.likelihood.accuracy):.2f} of the training "
        f"tellings, LoRA ({lora.trainable:,}) {_share(lora.fitted.likelihood.accuracy):.2f}; always "
        f"the commonest label {_constant(gates.fitted)}. A gate turns blocks of eight channels that the base's "
        "attention writes anyway: it cannot bring in a fact that they do not hold.",
        f"The base reads {reading['none']:.2f} of fresh tellings exactly, {reading['state']:.2f} of unseen states, "
        f"{reading['frame']:.2f} of unseen frames, {reading['both']:.2f} of both; it saw no label of any state.",
        f"Folded weights: max |Δlogit| {baked.written.max_abs:.1e} against the gated model (bound "
        f"{baked.tolerance:.1e}, noise of the machine {max(baked.noise_threads, baked.noise_batch):.1e}).",
        f"{comparison.seconds['whole']:.0f} s on {machine['threads']} thread(s) ({machine['processor_seconds']:.0f} "
        f"processor seconds), peak memory {machine['peak_rss_gib']:.2f} GiB.",
    ]


def draw_comparison(comparison: Comparison, runs: Path, picture: Path) -> None:
    """Draw accuracy by kind of novelty, training loss, and what was forgotten.

    Args:
        comparison: what was measured.
        runs: folder with one run folder per variant.
        picture: PNG to write.
    """
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, loss, forgetting = figure.subplots(1, 3, width_ratios=(1.9, 1.1, 0.9))
    _draw_accuracy(accuracy, comparison)
    _draw_loss(loss, comparison, runs)
    _draw_forgetting(forgetting, comparison)
    figure.suptitle(
        f"One frozen 4-bit Phi-3 of {comparison.base['parameters'] / 1e6:.2f} M parameters, "
        f"{comparison.steps} steps each, same data and seed",
        fontsize=12,
    )
    figure.savefig(picture, dpi=120)


def _draw_accuracy(axis: Axes, comparison: Comparison) -> None:
    width = 0.8 / len(comparison.outcomes)
    for place, outcome in enumerate(comparison.outcomes):
        rates = [outcome.fitted.likelihood.accuracy]
        rates += [outcome.by_novelty[kind].likelihood.accuracy for kind in KINDS]
        for i, measured in enumerate(rates):
            x = i + (place - (len(comparison.outcomes) - 1) / 2) * width
            height = _share(measured)
            label = f"{TITLES[outcome.name]} ({outcome.trainable:,} trained)" if i == 0 else None
            axis.bar(x, height, width * 0.92, color=COLORS[outcome.name], label=label)
            if measured.interval_by_group:
                low, high = measured.interval_by_group
                axis.errorbar(x, height, [[height - low], [high - height]], color="#303030", capsize=2, linewidth=1)
    first = comparison.outcomes[0]
    constants = [first.fitted, *(first.by_novelty[kind] for kind in KINDS)]
    for i, report in enumerate(constants):
        if report.majority:
            axis.hlines(report.majority[1], i - 0.45, i + 0.45, colors="black", linestyles=":", linewidth=1.4,
                        label="always the commonest label" if i == 0 else "_")  # fmt: skip
    axis.set_xticks(range(len(constants)), ["training", *KINDS.values()])
    axis.set_ylim(0, 1.04)
    axis.set_title("accuracy, 95 % interval by state", fontsize=11)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3, frameon=False)


def _draw_loss(axis: Axes, comparison: Comparison, runs: Path) -> None:
    for outcome in comparison.outcomes:
        metrics = runs / outcome.name / "metrics.jsonl"
        if metrics.is_file():
            points = [(row["step"], row["loss/lm"]) for row in read_metrics(metrics) if row["kind"] == "train"]
            axis.plot(*zip(*points, strict=True), color=COLORS[outcome.name], label=TITLES[outcome.name])
    axis.set_yscale("log")
    for place in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        place(FormatStrFormatter("%g"))
    axis.set_title("training loss of the answers", fontsize=11)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("nats per token")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _draw_forgetting(axis: Axes, comparison: Comparison) -> None:
    names = [outcome.name for outcome in comparison.outcomes]
    losses = [outcome.text_loss for outcome in comparison.outcomes]
    titles = [TITLES[name].replace(" ", "\n", 1) for name in names]
    bars = axis.bar(titles, losses, color=[COLORS[name] for name in names])
    axis.bar_label(bars, fmt="%.2f", fontsize=9)
    axis.set_title("loss on held-out running text", fontsize=11)
    axis.set_ylabel("nats per token")
    axis.set_ylim(0, 1.15 * max(losses))


def _accuracy(comparison: Comparison) -> tuple[tuple[str, ...], Rows]:
    header = ("variant", "trained", "seen", *KINDS.values())
    rows = [
        (
            TITLES[o.name],
            f"{o.trainable:,}",
            f"{_share(o.fitted.likelihood.accuracy):.2f}",
            *(_with_interval(o.by_novelty[kind].likelihood.accuracy) for kind in KINDS),
        )
        for o in comparison.outcomes
    ]
    first = comparison.outcomes[0]
    constant = (_constant(first.fitted), *(_constant(first.by_novelty[kind]) for kind in KINDS))
    return header, [*rows, ("one label", "", *constant)]


def _safety(comparison: Comparison) -> tuple[tuple[str, ...], Rows]:
    header = (
        "variant", "unsafe allow", "refuse recall", "over refusal", "written right", "unparsed", "text loss", "seconds",
    )  # fmt: skip
    return header, [
        (
            TITLES[o.name],
            f"{_share(o.triage.likelihood.unsafe_allow_rate):.2f}",
            f"{_share(o.triage.likelihood.refuse_recall):.2f}",
            f"{_share(o.triage.likelihood.over_refusal):.2f}",
            "" if o.triage.generation is None else f"{_share(o.triage.generation.accuracy):.2f}",
            "" if o.triage.generation is None else f"{_share(o.triage.generation.parse_failures):.2f}",
            f"{o.text_loss:.2f}",
            f"{o.seconds:.0f}",
        )
        for o in comparison.outcomes
    ]


def _geometry(outcomes: Iterable[Outcome]) -> tuple[tuple[str, ...], Rows]:
    header = ("variant", "gate", "mean angle", "largest", "commutator", "orthogonality")
    return header, [
        (
            TITLES[o.name],
            name.split("layers.")[-1].replace("self_attn.", ""),
            f"{gate.mean_angle:.2f}",
            f"{gate.max_angle:.2f}",
            f"{gate.commutator:.0e}",
            f"{gate.orthogonality_error:.0e}",
        )
        for o in outcomes
        for name, gate in o.geometry.items()
    ]


def _constant(report: TriageReport) -> str:
    return "" if report.majority is None else f"{report.majority[1]:.2f}"


def _with_interval(measured: Rate) -> str:
    assert measured.interval_by_group is not None, "the quick start's splits are never empty"
    low, high = (f"{bound:.2f}".lstrip("0") for bound in measured.interval_by_group)
    return f"{_share(measured):.2f} [{low}–{high}]"


def _share(measured: Rate) -> float:
    """Return the value of a rate that the quick start always has support for."""
    assert measured.value is not None, "the quick start's splits are never empty"
    return measured.value


def _table(title: str, header: tuple[str, ...], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0 or name in KINDS.values())
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(header: tuple[str, ...], rows: Rows) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
