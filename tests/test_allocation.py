"""The peak of an allocation record counts what the call takes, not what it gives back of earlier calls."""

import torch

from benchmarks.allocation import peak_bytes


def test_a_peak_counts_what_is_held_at_once():
    def call():
        kept = torch.ones(1000, dtype=torch.float64)
        for _ in range(3):
            kept = kept + 1.0
        return kept

    assert 16_000 <= peak_bytes(call) < 16_100


def test_a_peak_is_the_same_however_often_it_is_taken():
    held = {}

    def call():
        held.clear()
        held["now"] = torch.ones(1000, dtype=torch.float64)

    assert [peak_bytes(call) for _ in range(3)] == [8000] * 3
