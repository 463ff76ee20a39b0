"""What one pair cannot say about the recurrence: causality to the bit, overflow, precision, registration."""

import math

import pytest
import scipy.signal
import torch
from torch.autograd.graph import saved_tensors_hooks

from so8t_torch.core.errors import BackendError, DomainError
from so8t_torch.nn.associative_scan import fused_associative_scan
from so8t_torch.ops import linear_recurrence as room
from so8t_torch.ops.linear_recurrence import eager, linear_recurrence

FORWARD = torch.ops.so8t.linear_recurrence.default
GRADIENT = torch.ops.so8t.linear_recurrence_gradient.default
BACKENDS = ("blocked", "eager")
LONG = (2, 700, 6)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decays(*shape, seed=1, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_loop(a, b, state, reverse=False):
    h = torch.empty_like(b)
    for t in range(b.shape[1])[:: -1 if reverse else 1]:
        h[:, t] = state = a[:, t] * state + b[:, t]
    return h


@pytest.mark.parametrize("length", [1, 2, 15, 16, 63, 64, 65, 700, 4095, 4096])
@pytest.mark.parametrize("reverse", [False, True])
def test_any_length_equals_a_constant_filter(length, reverse):
    b, start = drawn(2, length, 3), drawn(2, 3, seed=3)
    found, last = linear_recurrence(torch.tensor(0.9375, dtype=torch.float64), b, start, reverse=reverse)
    signal = (b.flip(1) if reverse else b).numpy()
    wanted, _ = scipy.signal.lfilter([1.0], [1.0, -0.9375], signal, axis=1, zi=0.9375 * start[:, None].numpy())
    wanted = torch.from_numpy(wanted)
    assert torch.allclose(found.flip(1) if reverse else found, wanted, rtol=1e-13, atol=1e-13)
    assert torch.equal(last, found[:, 0 if reverse else -1])


@pytest.mark.parametrize("width", [1, 40, 1500, 2048, 5000])
def test_any_width_equals_the_loop(width):
    a, b, start = decays(2, 150, width), drawn(2, 150, width), drawn(2, width, seed=3)
    found, _ = linear_recurrence(a, b, start)
    assert torch.allclose(found, by_loop(a, b, start), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("value", [1e3, math.inf, math.nan])
def test_what_comes_later_changes_no_bit_of_what_came_before(backend, reverse, value):
    a, b = decays(*LONG, dtype=torch.float32), drawn(*LONG, dtype=torch.float32)
    before, _ = linear_recurrence(a, b, reverse=reverse, backend=backend)
    for place in (0, 1, 31, 350, 699):
        later_a, later_b = a.clone(), b.clone()
        later_a[0, place, 2] = later_b[0, place, 1] = value
        after, _ = linear_recurrence(later_a, later_b, reverse=reverse, backend=backend)
        kept = slice(place + 1, None) if reverse else slice(place)
        assert torch.equal(after[:, kept], before[:, kept])
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[0, :, 3:], before[0, :, 3:])
        assert not torch.equal(after[0, place, 1], before[0, place, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_segment_is_that_segment_alone_whatever_precedes_it(backend):
    a, b, start = decays(1, 90, 5), drawn(1, 90, 5), drawn(1, 5, seed=3)
    b[:, 29] = torch.inf
    a[:, 30] = torch.nan
    ids = torch.tensor([0] * 30 + [7] * 1 + [0] * 40 + [2] * 19)
    h, final = linear_recurrence(a, b, start, ids, backend=backend)
    for part in (slice(30, 31), slice(31, 71), slice(71, 90)):
        alone, _ = linear_recurrence(a[:, part].nan_to_num(0.5), b[:, part], backend=backend)
        assert torch.allclose(h[:, part], alone, rtol=1e-14, atol=1e-14)
    assert torch.equal(final, h[:, -1])
    before, _ = linear_recurrence(a[:, :29], b[:, :29], start, backend=backend)
    assert torch.allclose(h[:, :29], before, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_crosses_a_segment(backend):
    a, b, start = (x.requires_grad_() for x in (decays(1, 60, 3), drawn(1, 60, 3), drawn(1, 3, seed=2)))
    ids = torch.tensor([0] * 25 + [1] * 35)
    h, _ = linear_recurrence(a, b, start, ids, backend=backend)
    da, db, dstart = torch.autograd.grad(h[:, 25:].sum(), (a, b, start))
    assert not dstart.any()
    assert not db[:, :25].any()
    assert not da[:, :26].any()
    assert db[:, 25:].all()
    assert da[:, 26:].all()


def test_the_first_token_receives_credit_from_the_last():
    a = torch.full((1, 4096, 2), 0.999, dtype=torch.float64, requires_grad=True)
    b = drawn(1, 4096, 2).requires_grad_()
    _, final = linear_recurrence(a, b)
    (db,) = torch.autograd.grad(final.sum(), b)
    assert torch.allclose(db[0, 0], torch.full((2,), 0.999**4095, dtype=torch.float64), rtol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_overflowing_products_mean_what_they_mean_in_the_loop(reverse):
    a = torch.full((1, 600, 4), 1e4)
    b = torch.zeros(1, 600, 4)
    late = slice(0, 100) if reverse else slice(500, 600)
    a[:, late] = 0.5
    b[:, late] = 1.0
    b[0, 300, 1] = 1.0
    a[0, 200, 2] = math.nan
    b[0, 250 if reverse else 150, 3] = 1e-30
    a[0, 240 if reverse else 160, 3] = 0.0
    found, _ = linear_recurrence(a, b, reverse=reverse, backend="blocked")
    wanted = by_loop(a, b, torch.zeros(1, 4), reverse)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf(), wanted.isinf())
    assert torch.allclose(found, wanted, rtol=1e-5, atol=0, equal_nan=True)
    assert found[0, 0 if reverse else -1, 0].isfinite()
    assert found[0, 0 if reverse else -1, 1].isinf()
    assert found[0, 0 if reverse else -1, 2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_streams_in_float32_when_the_state_is_float32(dtype):
    a = torch.tensor(0.9995)
    b = torch.full((1, 4000, 2), 2.0**-10, dtype=dtype)
    state = torch.zeros(1, 2)
    for part in b.split(7, 1):
        h, state = linear_recurrence(a, part, state)
    assert state.dtype == torch.float32
    assert h.dtype == dtype
    limit = 2.0**-10 * (1 - 0.9995**4000) / (1 - 0.9995)
    assert torch.allclose(state, torch.full((1, 2), limit), rtol=1e-4)
    rounded, _ = linear_recurrence(a.to(dtype), b)
    assert (rounded[:, -1].float() / limit - 1).abs().min() > 0.01


def test_autocast_leaves_the_carried_dtype_alone():
    a, b = decays(1, 50, 4, dtype=torch.float32), drawn(1, 50, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in BACKENDS:
            found, _ = linear_recurrence(a, b, backend=backend)
            assert found.dtype == torch.float32
            assert torch.allclose(found, by_loop(a, b, torch.zeros(1, 4)), rtol=1e-6, atol=1e-6)


def test_float32_stays_near_float64_over_65536_tokens():
    a, b = 0.9 + 0.1 * decays(1, 65536, 2), drawn(1, 65536, 2)
    exact, _ = linear_recurrence(a, b)
    found, _ = linear_recurrence(a.float(), b.float())
    rounded, _ = linear_recurrence(a.float().double(), b.float().double())
    assert (found - rounded).abs().max() < 1e-6 * exact.abs().max()


def test_only_multipliers_and_states_are_saved():
    a, b = decays(1, 128, 8).requires_grad_(), drawn(1, 128, 8).requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_recurrence(a, b)
        assert sum(kept) <= 2 * 128 * 8 + 16
        kept.clear()
        linear_recurrence(a.detach(), b)
        assert sum(kept) <= 128 * 8 + 16
        kept.clear()
        room.cumulative_sum(b, backend="blocked")
        assert sum(kept) <= 16 or max(kept) == 128 * 8


def opcheck_examples():
    b, grad, final = (drawn(2, 21, 3, seed=s) for s in (0, 1, 2))
    restart = torch.zeros(2, 21, dtype=torch.bool)
    restart[:, 5] = True
    start, cotangent = drawn(2, 3, seed=4), final[:, 0].contiguous()
    yield FORWARD, (decays(2, 21, 3), b, start, restart, True, "blocked")
    yield FORWARD, (decays(3).expand(2, 21, 3), b, None, None, False, "blocked")
    yield GRADIENT, (grad, cotangent, decays(2, 21, 3), b, start, restart, True, "blocked")
    yield GRADIENT, (grad, cotangent, decays(2, 21, 3), None, None, None, False, "blocked")


@pytest.mark.parametrize(("operation", "arguments"), list(opcheck_examples()))
def test_the_registration_is_sound(operation, arguments):
    for x in arguments:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize("complex_valued", [False, True])
def test_forward_mode_takes_the_plain_form_and_is_never_silently_zero(complex_valued):
    kind = torch.complex128 if complex_valued else torch.float64
    a, b = (decays(1, 12, 3).to(kind), drawn(1, 12, 3).to(kind))
    direction = drawn(1, 12, 3, seed=5).to(kind)
    _, slope = torch.func.jvp(lambda x: linear_recurrence(x, b)[0], (a,), (direction,))
    step = 1e-6
    ahead, behind = (linear_recurrence(a + s * direction, b)[0] for s in (step, -step))
    assert torch.allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-8)
    _, along = torch.func.jvp(lambda x: linear_recurrence(a, b, x)[1], (b[:, 0],), (direction[:, 0],))
    assert torch.allclose(along, a.prod(1) * direction[:, 0], rtol=1e-12)
    with pytest.raises(BackendError, match="forward-mode tangent"):
        torch.func.jvp(lambda x: linear_recurrence(a, x, backend="blocked")[0], (b,), (direction,))


def test_the_transforms_of_torch_func_take_the_plain_form():
    a, b = decays(2, 9, 3), drawn(2, 9, 3, seed=1)

    def loss(a, b, backend="auto"):
        return linear_recurrence(a, b, backend=backend)[0].sin().sum()

    given = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(given, b), given)
    assert torch.allclose(torch.func.grad(loss)(a, b), expected, rtol=1e-12)
    assert torch.allclose(torch.vmap(torch.func.grad(loss))(a, b), expected, rtol=1e-12)
    with pytest.raises(BackendError, match=r"torch\.func differentiates"):
        torch.func.grad(lambda x: loss(x, b, "blocked"))(a)


def test_the_choice_of_backend_can_be_explained():
    lines = room.explain_backend(torch.zeros(3), torch.zeros(2, 3)).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["triton", "blocked", "eager"]


def test_a_cut_covers_its_stretch_with_few_operations():
    for length in (1, 7, 8, 100, 4095, 4096):
        blocks, steps = eager._cut(length, 64)
        assert blocks <= 64
        assert blocks * steps <= length
        assert 3 * steps + blocks + length - blocks * steps <= max(length, 1) or blocks == 0
    assert eager._cut(4095, 64) == (63, 65)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_associative_scan_sums_along_any_axis(dtype, reverse):
    x = drawn(3, 40, 2, 5).to(dtype)
    for dim in (0, 1, 2, 3, -1, -2):
        found = fused_associative_scan(x, dim, reverse)
        wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
        wanted = wide.flip(dim).cumsum(dim).flip(dim) if reverse else wide.cumsum(dim)
        assert found.dtype == dtype
        limit = torch.finfo(dtype).eps * wanted.abs().max()
        assert (found.to(wanted.dtype) - wanted).abs().max() <= 8 * limit


def test_the_associative_scan_is_right_beyond_three_elements_and_beyond_a_block():
    assert fused_associative_scan(torch.arange(1.0, 9.0)).tolist() == [1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0, 36.0]
    for length in (255, 256, 257, 300):
        assert fused_associative_scan(torch.ones(2, length))[1, -1] == length
        assert fused_associative_scan(torch.ones(length, 2), 0)[-1, 1] == length
    assert fused_associative_scan(torch.ones(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("shape", [(3,), (0, 3)])
def test_the_associative_scan_refuses_integers_by_its_own_name(shape):
    with pytest.raises(DomainError, match="fused_associative_scan: expected a floating-point"):
        fused_associative_scan(torch.ones(shape, dtype=torch.int64))


def test_the_associative_scan_passes_gradients_to_every_term():
    x = drawn(2, 6, 3).requires_grad_()
    for dim in (0, 1, 2):
        (grad,) = torch.autograd.grad(fused_associative_scan(x, dim).sum(), x)
        counts = torch.arange(x.shape[dim], 0, -1, dtype=torch.float64)
        assert torch.equal(grad, counts.view([-1 if axis == dim else 1 for axis in range(3)]).expand(x.shape))
