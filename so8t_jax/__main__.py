"""``python -m so8t_jax``: convert checkpoint folders between production's layout and that of Flax."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from so8t_jax.nn.checkpoint import FILES, Layout, convert

LAYOUTS: dict[str, Layout] = {"jax": "flax", "torch": "torch"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m so8t_jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert-weights", help="write the weights of a folder in the other layout")
    command.add_argument("source", type=Path, help="folder with config.json and weights; only read")
    command.add_argument("output", type=Path, help="folder to write; must not exist or be empty")
    command.add_argument("--to", choices=LAYOUTS, required=True, help="layout to write")
    options = parser.parse_args(argv)
    layout = LAYOUTS[options.to]
    try:
        count = convert(options.source, options.output, layout)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} tensors written to {options.output / FILES[layout]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
