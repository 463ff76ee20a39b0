"""``so8t long-context``: how far Phase 2 remembers, with and without its memory, and what a token costs at a length.

Each task is learned from scratch by two models of one seed that differ in the memory alone; measured are the share of
right answers against the distance, the gradient of the last loss at the tokens before, speed, and the carried state.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import Field
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from so8t_torch.core.config import Section
from so8t_torch.core.errors import ConfigError
from so8t_torch.data.recall import RecallSection, Task
from so8t_torch.models.configuration import Phase2Config
from so8t_torch.train.environment import environment
from so8t_torch.train.reach import Speed, gradient_reach, measure_speed
from so8t_torch.train.recall import RecallTrainingSection, accuracy, train_recall

VARIANTS = {"memory": True, "no memory": False}
"""Name of each model, and whether it has a memory."""


class MeasuringSection(Section):
    """What is measured of the trained models."""

    distances: tuple[int, ...] = Field(default=(16, 64, 256, 1024, 4096), description="At which answers are asked.")
    rows: int = Field(default=32, ge=1, description="Rows per distance.")
    reach: int = Field(default=4096, ge=2, description="Length of the rows whose gradient is taken.")
    reach_rows: int = Field(default=2, ge=1, description="Rows whose gradient is taken.")
    lengths: tuple[int, ...] = Field(default=(512, 1024, 2048, 4096, 8192, 16384), description="Of timed rows.")


class LongContextConfig(Section):
    """One report: the tasks, the model, its training, and what is measured."""

    seed: int = 0
    output: Path = Path("runs/long_context")
    tasks: tuple[Task, ...] = Field(default=get_args(Task), description="Each is learned by models of its own.")
    task: RecallSection = Field(default_factory=RecallSection, description="Sizes of all tasks.")
    model: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="Fields of Phase2Config other than vocab_size."
    )
    training: RecallTrainingSection = Field(default_factory=RecallTrainingSection)
    trainings: dict[Task, RecallTrainingSection] = Field(
        default_factory=dict, description="How single tasks are learned, in place of training."
    )
    measuring: MeasuringSection = Field(default_factory=MeasuringSection)

    def training_of(self, task: Task) -> RecallTrainingSection:
        """Return how a task is learned."""
        return self.trainings.get(task, self.training)


@dataclass(frozen=True)
class Finding:
    """What one model reached on one task, and the CPU time of its training."""

    task: str
    variant: str
    parameters: int
    processor_seconds: float
    losses: list[float]
    accuracy: dict[int, float]
    reach: dict[int, float]

    def line(self) -> str:
        """Return it in one line."""
        shares = ", ".join(f"{share:.2f} at {distance:,}" for distance, share in self.accuracy.items())
        return f"{self.task}, {self.variant}: loss {self.losses[-1]:.3f}; right answers {shares}"


@dataclass(frozen=True)
class LongContextReport:
    """All findings, and the speed of the model with a memory."""

    settings: Mapping[str, Any]
    findings: Sequence[Finding]
    speeds: Sequence[Speed]

    def tables(self) -> list[Table]:
        """Return accuracy against distance, and cost against length."""
        answers = Table(title="share of right answers at a distance")
        for column in ("task", "model", *map(str, self.findings[0].accuracy)):
            answers.add_column(column, justify="right")
        for found in self.findings:
            answers.add_row(found.task, found.variant, *(f"{share:.2f}" for share in found.accuracy.values()))
        cost = Table("tokens", "prefill, tokens/s", "decode, tokens/s", "state, bytes", title="cost at a length")
        for speed in self.speeds:
            cost.add_row(f"{speed.length:,}", f"{speed.prefill:,.0f}", f"{speed.decode:,.0f}", f"{speed.state:,}")
        return [answers, cost]

    def write(self, folder: Path) -> None:
        """Write ``long_context.json`` and ``long_context.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "settings": self.settings,
            "environment": environment(self.settings["seed"]),
            "findings": [asdict(found) for found in self.findings],
            "speeds": [speed._asdict() for speed in self.speeds],
        }
        (folder / "long_context.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draw(self, folder / "long_context.png")


def run_long_context(config: LongContextConfig, tell: Callable[[str], object] = str) -> LongContextReport:
    """Train, measure and write the report of a configuration.

    Args:
        config: of the report.
        tell: is called with a line for every model that has been measured.

    Raises:
        ConfigError: a field that the model does not have, a distance that is too short for a task, or a length below 1.
    """
    tasks = [config.task.model_copy(update={"task": name}) for name in config.tasks]
    _check(config, tasks)
    findings, memory = [], None
    for task in tasks:
        for variant, remembers in VARIANTS.items():
            set_seed(config.seed)
            model = _model(config, task, remembers)
            findings.append(_examine(config, task, variant, model))
            tell(findings[-1].line())
            memory = model if remembers else memory
    assert memory is not None
    speeds = [measure_speed(memory, length) for length in config.measuring.lengths]
    report = LongContextReport(config.model_dump(mode="json"), findings, speeds)
    report.write(config.output)
    return report


def _model(config: LongContextConfig, task: RecallSection, remembers: bool) -> PreTrainedModel:
    from so8t_torch.models.phase2 import Phase2ForCausalLM

    fields = {**config.model, "hebbian_enabled": remembers}
    return Phase2ForCausalLM(Phase2Config(vocab_size=task.vocab_size, **fields))


def _check(config: LongContextConfig, tasks: Sequence[RecallSection]) -> None:
    """Raise for whatever can be known before the first step."""
    if not tasks:
        raise ConfigError("long-context: expected at least one task, got none.")
    taken = sorted({"vocab_size", "hebbian_enabled"} & config.model.keys())
    if taken:
        raise ConfigError(f"long-context: expected no {' and '.join(taken)} in model: the report sets it; remove it.")
    Phase2Config(**config.model)
    short = [length for length in config.measuring.lengths if length < 1]
    if short:
        raise ConfigError(f"long-context: expected measuring.lengths of at least 1 token, got {short[0]}.")
    for task in tasks:
        for distance in (config.training_of(task.task).shortest, *config.measuring.distances):
            task.length(distance)


def _examine(config: LongContextConfig, task: RecallSection, variant: str, model: PreTrainedModel) -> Finding:
    """Train a model on a task and measure it."""
    measuring = config.measuring
    begun = time.process_time()
    losses = train_recall(model, task, config.training_of(task.task), seed=config.seed)
    seconds = round(time.process_time() - begun, 1)
    model.eval()
    right = accuracy(model, task, measuring.distances, rows=measuring.rows, seed=config.seed + 1)
    generator = torch.Generator().manual_seed(config.seed + 2)
    fitting = max(measuring.reach - task.length(task.least_distance) + task.least_distance, task.least_distance)
    rows = task.batch(measuring.reach_rows, fitting, generator).input_ids
    reach = octaves(gradient_reach(model, rows))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Finding(task.task, variant, parameters, seconds, losses, right, reach)


def octaves(reach: Float[Tensor, " t"]) -> dict[int, float]:
    """Return the root mean square over each fourth of an octave of distances, by its first distance.

    Args:
        reach: of the distances 1, 2, …
    """
    edges = sorted({round(2 ** (place / 4)) for place in range(4 * len(reach).bit_length())} | {len(reach) + 1})
    edges = [edge for edge in edges if edge <= len(reach) + 1]
    return {
        first: reach[first - 1 : behind - 1].square().mean().sqrt().item()
        for first, behind in itertools.pairwise(edges)
    }


def draw(report: LongContextReport, picture: Path) -> None:
    """Draw accuracy and gradients against the distance, and speed and state against the length.

    Args:
        report: what was found.
        picture: PNG to write.
    """
    tasks = list(dict.fromkeys(found.task for found in report.findings))
    figure = Figure(figsize=(4.2 * len(tasks) + 4.2, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(tasks) + 1, squeeze=False)
    for column, task in enumerate(tasks):
        _draw_task([found for found in report.findings if found.task == task], axes[0, column], axes[1, column])
        axes[0, column].set_title(task.replace("_", " "))
    lengths = [speed.length for speed in report.speeds]
    axes[0, -1].plot(lengths, [speed.prefill for speed in report.speeds], "o-", label="prefill")
    axes[0, -1].plot(lengths, [speed.decode for speed in report.speeds], "s-", label="decode")
    axes[0, -1].set(title="cost", ylabel="tokens per second of one thread", yscale="log")
    axes[0, -1].legend()
    axes[1, -1].plot(lengths, [speed.state for speed in report.speeds], "o-")
    axes[1, -1].set(ylabel="carried state, bytes", xlabel="length")
    axes[1, -1].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.25)
    figure.savefig(picture, dpi=110)


def _draw_task(findings: Sequence[Finding], upper: Axes, lower: Axes) -> None:
    for found, style in zip(findings, ("o-", "x--"), strict=True):
        upper.plot(list(found.accuracy), list(found.accuracy.values()), style, label=found.variant)
        lower.plot(list(found.reach), list(found.reach.values()), style[1:], label=found.variant)
    upper.set(ylim=(-0.03, 1.03), ylabel="share of right answers", xlabel="distance")
    lower.set(yscale="log", ylabel="‖∂ loss of last / ∂ embedding‖", xlabel="tokens before the last")
    upper.legend()
    lower.legend()
