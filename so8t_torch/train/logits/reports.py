"""``so8t logits show`` and ``so8t logits compare``: tables and pictures of saved logits.

A pipe counts as a terminal of 80 columns: the tables have no lines between columns, columns without an entry are left
out, and what still does not fit is folded, never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
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

_COLUMNS = ("tokens", "left out", "loss", "entropy", "acc.", "conf.", "cal.")
_LEGEND = "loss, entropy in nats; acc. accuracy; conf. mean confidence; cal. calibration error"


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
    modes: dict[str, None] = {}
    rows: list[list[str]] = []
    for file in find_records(path):
        record = read_record(file)
        judged[record.step] = judge(record)
        modes[record.mode] = None
        rows.append([str(record.step), str(record.epoch), *_cells(summarise(judged[record.step]))])
    if plot is not None:
        draw({"": judged}, plot, f"saved logits at the supervised tokens: {path}", spell)
    title = f"logits saved in {path} ({', '.join(modes)})"
    tokens = _table(
        "the tokens most often predicted, as shares of predictions and of labels",
        ("token", "id", "predicted", "labels"),
        [
            [spell(token), str(token), f"{said:.3f}", f"{meant:.3f}"]
            for token, said, meant in top_tokens(together(list(judged.values())), 12)
        ],
    )
    return [_table(title, ("step", "epoch", *_COLUMNS), rows, caption=_LEGEND), tokens]


def _table(
    title: str, columns: Sequence[str], rows: Sequence[list[str]], *, caption: str | None = None, pairs: bool = False
) -> Table:
    """Return a table that fits a narrow terminal; ``pairs`` sets every two rows apart."""
    filled = [place for place in range(len(columns)) if not rows or any(row[place] for row in rows)]
    table = Table(title=Text(title), caption=caption, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place in filled:
        table.add_column(columns[place], justify="right", overflow="fold")
    for number, row in enumerate(rows, 1):
        table.add_row(*(Text(row[place]) for place in filled), end_section=pairs and number % 2 == 0)
    return table


def _cells(summary: Summary) -> list[str]:
    low, high = summary.entropy
    # with blanks around the dash, so that a narrow terminal breaks there and not inside a number
    entropy = f"{low:.4f}" if high - low < 5e-5 else f"{low:.3f} – {high:.3f}"
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
    """Return a table of both sides at each step that both have, and one of how they differ on the same tokens.

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
    rows: list[list[str]] = []
    for one, other in pairs:
        for side, name, record in zip(sides, "AB", (one, other), strict=True):
            side[one.step] = judge(record)
            rows.append([name, str(record.step), *_cells(summarise(side[one.step]))])
    if plot is not None:
        title = f"saved logits at the supervised tokens: A {first}, B {second}"
        draw({"A": sides[0], "B": sides[1]}, plot, title, speller(tokenizer))
    each = _table(f"A: {first}\nB: {second}", ("", "step", *_COLUMNS), rows, caption=_LEGEND, pairs=True)
    changes = [[str(one.step), *_changes(one, other)] for one, other in pairs]
    columns = ("step of A", "same top token", "|Δ log p(label)|", "KL(A‖B)")
    return [each, _table("B against A on the same tokens, in nats", columns, changes)]


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
