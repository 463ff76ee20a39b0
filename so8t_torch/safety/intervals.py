"""Rates with 95 % intervals, by observation and by group, and undefined where nothing was counted.

Wilson's interval for k hits in n observations, z the normal quantile:

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),   p = k/n

Tellings of one state are decided alike, so n tellings of g states say far less than n independent observations. The
interval by group is Wilson's with n = g: it takes the tellings of a group as wholly dependent, which is the
cautious end. It needs no resampling and does not collapse at 0 or 1, as the bootstrap does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any


@dataclass(frozen=True)
class Rate:
    """Share of hits among counted observations; ``value`` and intervals are ``None`` where ``support`` is 0."""

    value: float | None
    hits: int
    support: int
    groups: int
    interval: tuple[float, float] | None
    interval_by_group: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """Return the rate for JSON; an undefined rate is ``null`` beside its support."""
        return {
            "value": self.value,
            "hits": self.hits,
            "support": self.support,
            "groups": self.groups,
            "wilson_95": self.interval,
            "wilson_95_by_group": self.interval_by_group,
        }

    def __str__(self) -> str:
        if self.value is None or self.interval_by_group is None:
            return "undefined (support 0)"
        low, high = self.interval_by_group
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


def wilson(share: float, observations: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share.

    Args:
        share: hits over observations, in [0, 1].
        observations: number of observations, greater than 0.
        confidence: two-sided coverage, in (0, 1).

    Raises:
        ValueError: an argument is outside its range.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not (0 <= share <= 1 and observations > 0 and 0 < confidence < 1):
        raise ValueError(
            "Expected a share in [0, 1], a positive number of observations and a confidence in (0, 1), got "
            f"{share}, {observations}, {confidence}."
        )
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = share + z2 / (2 * observations)
    half = math.sqrt(z2 * (share * (1 - share) / observations + z2 / (4 * observations**2)))
    scale = 1 + z2 / observations
    # at share 0 and 1 the bound is exactly 0 or 1; rounding alone would put it beside
    low = 0.0 if share == 0 else (centre - half) / scale
    high = 1.0 if share == 1 else (centre + half) / scale
    return low, high


def rate(outcomes: Iterable[tuple[bool, str]], confidence: float = 0.95) -> Rate:
    """Count hits and give both intervals.

    Args:
        outcomes: for each counted observation whether it is a hit, and its group.
        confidence: two-sided coverage, in (0, 1).
    """
    counted = list(outcomes)
    if not counted:
        return Rate(None, 0, 0, 0, None, None)
    hits = sum(hit for hit, _ in counted)
    groups = len({group for _, group in counted})
    share = hits / len(counted)
    return Rate(
        share,
        hits,
        len(counted),
        groups,
        wilson(share, len(counted), confidence),
        wilson(share, groups, confidence),
    )
