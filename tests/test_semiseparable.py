"""What one pair cannot say about the operator: causality to the bit, chunks, skipping, overflow, registration."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from so8t_torch.core.errors import BackendError
from so8t_torch.ops import semiseparable as room
from so8t_torch.ops.semiseparable import eager, operator

CHUNKED = torch.ops.so8t.semiseparable_chunks.default
BACKENDS = ("chunked", "eager")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decays(*shape, seed=1, dtype=torch.float64):
    return 0.3 + 0.7 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example(batch=2, length=50, width=4, rank=20, dtype=torch.float64):
    shapes = (batch, length, width), (batch, length, rank), (batch, length, rank)
    x, u, v = (drawn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    return x, u, v, decays(batch, length, rank, dtype=dtype), drawn(batch, rank, width, seed=7, dtype=dtype)


def by_loop(x, u, v, decay, state):
    rows = []
    for t in range(x.shape[1]):
        state = decay[:, t, :, None] * state + u[:, t, :, None] * x[:, t, None]
        rows.append(torch.einsum("br,brd->bd", v[:, t], state))
    return torch.stack(rows, 1), state


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_any_length_in_any_chunk_is_the_loop(length, chunk):
    arguments = example(length=length)
    for found, wanted in zip(operator(*arguments, chunk=chunk), by_loop(*arguments), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [5.0, math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_comes_later_changes_no_bit_of_what_came_before(backend, value, which):
    arguments = example(dtype=torch.float32, rank=40)
    # what is closed at first, and is opened by the edit
    arguments[1][..., 16:] = arguments[2][..., 16:] = 0.0
    before, _ = operator(*arguments, chunk=16, backend=backend)
    for place in (0, 1, 15, 16, 33, 49):
        changed = [z.clone() for z in arguments]
        changed[which][0, place, 3] = changed[which][0, place, -1] = value
        after, _ = operator(*changed, chunk=16, backend=backend)
        assert torch.equal(after[:, :place], before[:, :place])
        assert torch.equal(after[1], before[1])
        if which < 2 or place == 0:
            assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rank", [3, 20])
def test_an_input_that_is_not_a_number_stays_in_its_column_and_means_what_it_means_in_the_loop(value, rank):
    x, u, v, a, s = example(rank=rank)
    u[:, 30:, 1] = v[:, 30:, 1] = 0.0
    x[0, 20, 2] = value
    found, state = operator(x, u, v, a, s, chunk=8)
    wanted, last = by_loop(x, u, v, a, s)
    for ours, theirs in ((found, wanted), (state, last)):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert torch.allclose(ours[ours.isfinite()], theirs[theirs.isfinite()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [3, 20])
def test_a_decay_that_is_not_a_number_reaches_closed_channels_too(rank):
    x, u, v, a, s = example(rank=rank)
    u[:, 10:] = v[:, 10:] = 0.0
    a[0, 30, -1] = math.nan
    found, state = operator(x, u, v, a, s, chunk=8)
    wanted, last = by_loop(x, u, v, a, s)
    for ours, theirs in ((found, wanted), (state, last)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_segment_is_that_segment_alone_whatever_precedes_it(backend, which):
    x, u, v, a, s = example(batch=1)
    (x, u, v)[which][:, 9] = math.inf
    ids = torch.tensor([[0] * 10 + [5] * 1 + [0] * 22 + [2] * 17])
    y, state = operator(x, u, v, a, s, ids, chunk=16, backend=backend)
    for part in (slice(10, 11), slice(11, 33), slice(33, 50)):
        alone, last = by_loop(*(z[:, part] for z in (x, u, v, a)), 0 * s)
        assert torch.allclose(y[:, part], alone, rtol=1e-12, atol=1e-12)
    assert torch.allclose(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_crosses_a_segment(backend):
    leaves = [z.requires_grad_() for z in example(batch=1)]
    ids = torch.tensor([[0] * 21 + [1] * 29])
    y, _ = operator(*leaves, ids, chunk=8, backend=backend)
    *slopes, initial = torch.autograd.grad(y[:, 21:].sum(), leaves)
    assert not initial.any()
    for slope in slopes:
        assert not slope[:, :21].any()
        assert slope[:, 22:].any()
    assert not slopes[3][:, 21].any()


def test_decays_of_zero_and_one_are_exact():
    x, u, v, a, s = example(length=40)
    a[:, ::3], a[:, 1::3] = 0.0, 1.0
    leaves = [z.requires_grad_() for z in (x, u, v, a, s)]
    found, wanted = operator(*leaves, chunk=16)[0], by_loop(*leaves)[0]
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, wanted)]
    for ours, theirs in zip(*slopes, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-9)


def test_strong_decays_neither_overflow_nor_lose_the_neighbour():
    x, u, v, _, s = example(length=128, dtype=torch.float32)
    a = torch.full_like(u, 1e-30)
    found, _ = operator(x, u, v, a, s)
    assert torch.allclose(found, (u * v).sum(-1, keepdim=True) * x, rtol=1e-5, atol=1e-5)


def test_closed_channels_change_nothing_and_are_left_out(monkeypatch):
    x, u, v, a, s = example(rank=48, length=64, dtype=torch.float32)
    gate = torch.zeros(48)
    gate[16:32] = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(eager, "_closed", lambda *_: False)
        patch.setattr(eager, "_used", lambda z: [True] * z.shape[1])
        whole = operator(x, u * gate, v * gate, a, s, chunk=16)
    sizes = []
    with monkeypatch.context() as patch:
        chunks = eager.chunks
        patch.setattr(eager, "chunks", lambda *given: sizes.append(given[0].shape[-1]) or chunks(*given))
        y, state = operator(x, u * gate, v * gate, a, s, chunk=16)
    assert sizes == [16]
    assert torch.equal(y, whole[0])
    assert torch.allclose(state, whole[1], rtol=1e-5, atol=1e-37)
    narrow, _ = operator(x, u[..., 16:32], v[..., 16:32], a[..., 16:32], s[:, 16:32], chunk=16)
    assert torch.equal(y, narrow)


def gradients(arguments, grad_final=None, run=None):
    leaves = [z.clone().requires_grad_() for z in arguments]
    y, final = operator(*leaves, run, chunk=16)
    weights = drawn(*y.shape, seed=9)
    loss = (y * weights).sum() + (0.0 if grad_final is None else (final * grad_final).sum())
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def by_loop_gradients(arguments, grad_final=None):
    leaves = [z.clone().requires_grad_() for z in arguments]
    y, final = by_loop(*leaves)
    loss = (y * drawn(*y.shape, seed=9)).sum() + (0.0 if grad_final is None else (final * grad_final).sum())
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.mark.parametrize("closed", [slice(0, 16), slice(16, 32), slice(16, 40), slice(0, 40)])
def test_closed_channels_are_left_out_of_the_gradient(monkeypatch, closed):
    *tokens, _ = example(rank=40)
    arguments = [*tokens, torch.zeros(2, 40, 4, dtype=torch.float64)]
    arguments[1][..., closed] = arguments[2][..., closed] = 0.0
    wanted, widths = by_loop_gradients(arguments), []
    chunks = eager.chunks
    monkeypatch.setattr(eager, "chunks", lambda u, *rest: widths.append(u.shape[-1]) or chunks(u, *rest))
    found = gradients(arguments)
    for slope, expected in zip(found, wanted, strict=True):
        assert torch.allclose(slope, expected, rtol=1e-11, atol=1e-11)
    assert widths[-1] == max(40 - len(range(40)[closed]), 16)


@pytest.mark.parametrize("which", ["state that enters", "gradient of the state that leaves", "infinite input"])
def test_closed_channels_that_matter_keep_their_gradient(which):
    *tokens, state = example(rank=40)
    arguments = [*tokens, state if which == "state that enters" else torch.zeros_like(state)]
    arguments[1][..., 16:] = arguments[2][..., 16:] = 0.0
    if which == "infinite input":
        arguments[0][0, 3, 1] = math.inf
        full = gradients([*(z.clone() for z in arguments[:4]), 0.0 * state + 1e-300])
        assert [z.isnan().any() for z in gradients(arguments)] == [z.isnan().any() for z in full]
        return
    grad_final = state if which.startswith("gradient") else None
    for slope, expected in zip(gradients(arguments, grad_final), by_loop_gradients(arguments, grad_final), strict=True):
        assert torch.allclose(slope, expected, rtol=1e-11, atol=1e-11)


def test_the_derivative_of_the_gradient_of_closed_channels_is_not_zero():
    x, u, v, decay, _ = example(batch=1, length=5, rank=17, width=2)
    u[..., 1:], v[..., 1:] = 0.0, 0.0
    start = torch.zeros(1, 17, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda u, v: operator(x, u, v, decay, start, chunk=4)[0], (u.requires_grad_(), v.requires_grad_())
    )


def test_a_tile_that_is_closed_for_some_chunks_is_left_out_of_them_only():
    x, u, v, a, s = example(rank=32, length=64, dtype=torch.float32)
    u[:, 16:48, 16:] = v[:, 16:48, 16:] = 0.0
    found, wanted = operator(x, u, v, a, s, chunk=16), by_loop(x, u, v, a, s)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_pieces_give_the_bits_of_one_run_where_a_tile_is_closed_in_one_of_them():
    x, u, v, _, s = example(rank=40, length=96, dtype=torch.float32)
    a = 0.9 + 0.1 * decays(*u.shape, dtype=torch.float32)
    u[:, :64, 16:], v[:, :64, 16:] = 0.0, 0.0
    ids = torch.tensor([0] * 5 + [1] * 91)
    for given in (None, ids):
        whole, last = operator(x, u, v, a, s, given, chunk=16)
        parts, state = [], s
        for piece in (slice(0, 64), slice(64, 96)):
            part = None if given is None else given[piece]
            y, state = operator(*(z[:, piece] for z in (x, u, v, a)), state, part, chunk=16)
            parts.append(y)
        assert last[:, 16:].any()
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(state, last)


@pytest.mark.parametrize("run", [None, torch.zeros(2, 3, 8, dtype=torch.int64, device="meta")])
def test_off_the_cpu_nothing_waits_for_a_number(run):
    x, u, v, a = (z.unflatten(1, (-1, 8)).to("meta") for z in example(length=24)[:4])
    y, state = eager.operate(x, u, v, a, drawn(2, 20, 4).to("meta"), run)
    assert y.shape == x.shape
    assert state.shape == (2, 20, 4)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("ids", [[0] * 50, [0] * 13 + [1] * 9 + [0] * 28])
def test_off_the_cpu_an_input_that_is_not_finite_reaches_what_it_reaches_in_the_loop(monkeypatch, value, ids):
    x, u, v, a, s = example(rank=20)
    u[:, 30:, 1] = v[:, 30:, 1] = 0.0
    x[0, 6, 1] = x[1, 20, 2] = x[0, 40, 0] = value
    monkeypatch.setattr(eager, "_readable", lambda _: False)
    y, last = operator(x, u, v, a, s, torch.tensor(ids), chunk=8)
    state, begins = s, [t for t in range(1, 50) if ids[t] != ids[t - 1]]
    for first, end in zip([0, *begins], [*begins, 50], strict=True):
        state = state if first == 0 else 0 * s
        wanted, state = by_loop(*(z[:, first:end] for z in (x, u, v, a)), state)
        held = wanted.isfinite()
        assert torch.equal(y[:, first:end].isfinite(), held)
        assert torch.allclose(y[:, first:end][held], wanted[held], rtol=1e-12, atol=1e-12)
    held = state.isfinite()
    assert torch.equal(last.isfinite(), held)
    assert torch.allclose(last[held], state[held], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_streams_in_float32_when_the_state_is_float32(dtype):
    x, one = torch.full((1, 3000, 1), 2.0**-10, dtype=dtype), torch.ones(1, 3000, 1, dtype=dtype)
    a, state = torch.tensor(0.9995), torch.zeros(1, 1, 1)
    for part in x.split(600, 1):
        y, state = operator(part, one[:, :600], one[:, :600], a, state)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    limit = 2.0**-10 * (1 - 0.9995**3000) / (1 - 0.9995)
    assert abs(float(state) / limit - 1) < 1e-4


def test_autocast_changes_nothing():
    arguments = example(dtype=torch.float32)
    leaves = [z.requires_grad_() for z in arguments]
    plain = operator(*leaves)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = operator(*leaves)[0]
        slopes = torch.autograd.grad(cast.sum(), leaves)
    assert torch.equal(cast, plain)
    for ours, theirs in zip(slopes, torch.autograd.grad(plain.sum(), leaves), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_arguments_are_saved():
    leaves = [z.requires_grad_() for z in example(length=1024, width=64, rank=32, batch=1)]
    held = {}

    def pack(z):
        held[z.data_ptr()] = z.nbytes
        return z

    with saved_tensors_hooks(pack, lambda z: z):
        operator(*leaves)
    assert sum(held.values()) <= sum(z.nbytes for z in leaves)


@pytest.mark.parametrize("run", [False, True])
def test_the_operator_is_registered_properly(run):
    x, u, v, a = (z.unflatten(1, (-1, 4)).requires_grad_() for z in example(length=8, rank=3)[:4])
    state = drawn(2, 3, 4, seed=5).requires_grad_()
    marks = torch.tensor([[[0, 0, 1, 1], [0, 0, 0, 1]]]).expand(2, -1, -1) if run else None
    torch.library.opcheck(CHUNKED, (x, u, v, a, state, marks))


def test_a_tangent_takes_plain_operations_or_raises():
    x, u, v, a, s = example(length=6, rank=3)
    direction = drawn(*u.shape, seed=9)

    def along(w, backend="auto"):
        return operator(x, w, v, a, s, backend=backend)[0]

    tangent = torch.func.jvp(along, (u,), (direction,))[1]
    assert torch.allclose(tangent, along(u + 0.5 * direction) - along(u - 0.5 * direction), rtol=1e-11, atol=1e-12)
    with forward_ad.dual_level(), pytest.raises(BackendError, match="tangent"):
        along(forward_ad.make_dual(u, direction), "chunked")


def test_it_says_which_backends_run():
    assert "chunked" in room.explain_backend(drawn(1, 2, 3))


def test_the_first_token_receives_credit_from_the_last():
    one = torch.ones(1, 4096, 1, dtype=torch.float64)
    x = one.clone().requires_grad_()
    y, _ = operator(x, one, one, torch.tensor([0.999], dtype=torch.float64))
    (slope,) = torch.autograd.grad(y[0, -1, 0], x)
    assert math.isclose(float(slope[0, 0, 0]), 0.999**4095, rel_tol=1e-10)


def test_a_batch_of_cotangents_gives_the_gradients_of_each():
    x, u, v, decay, _ = example(1, 16)
    u[..., :16], v[..., :16] = 0.0, 0.0
    y, _ = operator(x.requires_grad_(), u.requires_grad_(), v, decay)
    cotangents = drawn(3, *y.shape, seed=9)
    together = torch.autograd.grad(y, (x, u), cotangents, is_grads_batched=True, retain_graph=True)
    for place, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(y, (x, u), cotangent, retain_graph=True)
        for one, other in zip(together, alone, strict=True):
            assert torch.allclose(one[place], other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_the_band_is_a_convolution_that_looks_back(kernel):
    x, taps = drawn(3, 20, 5), drawn(kernel, 5, seed=2)
    y, state = room.banded(x, taps)
    for row in range(3):
        for channel in range(5):
            wanted = np.convolve(x[row, :, channel].numpy(), taps[:, channel].numpy())[:20]
            assert np.allclose(y[row, :, channel].numpy(), wanted, rtol=1e-12, atol=1e-13)
    assert torch.equal(state, x[:, 21 - kernel :])


@pytest.mark.parametrize("value", [5.0, math.inf, math.nan])
def test_a_later_input_changes_no_bit_of_the_band_before(value):
    x, taps = drawn(2, 20, 5, dtype=torch.float32), drawn(3, 5, seed=2, dtype=torch.float32)
    later = x.clone()
    later[0, 11, 2] = value
    before, after = room.banded(x, taps)[0], room.banded(later, taps)[0]
    assert torch.equal(before[:, :11], after[:, :11])
    assert torch.equal(before[0, 14:], after[0, 14:])


def test_a_short_stream_keeps_the_inputs_before_it():
    x, taps = drawn(1, 9, 2), drawn(5, 2, seed=2)
    whole, end = room.banded(x, taps)
    parts, state = [], None
    for part in x.split(1, 1):
        y, state = room.banded(part, taps, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-13, atol=1e-13)
    assert torch.equal(state, end)


def test_without_decay_the_compatible_form_is_the_running_sum():
    u, v = drawn(2, 30, 4), drawn(2, 30, 4, seed=1)
    y, state = room.compat(u, v, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(y, u.cumsum(1) * v, rtol=1e-12, atol=1e-12)
    assert torch.allclose(state, u.sum(1), rtol=1e-12, atol=1e-12)
