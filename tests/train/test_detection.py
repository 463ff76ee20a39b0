"""What counts as a fault: magnitudes of tensors of any kind, and losses and norms beside those before them."""

import math

import pytest
import torch

from so8t_torch.train.detection import Limits, LossWatch, StateWatch
from so8t_torch.train.health import magnitudes
from so8t_torch.train.ladder import Cause


def watched(count=20, loss=2.0, norm=1.0, **limits):
    watch = LossWatch(Limits(**limits))
    for index in range(count):
        watch.trained(loss + 0.1 * (index % 3), norm + 0.1 * (index % 5))
    return watch


def test_magnitudes_of_mixed_kinds_stand_in_order_and_carry_what_is_not_finite():
    tensors = [
        torch.tensor([1.0, -3.0]),
        torch.tensor([], dtype=torch.bfloat16),
        torch.tensor([2.0, math.nan], dtype=torch.bfloat16),
        torch.tensor([[-math.inf, 1.0]]),
        torch.tensor([5.0], dtype=torch.float64),
        torch.tensor([4.0, -7.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1 - 8j, 2j]).conj(),
        torch.tensor([complex(1, math.nan)]),
    ]
    found = magnitudes(tensors, torch.device("cpu"))
    assert found.dtype == torch.float64
    assert str(found.tolist()) == "[3.0, 0.0, nan, inf, 5.0, 7.0, 8.0, nan]"
    assert magnitudes([], torch.device("cpu")).tolist() == []


@pytest.mark.parametrize(
    ("loss", "norm", "cause"),
    [
        (2.2, 1.0, None),
        (3.09, 1.0, None),
        (3.11, 1.0, Cause.SPIKE),
        (math.nan, 1.0, Cause.LOSS),
        (2.0, math.inf, Cause.GRADIENT),
        (2.0, 1199.0, None),
        (2.0, 1201.0, Cause.GRADIENT),
    ],
)
def test_a_step_is_judged_by_those_before_it(loss, norm, cause):
    """The losses before are 2, 2.1 and 2.2 in turn, median 2.1, and the norms have the median 1.2."""
    fault = watched().judge(loss, norm)
    assert (None if fault is None else fault.cause) == cause


def test_a_wide_spread_widens_the_bound():
    watch = LossWatch(Limits(history=5))
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        watch.trained(loss, 1.0)
    # median 3, median distance from it 1
    assert watch.bound() == 9.0


def test_before_there_is_a_history_only_what_is_not_finite_counts():
    watch = watched(19)
    assert watch.judge(6.0, 1e6) is None
    assert watch.usual_norm() is None
    assert watch.judge(math.nan, 1.0).cause is Cause.LOSS


def test_ten_high_losses_in_a_row_are_a_divergence_and_one_low_begins_anew():
    watch = watched(spike_mads=1e6)
    high, low = 3 * 2.3 + 1, 2.0
    causes = [(fault := watch.judge(loss, 1.0)) and fault.cause for loss in [*[high] * 9, low, *[high] * 10]]
    assert causes[:9] == causes[10:19]
    assert Cause.DIVERGENCE not in causes[:19]
    assert causes[19] is Cause.DIVERGENCE


def test_a_watch_taken_up_again_judges_the_same():
    first, second = watched(), LossWatch(Limits())
    first.judge(50.0, 1.0)
    second.load(first.state())
    assert second.state() == first.state()
    assert (second.bound(), second.usual_norm()) == (first.bound(), first.usual_norm())


def test_growth_by_a_million_within_a_step_is_a_fault_and_slow_growth_is_none():
    watch = StateWatch()
    for size in (1.0, 1e4, 1e9, 1e14):
        assert watch.judge({"layers.0.a": size}, {}) is None
    fault = watch.judge({"layers.0.a": 1.1e20}, {"layers.0.a:exp_avg": 1.0})
    assert (fault.cause, fault.layer) == (Cause.PARAMETER, "layers.0")
    moment = watch.judge({"layers.0.a": 1.0, "layers.1.a": 1.0}, {"layers.1.a:exp_avg": math.nan})
    assert (moment.cause, moment.layer) == (Cause.MOMENT, "layers.1")
    watch.rolled_back()
    assert watch.judge({"layers.0.a": 1e14}, {}).cause is Cause.PARAMETER
