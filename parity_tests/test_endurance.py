"""The search for rare failures: it draws what was not drawn before, finds what is planted, and tells of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.__main__ import main
from parity_tests.endurance import MOST_FAILURES, endure
from parity_tests.harness.inputs import BATCH
from parity_tests.harness.judge import another_truth, truth
from parity_tests.toy import SOUND, toy_production

SHARE = 12 * BATCH


def tally_of(production: Any) -> Any:
    (tally,) = endure([dataclasses.replace(SOUND, name="toy.enduring", production=production)], SHARE)
    return tally


def test_a_sound_room_has_its_share_and_no_failure() -> None:
    tally = tally_of(toy_production)
    assert (tally.room, tally.examples, tally.failed, tally.failures) == ("toy", SHARE, 0, [])


def test_wrong_values_and_numbers_that_are_not_finite_fail() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total * (1 + 64 * torch.finfo(x.dtype).eps), y

    def spoiled(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return torch.where(torch.arange(len(total)) == 0, torch.nan, total), y

    for production in (wrong, spoiled):
        tally = tally_of(production)
        assert tally.failed == tally.examples == SHARE
        assert len(tally.failures) == MOST_FAILURES
        assert all("toy.enduring" in text and "output 0" in text for text in tally.failures)


def test_wrong_gradients_fail() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total, y.detach() + 2 * (y - y.detach())

    tally = tally_of(wrong)
    assert tally.failed == SHARE
    assert all("gradient of argument" in text and "output" not in text for text in tally.failures)


def test_no_two_situations_draw_the_same() -> None:
    size = SOUND.sizes[0]
    first = truth(SOUND, "generic", size, "float32")
    again = another_truth(SOUND, "generic", size, "float32", 0)
    np.testing.assert_array_equal(first.inputs.arguments[0], again.inputs.arguments[0])
    drawn = [another_truth(SOUND, "generic", size, "float32", n).inputs.arguments[0] for n in range(4)]
    assert len({float(np.asarray(x).ravel()[0]) for x in drawn}) == 4


def test_no_examples_are_no_success() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--examples", "0"])
    assert caught.value.code == 2
