"""Both sides speak one language, everything is declared and derived, and the census holds."""

from pathlib import Path

import so8t_jax.ops
import so8t_torch.ops
from parity_tests.harness import census
from parity_tests.harness.generate import CHECKS
from parity_tests.harness.vocabulary import room_problems, rooms
from parity_tests.ops import PAIRS

MATH_PAGES = Path(__file__).parent.parent / "docs" / "math"


def test_rooms_exports_declarations_and_pages() -> None:
    assert room_problems(rooms(so8t_jax.ops), rooms(so8t_torch.ops), PAIRS, MATH_PAGES) == []


def test_census() -> None:
    found = census.differences(census.count(PAIRS), census.recorded())
    assert found == [], "if this is meant, record it with `python -m parity_tests --census`"


def test_every_check_is_collected_once() -> None:
    here = Path(__file__).parent
    text = "".join((here / f"test_{n}.py").read_text() for n in ("values", "gradients", "layout", "laws", "variants"))
    assert {check: text.count(f'"{check}"') for check in CHECKS} == dict.fromkeys(CHECKS, 1)
