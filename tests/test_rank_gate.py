"""What one pair cannot say about gates: exactness, frequencies, the floor among equals, and what is not a number."""

import math

import pytest
import torch

from so8t_torch.ops import rank_gate as room
from so8t_torch.ops.rank_gate import rank_gate

EXACT = [
    {"mode": "straight_through"},
    {"mode": "soft", "hard": True},
    {"mode": "binary_concrete", "training": False, "temperature": 0.3},
]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_of(*shape, seed=1, dtype=torch.float64):
    return room.logistic(torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


@pytest.mark.parametrize("options", EXACT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_gates_are_exactly_zero_or_one(options, dtype):
    z = (30.0 * drawn(50, 64)).to(dtype).requires_grad_()
    gates = rank_gate(z, **options)
    assert torch.equal(gates, (z >= 0).to(dtype))
    (slope,) = torch.autograd.grad(gates.sum(), z)
    scale = options.get("temperature", 1.0)
    g = torch.sigmoid(z.detach().double() / scale)
    assert torch.allclose(slope.double(), g * (1 - g) / scale, rtol=1e-2, atol=1e-3)


def test_straight_through_slopes_are_those_of_the_soft_gate():
    z, cotangent = drawn(7, 9, dtype=torch.float64).requires_grad_(), drawn(7, 9, seed=2, dtype=torch.float64)
    slopes = [
        torch.autograd.grad((rank_gate(z, mode=mode) * cotangent).sum(), z)[0] for mode in ("soft", "straight_through")
    ]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_a_sample_is_open_as_often_as_the_soft_gate_says(temperature):
    z = torch.linspace(-3, 3, 7, dtype=torch.float64).expand(200_000, 7)
    gates = rank_gate(z, noise_of(200_000, 7), mode="binary_concrete", temperature=temperature)
    often = (gates >= 0.5).double().mean(0)
    # five standard deviations of a share of 200,000 draws
    assert (often - torch.sigmoid(z[0])).abs().max() < 5 * math.sqrt(0.25 / 200_000)
    hard = rank_gate(z, noise_of(200_000, 7), mode="binary_concrete", temperature=temperature, hard=True)
    assert torch.equal(hard, (gates >= 0.5).double())


def test_a_sample_of_logit_zero_is_even_about_one_half():
    gates = rank_gate(torch.zeros(100_000, 1, dtype=torch.float64), noise_of(100_000, 1), mode="binary_concrete")
    assert abs(float(gates.mean()) - 0.5) < 0.005
    # at temperature one the sample of an even logit is uniform: variance 1/12
    assert abs(float(gates.var()) - 1 / 12) < 0.002


def test_logistic_noise_has_its_moments_and_ends():
    noise = noise_of(400_000)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 3) < 0.05
    assert room.logistic(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-math.inf, 0.0, math.inf]
    ends = room.logistic(torch.tensor([0.0, 1.0])).expand(3, 2)
    assert torch.equal(
        rank_gate(torch.zeros(3, 2), ends, mode="binary_concrete"), torch.tensor([0.0, 1.0]).expand(3, 2)
    )


@pytest.mark.parametrize("options", [*EXACT, {"mode": "soft"}], ids=str)
def test_the_floor_opens_the_largest_and_the_first_among_equals(options):
    z = torch.tensor([[-3.0, -1.0, -2.0, -1.0, -1.0], [-5.0, 4.0, -5.0, -5.0, -5.0]])
    gates = rank_gate(z, min_rank=2, **options)
    assert (gates >= 0.5).tolist() == [[False, True, False, True, False], [True, True, False, False, False]]
    assert torch.equal(rank_gate(z, min_rank=0, **options) >= 0.5, z >= 0)
    within = rank_gate(z, min_rank=2, active_rank=3, **options)
    assert (within >= 0.5).tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    assert not within[:, 3:].any()


@pytest.mark.parametrize("options", [*EXACT, {"mode": "soft"}], ids=str)
def test_what_is_not_a_number_stays_so_in_its_own_place(options):
    z = drawn(4, 6)
    before = rank_gate(z, **options)
    z[2, 3] = math.nan
    after = rank_gate(z, **options)
    assert after[2, 3].isnan()
    assert after.isnan().sum() == 1
    assert torch.equal(after[:2], before[:2])


def test_temperatures_fall_by_equal_ratios_and_stay():
    steps = room.temperature(torch.linspace(0, 1.5, 7, dtype=torch.float64), start=2.0, end=0.125)
    assert torch.allclose(steps[1:5] / steps[:4], torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.allclose(steps[4:], torch.full((3,), 0.125, dtype=torch.float64))


def test_evaluation_is_soft_on_demand():
    z = drawn(5, 8)
    soft = rank_gate(z, mode="binary_concrete", temperature=0.5, training=False, hard=False)
    assert torch.allclose(soft, torch.sigmoid(z / 0.5))


def test_rank_and_penalty_of_a_batch():
    gates = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]])
    assert room.effective_rank(gates).tolist() == [1.5, 0.75]
    assert room.l1(gates).tolist() == [0.5, 0.25]
