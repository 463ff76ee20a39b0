"""What ``--dry-run`` prints: what would train, on which tokens, with which memory."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from torch import nn

from so8t_torch.data.chat import EncodingReport, show_supervision
from so8t_torch.train.building import Job
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.language import reservation
from so8t_torch.train.plan import plan


def describe(config: TrainConfig, job: Job, console: Console) -> None:
    """Print counts by group, the data, the first conversation with its learned part marked, and the memory plan.

    Of running text every token is learned: the first row is printed as it is.
    """
    console.print(_counts(job.model))
    console.print(_data(job))
    if config.model is not None:
        console.print("first row, of which every token is learned:", style="bold")
        console.print(job.tokenizer.decode(job.rows[0].input_ids), markup=False, highlight=False)
        if told := reservation(job.model):
            console.print(told, markup=False, highlight=False, soft_wrap=True)
        if config.model.kind in ("phase1", "phase2"):
            console.print(plan(config).table())
        return
    console.print("first conversation, learned part between ⟦ ⟧:", style="bold")
    console.print(show_supervision(job.rows[0], job.tokenizer), markup=False, highlight=False)
    console.print(plan(config).table())


def trainable_groups(model: nn.Module) -> dict[str, int]:
    """Return how many numbers train: in gates, in LoRA, and in modules trained whole."""
    counts = {"gates": 0, "lora": 0, "whole modules": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[parameter_group(name)] += parameter.numel()
    return counts


def parameter_group(name: str) -> str:
    """Return the group a parameter of the adapter belongs to, by its name."""
    if ".so8t_safe." in name or ".so8t_cmd." in name:
        return "gates"
    return "lora" if ".so8t_lora_" in name else "whole modules"


def _counts(model: nn.Module) -> Table:
    counts = trainable_groups(model)
    table = Table("trainable", "numbers", title="what trains")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_row("together", f"{sum(counts.values()):,}", style="bold")
    return table


def _data(job: Job) -> Table:
    table = Table("data", "rows", "tokens", "supervised", "truncated", "dropped", title="what is learned from")
    reports: dict[str, EncodingReport | None] = {"training": job.report, "held out": job.held_out_report}
    for name, report in reports.items():
        if report is not None:
            numbers = (report.rows, report.tokens, report.supervised, len(report.truncated), len(report.dropped))
            table.add_row(name, *(f"{number:,}" for number in numbers))
    return table
