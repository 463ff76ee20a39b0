from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapter_in_ten_lines.py"


def test_the_example_runs_and_folds_exactly(capsys) -> None:
    runpy.run_path(str(EXAMPLE))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("model.layers." in line for line in lines[:2])
    assert float(lines[2].split("= ")[1]) < 1e-5
