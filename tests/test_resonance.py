"""What one pair cannot say about the filter: limits, extreme scales, isolation of heads, autocast and forward mode."""

import pytest
import scipy.linalg
import torch

from so8t_torch.core.errors import DomainError
from so8t_torch.ops import resonance as room
from so8t_torch.ops import zeta


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bases(k, v, dtype=torch.float64):
    return room.basis(k).to(dtype), room.basis(v).to(dtype)


@pytest.mark.parametrize("n", [33, 64, 128])
def test_the_basis_is_scipys_polar_factor(n):
    expected = torch.from_numpy(scipy.linalg.polar(zeta.basis(n).numpy())[0])
    assert (room.basis(n) - expected).abs().max() < 1e-13


@pytest.mark.parametrize(("n", "condition"), [(255, 661), (426, 146), (467, 1362), (512, 39)])
def test_the_worst_sizes_are_as_bad_as_documented_and_no_worse(n, condition):
    singular = torch.linalg.svdvals(zeta.basis(n))
    assert condition - 1 < singular[0] / singular[-1] < condition
    expected = torch.from_numpy(scipy.linalg.polar(zeta.basis(n).numpy())[0])
    # the change that an eps of every entry makes, 2‖dA‖/(σ_n + σ_{n−1})
    assert torch.linalg.matrix_norm(room.basis(n) - expected) < 2.0**-52 * n / (singular[-1] + singular[-2])


@pytest.mark.parametrize("n", [1, 2, 3, 64, 256, 467, 512])
def test_the_basis_is_orthonormal(n):
    q = room.basis(n)
    assert (q.mT @ q - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-14


def test_the_basis_is_the_same_every_time():
    assert torch.equal(room.basis(64), room.basis(64))


@pytest.mark.parametrize("options", [{"threshold": -torch.inf}, {"blend": torch.zeros(2)}])
def test_nothing_removed_is_the_identity_bit_for_bit(options):
    state = drawn(3, 2, 8, 6)
    assert torch.equal(room.resonance(state, *bases(8, 6), **options).state, state)


def test_a_memory_without_structure_is_hardly_changed_and_few_modes_are_kept():
    q_k, q_v = bases(64, 64)
    loud = torch.zeros(64, dtype=torch.float64)
    loud[::8] = 1.0
    modes = drawn(1, 64, 64) * torch.where(loud > 0, 1.0, 1e-3)[:, None]
    found = room.resonance(q_k @ modes @ q_v.mT, q_k, q_v)
    assert int((found.gate >= 0.5).sum()) == 8
    # σ((0 − 0.1)/0.05) = 0.12 of the silent modes is left
    left = room.transform(found.state, q_k, q_v)[0, loud == 0].norm() / modes[0, loud == 0].norm()
    assert 0.1 < left < 0.14
    even = room.resonance(drawn(1, 64, 64), q_k, q_v)
    assert even.gate.min() > 0.999


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("energy", ["row", "diag"])
def test_a_zero_state_stays_zero_with_finite_gradients(energy, hard):
    state = torch.zeros(2, 2, 6, 6, requires_grad=True)
    found = room.resonance(state, *bases(6, 6, torch.float32), torch.ones(2), energy=energy, hard=hard)
    assert torch.equal(found.state, torch.zeros_like(state))
    (gradient,) = torch.autograd.grad(found.state.sum() + found.energy.sum() + found.gate.sum(), state)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("energy", ["row", "diag"])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e30])
def test_the_gates_do_not_depend_on_the_scale_even_where_squares_have_no_place(scale, energy):
    state = drawn(2, 8, 8, dtype=torch.float32)
    q = bases(8, 8, torch.float32)
    once, scaled = (room.resonance(s, *q, energy=energy, threshold=1.0) for s in (state, scale * state))
    assert torch.allclose(once.gate, scaled.gate, rtol=0, atol=1e-4)
    assert torch.allclose(scaled.state / scale, once.state, rtol=0, atol=1e-4)


def test_a_nan_stays_in_its_head_and_is_not_hidden():
    state = drawn(2, 3, 6, 6)
    state[1, 2, 0, 0] = torch.nan
    found = room.resonance(state, *bases(6, 6))
    bad = found.state.isnan().flatten(-2).any(-1)
    assert bad.tolist() == [[False] * 3, [False, False, True]]
    assert found.gate[1, 2].isnan().all()


def test_hard_gates_are_exactly_zero_or_one_and_have_a_gradient():
    state = drawn(4, 3, 8, 8, dtype=torch.float32).requires_grad_()
    found = room.resonance(state, *bases(8, 8, torch.float32), hard=True, threshold=1.0)
    assert set(found.gate.unique().tolist()) == {0.0, 1.0}
    soft = room.resonance(state, *bases(8, 8, torch.float32), threshold=1.0)
    cotangent = drawn(4, 3, 8, dtype=torch.float32)
    hard_slope, soft_slope = (torch.autograd.grad(f.gate, state, cotangent)[0] for f in (found, soft))
    assert torch.allclose(hard_slope, soft_slope, rtol=1e-5, atol=1e-6)
    assert soft_slope.abs().max() > 0


def test_autocast_changes_nothing():
    state, q = drawn(2, 8, 8, dtype=torch.float32), bases(8, 8, torch.float32)
    plain = room.resonance(state, *q)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = room.resonance(state, *q)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_forward_mode_agrees_with_finite_differences():
    state, direction, q = drawn(2, 6, 5), drawn(2, 6, 5, seed=1), bases(6, 5)

    def filtered(s):
        return room.resonance(s, *q, threshold=0.8, temperature=0.3).state

    _, slope = torch.func.jvp(filtered, (state,), (direction,))
    step = 1e-5
    difference = (filtered(state + step * direction) - filtered(state - step * direction)) / (2 * step)
    assert torch.allclose(slope, difference, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_a_blend_that_is_no_real_number_is_refused(dtype):
    q = room.basis(2)
    with pytest.raises(DomainError, match="blend of a real floating dtype"):
        room.resonance(torch.ones(1, 2, 2), q, q, torch.ones(1, dtype=dtype))
