"""What one pair cannot say about the filter: the gradient with the noise held constant, limits, isolation, NaN."""

import math

import numpy as np
import pytest
import torch

from so8t_torch.core.errors import ConfigError
from so8t_torch.ops import snr_filter as room


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rates(*shape, dtype=torch.float64):
    return drawn(*shape, seed=7, dtype=dtype).abs(), drawn(*shape, seed=8, dtype=dtype).abs()


def frozen(state, noise, cleanup):
    """The cleaned state and p for a given noise, in numpy."""
    gate = 1 / (1 + np.exp(-(np.abs(state) / noise - 2.0) / 0.25))
    return state * (1 - cleanup * (1 - gate)), gate.mean((-2, -1))


def test_the_gradient_is_that_of_the_filter_with_its_noise_held_constant():
    state = drawn(1, 3, 4)
    noise = (state.abs() / room.signal_to_noise(state)).numpy()
    w, u = drawn(1, 3, 4, seed=1), drawn(1, seed=2)
    given = state.clone().requires_grad_()
    found = room.snr_filter(given, *rates(2, 1), cleanup=0.5)
    (gradient,) = torch.autograd.grad((w * found.state).sum() + (u * found.signal).sum(), given)
    step, expected = 1e-6, torch.zeros_like(state)
    for place in np.ndindex(*state.shape):
        ends = []
        for sign in (1, -1):
            moved = state.numpy().copy()
            moved[place] += sign * step
            cleaned, p = frozen(moved, noise, 0.5)
            ends.append((w.numpy() * cleaned).sum() + (u.numpy() * p).sum())
        expected[place] = (ends[0] - ends[1]) / (2 * step)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("entries", [(1, 1), (1, 2), (3, 3), (4, 8)])
def test_the_median_is_numpys(entries):
    for x in (drawn(5, entries[0] * entries[1]), drawn(5, entries[0] * entries[1]).round()):
        assert torch.equal(room._median(x)[:, 0], torch.from_numpy(np.median(x.numpy(), 1)))


def test_the_noise_of_gaussian_entries_is_their_standard_deviation():
    state = 3.0 * drawn(4, 128, 128)
    noise = state.abs() / room.signal_to_noise(state, noise_floor=1e-9)
    assert ((noise / 3.0 - 1.0).abs() < 0.05).all()


def test_the_first_chunk_works_with_what_it_was_given():
    state = torch.zeros(2, 3, 4, 4, requires_grad=True)
    decay, eta = rates(2, 5, 3, dtype=torch.float32)
    found = room.snr_filter(state, decay, eta, cleanup=1.0)
    assert torch.equal(found.signal, torch.ones(2, 3))
    assert torch.equal(found.decay, decay)
    assert torch.equal(found.eta, eta)
    (gradient,) = torch.autograd.grad(found.state.sum() + found.decay.sum() + found.eta.sum(), state)
    assert torch.equal(gradient, torch.ones_like(state))
    assert torch.equal(room.signal_to_noise(state), torch.zeros_like(state))


def test_signal_is_kept_and_noise_removed():
    state = 0.01 * drawn(1, 16, 16)
    state[0, 3, 5] = 4.0
    found = room.snr_filter(state, *rates(2, 1), threshold=6.0, cleanup=1.0)
    assert abs(found.state[0, 3, 5] - 4.0) < 1e-12
    rest = found.state.clone()
    rest[0, 3, 5] = 0.0
    state[0, 3, 5] = 0.0
    assert rest.norm() < 0.01 * state.norm()


def test_modulation_is_bounded_by_its_boosts():
    decay, eta = rates(3, 4)
    quiet = room.snr_filter(drawn(4, 8, 8), decay, eta, threshold=1e6, gamma_boost=3.0)
    assert torch.allclose(quiet.decay, 3.0 * decay)
    assert torch.allclose(quiet.eta, eta)
    loud = room.snr_filter(drawn(4, 8, 8), decay, eta, threshold=-1e6)
    assert torch.allclose(loud.decay, decay)
    assert torch.allclose(loud.eta, 1.5 * eta)


def test_neither_heads_nor_examples_see_each_other():
    state, (decay, eta) = drawn(2, 3, 4, 4), rates(2, 5, 3)
    other = state.clone()
    other[1, 2] = 100.0 * drawn(4, 4, seed=3)
    before, after = (room.snr_filter(s, decay, eta, cleanup=0.5) for s in (state, other))
    assert torch.equal(before.state[0], after.state[0])
    assert torch.equal(before.state[1, :2], after.state[1, :2])
    assert torch.equal(before.decay[..., :2], after.decay[..., :2])
    assert not torch.equal(before.signal[1, 2], after.signal[1, 2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    state, (decay, eta) = drawn(3, 4, 4), rates(5, 3)
    state[1, 0, 0] = bad
    found = room.snr_filter(state, decay, eta)
    for x in (found.signal, found.decay[0], found.eta[0]):
        assert x.isnan().tolist() == [False, True, False]


def test_hard_gates_count_entries():
    state = drawn(2, 4, 4, dtype=torch.float32).requires_grad_()
    found = room.snr_filter(state, *rates(2, 2, dtype=torch.float32), hard=True, threshold=1.0, cleanup=1.0)
    kept = (room.signal_to_noise(state) >= 1.0).float()
    assert torch.equal(found.signal, kept.mean((-2, -1)))
    assert torch.equal(found.state, state * kept)
    assert torch.autograd.grad(found.signal.sum(), state)[0].abs().max() > 0


def test_statistics_of_one_entry_have_no_spread_and_carry_no_gradient():
    found = room.statistics(drawn(2, 1, 1).requires_grad_())
    assert torch.equal(found.std_snr, torch.zeros(2, dtype=torch.float64))
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**100, 2.0**125])
def test_ratios_do_not_depend_on_the_scale_even_where_sums_have_no_place(scale):
    state = drawn(2, 8, 8, dtype=torch.float32)
    for found, head in zip(room.signal_to_noise(scale * state), state.double().numpy(), strict=True):
        deviation = np.median(np.abs(head - np.median(head)))
        expected = np.abs(head) / (1.4826 * deviation + 1e-3 * np.abs(head).mean())
        assert np.allclose(found.double().numpy(), expected, rtol=1e-5, atol=0)


def test_a_threshold_that_is_no_number_is_refused():
    state = drawn(1, 2, 2)
    with pytest.raises(ConfigError, match="finite threshold"):
        room.statistics(state, threshold=math.nan)
    with pytest.raises(ConfigError, match="finite threshold"):
        room.importance(state, state.abs(), threshold=math.nan)


def test_autocast_changes_nothing():
    state, (decay, eta) = drawn(2, 4, 4, dtype=torch.float32), rates(3, 2, dtype=torch.float32)
    plain = room.snr_filter(state, decay, eta)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = room.snr_filter(state, decay, eta)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
