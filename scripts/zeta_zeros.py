"""Computes zeros of ζ on the critical line with mpmath: ``python scripts/zeta_zeros.py [--count N] [--output FILE]``.

Each zero is found with 25 digits and written as the shortest decimal number that reads back as the nearest float64. The
SHA-256 that is printed belongs into ``so8t_torch/ops/zeta.py``.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import mpmath

TABLE = Path(__file__).parent.parent / "so8t_torch" / "ops" / "zeta_zeros.csv"
DIGITS = 25


def zero(n: int) -> str:
    """Return the imaginary part of the n-th zero, correctly rounded to float64."""
    with mpmath.workdps(DIGITS):
        return repr(float(mpmath.zetazero(n).imag))


def checksum(numbers: Sequence[str]) -> str:
    """Return the SHA-256 of the numbers joined by commas; line endings do not enter."""
    return hashlib.sha256(",".join(numbers).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, compute and write.

    Args:
        argv: arguments without the program's name; default: the command line's.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1024, help="how many zeros")
    parser.add_argument("--output", type=Path, default=TABLE, help="where the table is written, one number per line")
    arguments = parser.parse_args(argv)
    numbers = [zero(n) for n in range(1, arguments.count + 1)]
    arguments.output.write_text("\n".join(numbers) + "\n", encoding="ascii")
    print(f"{len(numbers)} zeros, sha256 {checksum(numbers)}, written to {arguments.output}")


if __name__ == "__main__":
    main()
