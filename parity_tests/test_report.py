"""The report: red rows are told from green ones, the page is the same twice, the exit status says it."""

import dataclasses

import pytest
import torch

from parity_tests import report
from parity_tests.__main__ import main
from parity_tests.harness import OpPair
from parity_tests.toy import SOUND, toy_production


@pytest.fixture(scope="module")
def broken() -> OpPair:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> object:
        total, y = toy_production(x, weight)
        return total, y * (1 + 100 * torch.finfo(y.dtype).eps)

    return dataclasses.replace(SOUND, name="toy.broken", production=wrong)


def test_rows_cover_both_directions_and_every_dtype() -> None:
    rows = report.judge_pair(SOUND)
    assert {(row.direction, row.dtype) for row in rows} == {
        (direction, dtype) for direction in ("forward", "gradient") for dtype in SOUND.dtypes
    }
    assert all(row.red is None for row in rows)


def test_red_rows_say_why(broken: OpPair) -> None:
    rows = report.judge_pair(broken)
    assert all("eps" in str(row.red) for row in rows)


def test_an_op_that_raises_is_red() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> object:
        raise RuntimeError(f"no kernel for {tuple(x.shape)} and {tuple(weight.shape)}")

    rows = report.judge_pair(dataclasses.replace(SOUND, production=wrong))
    assert all("no kernel for" in row.verdict for row in rows)


def test_page_is_deterministic(broken: OpPair) -> None:
    first, second = (report.markdown(report.judge_table([SOUND, broken])) for _ in range(2))
    assert first == second
    assert "8 of 16 rows are green" in first
    assert "What this table does not prove" in first


def test_known_gap_that_passes_is_red(broken: OpPair) -> None:
    from parity_tests.harness import cases

    gap = {"forward": "rounds twice"}
    passing = report.judge_cases(cases([dataclasses.replace(SOUND, known_gaps=gap)], ["forward"]))
    failing = report.judge_cases(cases([dataclasses.replace(broken, known_gaps=gap)], ["forward"]))
    assert all("remove it" in str(failure) for _, failure in passing)
    assert all(failure is None for _, failure in failing)


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--module", "parity_tests.test_report:GREEN"]) == 0
    assert "all green" in capsys.readouterr().out
    assert main(["--module", "parity_tests.test_report:RED"]) == 1
    with pytest.raises(SystemExit, match="add the table's name"):
        main(["--module", "parity_tests.test_report"])
    with pytest.raises(SystemExit, match="name contains"):
        main(["--module", "parity_tests.test_report:GREEN", "--pair", "nothing"])


def _half(x: torch.Tensor, weight: torch.Tensor) -> object:
    total, y = toy_production(x, weight)
    return total, y / 2


GREEN = (dataclasses.replace(SOUND, sizes=SOUND.sizes[:1], dtypes=("float64", "float32")),)
RED = (dataclasses.replace(GREEN[0], production=_half),)
