"""Pictures of saved logits: entropy and loss, the tokens most often predicted, and whether confidence is earned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from so8t_torch.core.errors import DataError
from so8t_torch.train.logits.measures import Judged, reliability, summarise, together, top_tokens

COLOURS = ("#1f5a99", "#c8501e")
SHOWN = 12

Steps = Mapping[int, Judged]
"""What was judged at each optimiser step."""


def draw(sets: Mapping[str, Steps], picture: Path, title: str, spell: Callable[[int], str] = str) -> None:
    """Draw one set of records, or two beside each other.

    Args:
        sets: name and records of each, one or two; the name of a single one may be empty.
        picture: PNG to write.
        title: what the records are.
        spell: text of a token id.

    Raises:
        DataError: the name does not end as that of a picture.
    """
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    if picture.suffix[1:].lower() not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise DataError(f"{picture}: expected the name of a picture, such as {picture.stem}.png.")
    left, middle, right = figure.subplots(1, 3)
    for (name, steps), colour in zip(sets.items(), COLOURS, strict=False):
        if max(map(len, sets.values())) > 1:
            _entropy_by_step(left, name, steps, colour)
        else:
            _entropy_spread(left, name, next(iter(steps.values())), colour)
    _tokens(middle, sets, spell)
    _reliability(right, sets)
    for axis in (left, middle, right):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title if len(title) < 130 else "…" + title[-128:])
    figure.savefig(picture, dpi=110)


def _entropy_by_step(axis: Axes, name: str, steps: Steps, colour: str) -> None:
    centres = {step: judged.entropy.mean(1) for step, judged in steps.items() if len(judged.nll)}
    marks = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    quartiles = torch.stack([torch.quantile(centre, marks) for centre in centres.values()])
    label = f"{name}: " if name else ""
    axis.fill_between(list(centres), quartiles[:, 0], quartiles[:, 2], color=colour, alpha=0.18, linewidth=0)
    axis.plot(list(centres), quartiles[:, 1], color=colour, marker="o", markersize=3, label=label + "median entropy")
    losses = [steps[step].nll.mean().item() for step in centres]
    axis.plot(list(centres), losses, color=colour, linestyle="--", label=label + "mean loss")
    axis.set(title="entropy (band: quartiles) and loss", xlabel="optimiser step", ylabel="nats per token")
    axis.set_ylim(bottom=0)


def _entropy_spread(axis: Axes, name: str, judged: Judged, colour: str) -> None:
    centre = judged.entropy.mean(1)
    label = f"{name}: mean {centre.mean():.2f}" if name else f"mean {centre.mean():.2f}"
    axis.hist(centre.numpy(), bins=30, color=colour, alpha=0.55, label=label)
    axis.set(title="entropy of the prediction", xlabel="nats", ylabel="positions")


def _tokens(axis: Axes, sets: Mapping[str, Steps], spell: Callable[[int], str]) -> None:
    judged = {name: together(list(steps.values())) for name, steps in sets.items()}
    first = next(iter(judged.values()))
    chosen = [token for token, _, _ in top_tokens(first, SHOWN)]
    height = 0.8 / (len(judged) + 1)
    for place, ((name, one), colour) in enumerate(zip(judged.items(), COLOURS, strict=False)):
        shares = [(one.predicted == token).double().mean().item() for token in chosen]
        at = [row + place * height for row in range(len(chosen))]
        axis.barh(at, shares, height, color=colour, label=f"{name} predicted" if name else "predicted")
    labels = [(first.labels == token).double().mean().item() for token in chosen]
    at = [row + len(judged) * height for row in range(len(chosen))]
    axis.barh(at, labels, height, color="#bbbbbb", label="labels")
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(chosen))], [_printable(spell, t) for t in chosen])
    axis.invert_yaxis()
    when = ", all steps" if max(map(len, sets.values())) > 1 else ""
    axis.set(title=f"the {len(chosen)} tokens most often predicted{when}", xlabel="share of positions")


def _printable(spell: Callable[[int], str], token: int) -> str:
    text = spell(token)
    # the picture's font has no other scripts; the table on the terminal shows them
    return text if text.isascii() and text.isprintable() else f"#{token}"


def _reliability(axis: Axes, sets: Mapping[str, Steps]) -> None:
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":", label="confidence = accuracy")
    for (name, steps), colour in zip(sets.items(), COLOURS, strict=False):
        last = max(steps)
        cells = reliability(steps[last])
        confidence, accuracy = [cell[0] for cell in cells], [cell[1] for cell in cells]
        error = summarise(steps[last]).calibration_error
        label = f"{name}: " if name else ""
        axis.plot(confidence, accuracy, color=colour, label=f"{label}step {last}, calibration error {error:.3f}")
        areas = [20 + 300 * count / sum(cell[2] for cell in cells) for _, _, count in cells]
        axis.scatter(confidence, accuracy, areas, color=colour, alpha=0.45, linewidths=0, clip_on=False)
    axis.set(title="calibration (area: positions)", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_aspect("equal")
