"""The long version of what the suite shows in small: every figure of reliability with its counts, as one table.

``make soak`` runs all parts; ``python -m tests.faults.soak kills disk`` runs some. Takes hours on two cores. The exit
status is 1 when a bound is broken; each row ends with the command that shows it again.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module

from rich.console import Console
from rich.table import Table

PARTS = ("kills", "injection", "disk", "inputs", "numerics")


def main(chosen: list[str]) -> int:
    """Run the parts and print the table.

    Args:
        chosen: names of parts; none takes all.
    """
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        print(f"expected parts among {', '.join(PARTS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    console, red = Console(width=170), 0
    table = Table(title="soak")
    for column in ("figure", "trials", "failures", "bound", "minutes", "command"):
        table.add_column(column, justify="right" if column in ("trials", "failures", "minutes") else "left")
    for part in chosen or PARTS:
        began = time.monotonic()
        rows = import_module(f"tests.faults.soak_{part}").run(lambda line: console.print(line, markup=False))
        minutes = f"{(time.monotonic() - began) / 60:.1f}"
        for figure, trials, failures, bound, command in rows:
            red += failures
            table.add_row(figure, f"{trials:,}", f"[red]{failures}" if failures else "0", bound, minutes, command)
            minutes = ""
    console.print(table)
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
