"""Every example runs as printed, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path):
    assert run(path).strip()


def test_the_adapter_example_moves_its_gates_and_folds_them():
    output = run(next(path for path in EXAMPLES if path.stem == "adapter_in_ten_lines"))
    angles = [float(angle) for angle in re.findall(r"largest angle ([\d.]+) rad", output)]
    assert len(angles) == 2
    assert min(angles) > 0.01
    assert float(re.search(r"max \|Δlogit\| = (\S+)", output).group(1)) < 1e-5
