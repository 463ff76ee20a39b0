"""Runs the quick start: ``python scripts/demo.py [--output DIR] [--set SECTION.KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from so8t_torch.train.demo import run_demo


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and run.

    Args:
        argv: arguments without the program's name; default: the command line's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for base, runs, summary")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    arguments = parser.parse_args(argv)
    run_demo(arguments.output, overrides=arguments.set)


if __name__ == "__main__":
    main()
