"""Both sides speak one language, everything is declared and derived, and the census holds."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import so8t_jax.ops
import so8t_torch.ops
from parity_tests.harness import census
from parity_tests.harness.generate import CHECKS
from parity_tests.harness.vocabulary import room_problems, rooms, signature_problems
from parity_tests.ops import PAIRS
from parity_tests.toy import SOUND, toy_production, toy_reference

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


@pytest.fixture
def toy_rooms(tmp_path: Path) -> Any:
    left, right = ModuleType("toy"), ModuleType("toy")
    left.normalised, right.normalised = toy_reference, toy_production  # type: ignore[attr-defined]
    left.__all__ = right.__all__ = ["normalised"]  # type: ignore[attr-defined]
    (tmp_path / "toy.md").write_text("derivation")
    return {"toy": left}, {"toy": right}, tmp_path


def test_sound_room(toy_rooms: Any) -> None:
    left, right, pages = toy_rooms
    assert room_problems(left, right, [SOUND], pages) == []


def test_missing_page_declaration_export_and_room(toy_rooms: Any) -> None:
    left, right, pages = toy_rooms
    assert "not declared" in str(room_problems(left, right, [], pages))
    assert "on one side only" in str(room_problems(left, right | {"extra": left["toy"]}, [SOUND], pages))
    assert "declared but not exported" in str(
        room_problems(left, right, [SOUND, dataclasses.replace(SOUND, name="toy.other")], pages)
    )
    right["toy"].__all__ = ["normalised", "other"]
    assert "toy.other is exported on one side only" in room_problems(left, right, [SOUND], pages)
    (pages / "toy.md").unlink()
    assert "toy has no page" in str(room_problems(left, right, [SOUND], pages))


def test_keyword_whose_default_differs() -> None:
    def reference(x: Any, *, floor: float = 0.0) -> Any:
        return x + floor

    def production(x: Any, *, floor: float = 1.0) -> Any:
        return x + floor

    assert signature_problems(reference, production) == ["defaults of floor differ: reference 0.0, production 1.0"]


def test_variadic_parameter_of_another_name() -> None:
    def reference(ids: Any, *cores: Any) -> Any:
        return ids, cores

    def production(ids: Any, *factors: Any) -> Any:
        return ids, factors

    assert "reference (ids, *cores), production (ids, *factors)" in str(signature_problems(reference, production))
    assert signature_problems(reference, reference) == []
