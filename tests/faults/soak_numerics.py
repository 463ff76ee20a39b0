"""The long version of the numbers: drawn examples of every room, derivatives, rotations, gradients that arrive.

Where the suite already shows a figure in full, its tests are run and counted.
``python -m tests.faults.soak_numerics`` prints the rows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from so8t_torch.ops import rotation

EXAMPLES = 10_000
"""Drawn examples per room; ten times as many for a release."""
STEPS, BLOCKS = 1_000, 384
WITHIN = 2e-6
"""Largest entry of RᵀR − 1 in float32."""

SHOWN_BY_TESTS = {
    "R4 broken numbers in training end in their stage": ("tests/train/test_injection.py", "-k", "broken_number"),
    "R6 schedules of rotation": ("tests/train/test_checkpoints.py", "-k", "last_healthy"),
    "R9 first and second derivatives against finite differences": ("parity_tests/test_gradients.py", "-k", "gradcheck"),
    "R9 registered operators (opcheck)": ("tests", "-k", "opcheck or registered"),
    "R11 every trainable parameter is reached": ("tests/train/test_every_parameter_learns.py",),
}


class Row(NamedTuple):
    """One line of the table: what was counted, how often, how often it failed, the bound, how to see a failure."""

    figure: str
    trials: int
    failures: int
    bound: str
    command: str


def run(report: Callable[[str], None] = print, examples: int = EXAMPLES) -> list[Row]:
    """Return the rows of R4, R6 and R8 to R11.

    Args:
        report: told of every failure.
        examples: of each room.
    """
    rows = [tests(figure, arguments, report) for figure, arguments in SHOWN_BY_TESTS.items()]
    return [*rows, *rotations(), *parity(examples, report)]


def tests(figure: str, arguments: tuple[str, ...], report: Callable[[str], None]) -> Row:
    """Run some of the suite and count it."""
    with tempfile.TemporaryDirectory() as folder:
        counted = Path(folder) / "counted.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={counted}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        suite = ElementTree.parse(counted).getroot().find("testsuite") if counted.is_file() else None
    again = f"python -m pytest {' '.join(arguments[:1])}" + (f' -k "{arguments[2]}"' if arguments[1:] else "")
    if suite is None:
        report(f"{again}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return Row(figure, 0, 1, "0", again)
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    trials = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    if failed or not trials:
        report(f"{again}: {done.stdout[-4000:]}")
    return Row(figure, trials, failed or int(not trials), "0", again)


def rotations() -> list[Row]:
    """Return how far gates are from rotations after many steps of Adam, and after their parameters were rounded."""
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.nn.Parameter(0.1 * torch.randn(BLOCKS, 28, generator=generator))
    target = torch.linalg.qr(torch.randn(BLOCKS, 8, 8, generator=generator)).Q
    optimiser = torch.optim.Adam([coordinates], lr=0.02)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (rotation.exponential(coordinates) - target).square().sum().backward()
        optimiser.step()
    stored = coordinates.detach().bfloat16().float()
    command = "python -m tests.faults.soak_numerics"
    rows = []
    for name, values in (("after 1,000 steps", coordinates.detach()), ("after bfloat16 storage", stored)):
        for dtype, within in ((torch.float32, WITHIN), (torch.float64, 1e-13)):
            R = rotation.exponential(values.to(dtype))
            error = torch.maximum(rotation.orthogonality_error(R), rotation.determinant_error(R))
            figure = f"R10 rotations {name}, {str(dtype)[6:]}: worst {float(error.max()):.1e}"
            rows.append(Row(figure, BLOCKS, int((error > within).sum()), f"<= {within:g}", command))
    return rows


def parity(examples: int, report: Callable[[str], None]) -> list[Row]:
    """Return, for each room, how many drawn examples production gives as the definition does."""
    command = [sys.executable, "-m", "parity_tests", "--examples", str(examples)]
    settings = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    rows = []
    for line in done.stdout.splitlines():
        room, separator, rest = line.partition(": ")
        counts = rest.replace(",", "").split()
        if separator and counts[1:2] == ["examples"]:
            rows.append(Row(f"R8 drawn examples of {room}", int(counts[0]), int(counts[2]), "0", " ".join(command[1:])))
        elif "RED" in line:
            report(line)
    if not rows or (done.returncode and not any(row.failures for row in rows)):
        report(done.stderr[-2000:])
        rows.append(Row("R8 the judge ended early", 0, 1, "0", " ".join(command[1:])))
    return rows


if __name__ == "__main__":
    print(*run(), sep="\n")
