"""``metrics.csv``: the log entries of a run as one table, made anew from ``metrics.jsonl``."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from so8t_torch.train.folder import read_metrics
from so8t_torch.train.manifest import write_bytes

FIRST = ("step", "kind", "epoch", "time")


def write_table(metrics: Path, table: Path) -> None:
    """Write one row for each log entry and one column for each name; what an entry lacks stays empty.

    Args:
        metrics: ``metrics.jsonl`` of a run.
        table: CSV file to write, whole.
    """
    rows = read_metrics(metrics)
    names = dict.fromkeys(FIRST) | dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(table, text.getvalue().encode())
