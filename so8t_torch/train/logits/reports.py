"""``so8t logits show`` and ``so8t logits compare``: tables and pictures of saved logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from so8t_torch.core.errors import DataError
from so8t_torch.train.logits.measures import (
    Difference,
    Judged,
    Summary,
    difference,
    judge,
    same_tokens,
    summarise,
    together,
    top_tokens,
)
from so8t_torch.train.logits.plots import draw
from so8t_torch.train.logits.reading import find_records, read_record
from so8t_torch.train.logits.record import LogitsRecord

_COLUMNS = ("positions", "left out", "loss", "entropy", "accuracy", "confidence", "calibration error")


def speller(tokenizer: Path | None) -> Callable[[int], str]:
    """Return what gives the text of a token id: of the tokenizer in a folder, or the bare number."""
    if tokenizer is None:
        return lambda token: f"#{token}"
    if not tokenizer.is_dir():
        raise DataError(f"{tokenizer}: expected the folder of a tokenizer, and there is none.")
    from so8t_torch.train.building import load_tokenizer

    loaded = load_tokenizer(str(tokenizer), None)
    return lambda token: repr(loaded.decode([token]))


def show(path: str | Path, *, plot: Path | None = None, tokenizer: Path | None = None) -> list[Table]:
    """Return a table of the records at ``path`` and one of the tokens most often predicted.

    Args:
        path: a file of saved logits, a folder of them, or a run folder.
        plot: PNG to write as well.
        tokenizer: folder with the tokenizer that spells the tokens.

    Raises:
        DataError: no saved logits there, or a damaged file.
    """
    spell = speller(tokenizer)
    judged: dict[int, Judged] = {}
    table = Table(title=f"logits saved in {path}, in nats")
    for column in ("step", "epoch", "mode", *_COLUMNS):
        table.add_column(column, justify="right")
    for file in find_records(path):
        record = read_record(file)
        judged[record.step] = judge(record)
        cells = _cells(summarise(judged[record.step]))
        table.add_row(str(record.step), str(record.epoch), record.mode, *cells)
    if plot is not None:
        draw({"": judged}, plot, f"saved logits at the supervised tokens: {path}", spell)
    tokens = Table("token", "id", "predicted", "labels", title="the tokens most often predicted")
    for token, said, meant in top_tokens(together(list(judged.values())), 12):
        tokens.add_row(Text(spell(token)), str(token), f"{said:.3f}", f"{meant:.3f}")
    return [table, tokens]


def _cells(summary: Summary) -> list[str]:
    low, high = summary.entropy
    entropy = f"{low:.4f}" if high - low < 5e-5 else f"{low:.3f}–{high:.3f}"
    return [
        f"{summary.positions:,}",
        str(summary.left_out or ""),
        f"{summary.loss:.4f}",
        entropy,
        f"{summary.accuracy:.3f}",
        f"{summary.confidence:.3f}",
        f"{summary.calibration_error:.3f}",
    ]


def compare(
    first: str | Path, second: str | Path, *, plot: Path | None = None, tokenizer: Path | None = None
) -> list[Table]:
    """Return a table of both sides at each step that both have, and how they differ on the same tokens.

    Args:
        first: a file of saved logits, a folder of them, or a run folder.
        second: what it is compared with; two single files are compared whatever their steps.
        plot: PNG to write as well.
        tokenizer: folder with the tokenizer that spells the tokens.

    Raises:
        DataError: no saved logits there, a damaged file, or no step in common.
    """
    pairs = _pairs(find_records(first), find_records(second))
    sides: tuple[dict[int, Judged], dict[int, Judged]] = ({}, {})
    table = Table(title=f"A: {first}   B: {second}   (nats)")
    for column in ("", "step", *_COLUMNS, "same top token", "|Δ log p(label)|", "KL(A‖B)"):
        table.add_column(column, justify="right")
    for one, other in pairs:
        for side, name, record in zip(sides, "AB", (one, other), strict=True):
            side[one.step] = judge(record)
            changes = _changes(one, other) if name == "B" else ["", "", ""]
            table.add_row(name, str(record.step), *_cells(summarise(side[one.step])), *changes)
        table.add_section()
    if plot is not None:
        title = f"saved logits at the supervised tokens: A {first}, B {second}"
        draw({"A": sides[0], "B": sides[1]}, plot, title, speller(tokenizer))
    return [table]


def _pairs(first: list[Path], second: list[Path]) -> list[tuple[LogitsRecord, LogitsRecord]]:
    left, right = ([read_record(path) for path in paths] for paths in (first, second))
    if len(left) == len(right) == 1:
        return [(left[0], right[0])]
    later = {record.step: record for record in right}
    pairs = [(record, later[record.step]) for record in {r.step: r for r in left}.values() if record.step in later]
    if not pairs:
        raise DataError(
            f"No step is in both: {sorted({r.step for r in left})[:10]} and {sorted(later)[:10]}; name two single "
            "files to compare different steps."
        )
    return pairs


def _changes(one: LogitsRecord, other: LogitsRecord) -> list[str]:
    if not same_tokens(one, other):
        return ["other tokens", "", ""]
    found: Difference = difference(one, other)
    return [
        f"{found.agreement:.3f}",
        f"{found.label_change:.4f}",
        f"{'' if found.exact else '≥ '}{found.divergence:.3g}",
    ]
