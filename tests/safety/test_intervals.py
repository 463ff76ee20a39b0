import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from so8t_torch.safety.intervals import rate, wilson
from tests.drawn import steadily


@pytest.mark.parametrize(("hits", "observations"), [(0, 10), (1, 10), (10, 10), (81, 263), (1, 1), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(hits, observations, confidence):
    expected = binomtest(hits, observations).proportion_ci(confidence, method="wilson")
    found = wilson(hits / observations, observations, confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_gives_the_value_in_the_literature():
    # 81 of 263, 95 %: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3)
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@steadily
def test_wilson_solves_its_defining_equation(case):
    hits, n = case
    z = 1.959963984540054
    for bound in wilson(hits / n, n):
        gap = abs(hits / n - bound)
        assert gap == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-7)


@pytest.mark.parametrize("bad", [(1.1, 10, 0.95), (-0.1, 10, 0.95), (0.5, 0, 0.95), (0.5, 10, 1.0)])
def test_wilson_refuses_what_is_no_share_or_confidence(bad):
    with pytest.raises(ValueError, match="Expected a share"):
        wilson(*bad)


def test_a_rate_counts_and_takes_one_observation_per_group():
    measured = rate([(True, "a"), (True, "a"), (False, "b"), (True, "c")])
    assert (measured.value, measured.hits, measured.support, measured.groups) == (0.75, 3, 4, 3)
    assert measured.interval == wilson(0.75, 4)
    assert measured.interval_by_group == wilson(0.75, 3)


def test_telling_a_group_again_narrows_the_row_interval_only():
    once = rate([(True, "a"), (False, "b")])
    often = rate([(True, "a"), (False, "b")] * 50)
    assert often.interval[1] - often.interval[0] < once.interval[1] - once.interval[0]
    assert often.interval_by_group == once.interval_by_group


def test_a_rate_without_support_is_undefined():
    measured = rate([])
    assert measured.value is None
    assert measured.as_dict()["wilson_95"] is None
    assert measured.as_dict()["support"] == 0
    assert str(measured) == "undefined (support 0)"
