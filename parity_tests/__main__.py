"""``python -m parity_tests``: judge the table, print it, write ``docs/numerics.md``; exit 1 on a red row."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from parity_tests.harness import OpPair, environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.examples is not None and options.examples < 1:
        parser.error(f"--examples: expected a number from 1, got {options.examples}")
    environment.prepare()
    if options.kernels:
        from parity_tests import kernels

        return kernels.main()
    pairs = _pairs(options.module, options.pair)
    if options.census:
        from parity_tests.harness import census

        census.write(census.count(pairs))
        Console().print(f"wrote {census.RECORD}")
        return 0
    if options.examples is not None:
        return _endure(pairs, options.examples)
    return _judge(pairs, everything=options.all, page=_page(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parity_tests", description=__doc__)
    parser.add_argument("--module", metavar="PKG.MOD:PAIRS", help="judge this table instead of the library's own")
    parser.add_argument("--pair", metavar="TEXT", default="", help="judge only pairs whose name contains TEXT")
    parser.add_argument("--all", action="store_true", help="run every generated check, not only the table")
    parser.add_argument("--examples", metavar="N", type=int, help="judge N further drawn examples per room")
    parser.add_argument("--write", metavar="PATH", type=Path, help="write the page here")
    parser.add_argument("--no-write", action="store_true", help="leave docs/numerics.md as it is")
    parser.add_argument("--kernels", action="store_true", help="compile every Triton kernel for sm_80/86/89/90")
    parser.add_argument("--census", action="store_true", help="put the number of generated cases on record")
    return parser


def _pairs(module: str | None, text: str) -> tuple[OpPair, ...]:
    if module is None:
        from parity_tests.ops import PAIRS

        pairs = PAIRS
    else:
        name, _, attribute = module.partition(":")
        if not attribute:
            raise SystemExit(f"expected --module package.module:NAME, got {module!r}; add the table's name")
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise SystemExit(f"no module {name!r} can be imported from here; start in its folder or install it")
        table = getattr(importlib.import_module(name), attribute, None)
        if table is None:
            raise SystemExit(f"module {name!r} has no {attribute!r}; name the tuple of pairs in it")
        pairs = tuple(table)
    chosen = tuple(pair for pair in pairs if text in pair.name)
    if not chosen:
        raise SystemExit(f"expected a pair whose name contains {text!r}; there are {[p.name for p in pairs]}")
    return chosen


def _page(options: argparse.Namespace) -> Path | None:
    from parity_tests.report import PAGE

    if options.write is not None:
        return Path(options.write)
    whole = options.module is None and not options.pair and not options.no_write
    return PAGE if whole and PAGE.parent.is_dir() else None


def _endure(pairs: tuple[OpPair, ...], examples: int) -> int:
    from parity_tests import endurance

    console, red = Console(width=None if sys.stdout.isatty() else 160), 0
    for tally in endurance.endure(pairs, examples):
        red += tally.failed
        console.print(f"{tally.room}: {tally.examples:,} examples, {tally.failed} failed, {tally.seconds:.0f} s")
        for failure in tally.failures:
            console.print(f"[bold red]RED[/] {escape(failure)}")
    console.print(f"{red} red" if red else "all green")
    return 1 if red else 0


def _judge(pairs: tuple[OpPair, ...], *, everything: bool, page: Path | None) -> int:
    from parity_tests import report
    from parity_tests.harness import cases

    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.status("judging") as status:
        rows = report.judge_table(pairs, lambda name: status.update(f"judging {name}"))
    console.print(report.rich_table(rows))
    red = sum(row.red is not None for row in rows)
    if everything:
        judged = 0
        for case, failure in report.judge_cases(cases(pairs)):
            judged += 1
            if failure is not None:
                red += 1
                console.print(f"[bold red]RED[/] {escape(case.name)}\n{escape(failure)}")
        console.print(f"{judged} generated checks judged")
    console.print(f"{red} red" if red else "all green")
    if page is not None:
        page.write_text(report.markdown(rows), encoding="utf-8")
        console.print(f"wrote {page}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
