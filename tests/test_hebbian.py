"""What one pair cannot say about fast weights: causality to the bit, infinities, credit, books, registration."""

import math

import mpmath
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from so8t_torch.core.errors import BackendError, DomainError
from so8t_torch.ops import hebbian as room
from so8t_torch.ops.hebbian import arguments, eager, energy_balance, hebbian, state_bound, step

FORWARD = torch.ops.so8t.hebbian.default
GRADIENT = torch.ops.so8t.hebbian_gradient.default
CASES = [("chunked", "hebb"), ("chunked", "delta"), ("eager", "hebb"), ("eager", "delta")]
NAMES = ("q", "k", "v", "decay", "eta")


def drawn(batch=2, length=150, heads=2, width=5, depth=4, dtype=torch.float64, seed=0):
    """Return q, k, v, Γ, η and a state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (normal(batch, length, heads, size) for size in (width, width, depth))
    decay, eta = (torch.rand(batch, length, heads, generator=generator, dtype=torch.float64).to(dtype) for _ in "ab")
    return [q, k, v, 0.2 * decay, eta, normal(batch, heads, width, depth)]


def by_loop(q, k, v, decay, eta, state, rule="hebb", unit=True):
    """Return every read and the last state, one head and one token at a time."""
    y = torch.zeros_like(v)
    last = state.clone()
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            s = state[b, h]
            for t in range(v.shape[1]):
                key = k[b, t, h] / k[b, t, h].norm() if unit else k[b, t, h]
                s = s * math.exp(-float(decay[b, t, h]))
                value = v[b, t, h] - s.T @ key if rule == "delta" else v[b, t, h]
                s = s + eta[b, t, h] * torch.outer(key, value)
                y[b, t, h] = s.T @ q[b, t, h]
            last[b, h] = s
    return y, last


@pytest.mark.parametrize("length", [1, 2, 15, 17, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_any_length_equals_the_loop(length, rule):
    *tokens, state = drawn(1, length)
    y, last = hebbian(*tokens, state, rule=rule)
    wanted, final = by_loop(*tokens, state, rule)
    assert torch.allclose(y, wanted, rtol=1e-11, atol=1e-12)
    assert torch.allclose(last, final, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 10.0, 1e3, math.inf])
@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_any_rate_equals_the_loop(rate, rule):
    q, k, v, decay, eta, state = drawn(1, 70)
    decay[:, ::3] = rate
    y, last = hebbian(q, k, v, decay, eta, state, rule=rule)
    wanted, final = by_loop(q, k, v, decay, eta, state, rule)
    assert torch.allclose(y, wanted, rtol=1e-11, atol=1e-12)
    assert torch.allclose(last, final, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 1e-12, 1e-6, 0.1, 0.49, 0.51, 10.0, 1e3])
def test_a_held_input_is_integrated_exactly(rate):
    x = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    found = arguments.held(x)
    (slope,) = torch.autograd.grad(found, x, create_graph=True)
    (bend,) = torch.autograd.grad(slope, x)
    with mpmath.workdps(40):
        moments = [mpmath.quad(lambda s, n=n: s**n * mpmath.exp(-rate * s), [0, 0.01, 0.1, 1]) for n in range(3)]
    for value, moment in zip((found, -slope, bend), moments, strict=True):
        assert float(value.detach()) == pytest.approx(float(moment), rel=1e-13)


@pytest.mark.parametrize(("backend", "rule"), CASES)
@pytest.mark.parametrize("value", [1.5, math.inf, math.nan])
@pytest.mark.parametrize("place", range(5), ids=NAMES)
def test_what_comes_later_changes_no_bit_of_what_came_before(backend, rule, value, place):
    length = 90 if backend == "chunked" else 20
    *given, state = drawn(2, length, dtype=torch.float32)
    before, _ = hebbian(*given, state, rule=rule, backend=backend)
    for t in (0, 7, length - 1):
        edited = [x.clone() for x in given]
        edited[place][0, t, 0] = value
        after, _ = hebbian(*edited, state, rule=rule, backend=backend)
        assert torch.equal(after[:, :t], before[:, :t])
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[0, :, 1], before[0, :, 1])
        if place != 3 or value != math.inf:
            assert not torch.equal(after[0, t, 0], before[0, t, 0])


@pytest.mark.parametrize("rule", ["hebb", "delta"])
@pytest.mark.parametrize(("place", "value"), [(0, 1e38), (1, 1e38), (2, 1e38), (4, 1e38), (1, math.nan), (4, math.inf)])
def test_what_overflows_later_changes_no_bit_behind_a_rate_without_bound(rule, place, value):
    q, k, v, decay, eta, state = drawn(2, 60, dtype=torch.float32)
    given = [1e6 * q, 0.3 * k, v, decay, eta]
    given[3][0, 20] = math.inf
    before, _ = hebbian(*given, state, rule=rule, key_norm="none")
    given[place] = given[place].clone()
    given[place][0, 40] = value
    after, last = hebbian(*given, state, rule=rule, key_norm="none")
    assert torch.equal(after[:, :40], before[:, :40])
    assert torch.equal(after[1], before[1])
    wanted, final = hebbian(*given, state, rule=rule, key_norm="none", backend="eager")
    assert (after.isfinite() | ~wanted.isfinite()).all()
    assert (last.isfinite() | ~final.isfinite()).all()


@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_products_that_overflow_on_the_way_are_read_as_the_loop_reads_them(rule):
    q, k, v, decay, eta, state = drawn(2, 60, dtype=torch.float32)
    k, v = 0.3 * k, v.clone()
    q[0, 30:50], k[0, 30], v[0, 30] = 1e22, 1e22, 1e-20
    k[0, 31:] = 0.0
    y, last = hebbian(q, k, v, decay, eta, 0 * state, rule=rule, key_norm="none")
    wanted, final = hebbian(q, k, v, decay, eta, 0 * state, rule=rule, key_norm="none", backend="eager")
    assert wanted.isfinite().all() or rule == "delta"
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.allclose(last, final, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("backend", "rule"), CASES)
def test_a_segment_is_that_segment_alone_whatever_precedes_it(backend, rule):
    *given, state = drawn(1, 90)
    leaves = [x.requires_grad_() for x in given]
    spoiled = [x.clone() for x in leaves]
    for x in spoiled[1:3]:
        x[:, 28] = torch.inf
    spoiled[4][:, 10] = torch.nan
    ids = torch.tensor([0] * 30 + [7] + [0] * 40 + [2] * 19)
    y, final = hebbian(*spoiled, state, ids, rule=rule, backend=backend)
    for part in (slice(30, 31), slice(31, 71), slice(71, 90)):
        alone, last = hebbian(*(x[:, part] for x in leaves), rule=rule, backend=backend)
        assert torch.allclose(y[:, part], alone, rtol=1e-11, atol=1e-12)
    assert torch.allclose(final, last, rtol=1e-11, atol=1e-12)
    assert y[:, :10].isfinite().all()
    assert y[:, 10].isnan().any()
    found = torch.autograd.grad(y[:, 71:].square().sum(), leaves)
    wanted = torch.autograd.grad(alone.square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        # what a token does to itself is not finite where it is not
        assert torch.allclose(one[:, 30:], other[:, 30:], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_the_gradient_of_early_reads_survives_a_later_infinity(rule):
    *given, state = drawn(1, 40)
    leaves = [x.requires_grad_() for x in given]
    spoiled = leaves[2].clone()
    spoiled[:, 25] = torch.inf
    y, _ = hebbian(*leaves[:2], spoiled, *leaves[3:], state, rule=rule)
    clean, _ = hebbian(*leaves, state, rule=rule)
    found, wanted = (torch.autograd.grad(x[:, :20].sum(), leaves) for x in (y, clean))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one[:, :20], other[:, :20], rtol=1e-11, atol=1e-12)


def test_the_first_token_receives_credit_from_the_last():
    q, k, v, decay, eta, _ = drawn(1, 4096)
    decay = torch.full_like(decay, 1e-3)
    v.requires_grad_()
    y, _ = hebbian(q, k, v, decay, eta)
    (dv,) = torch.autograd.grad(y[:, -1].sum(), v)
    alike = (k[0, 0] * q[0, -1]).sum(-1) / k[0, 0].norm(dim=-1)
    wanted = eta[0, 0] * alike * math.exp(-4.095)
    assert torch.allclose(dv[0, 0], wanted[:, None].expand(-1, 4), rtol=1e-9)


@pytest.mark.parametrize("pieces", [(1,) * 20, (64, 86), (63, 2, 85), (7, 143)])
@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_pieces_with_carried_state_and_steps_give_what_one_run_gives(pieces, rule):
    *given, state = drawn(2, sum(pieces))
    whole, last = hebbian(*given, state, rule=rule, discretization="zoh")
    found = []
    for part in zip(*(x.split(pieces, 1) for x in given), strict=True):
        if part[0].shape[1] == 1:
            y, state = step(state, *(x[:, 0] for x in part), rule=rule, discretization="zoh")
            y = y[:, None]
        else:
            y, state = hebbian(*part, state, rule=rule, discretization="zoh")
        found.append(y)
    assert torch.allclose(torch.cat(found, 1), whole, rtol=1e-11, atol=1e-12)
    assert torch.allclose(state, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rule", ["hebb", "delta"])
@pytest.mark.parametrize("backend", ["chunked", "eager"])
def test_a_key_of_zeros_writes_nothing_and_has_no_gradient(rule, backend):
    *given, state = drawn(1, 12)
    given[1][:, 4] = 0.0
    leaves = [x.requires_grad_() for x in given]
    y, _ = hebbian(*leaves, state, rule=rule, backend=backend)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][:, 4].any()
    assert not grads[2][:, 4].any()
    kept = torch.cat([torch.arange(4), torch.arange(5, 12)])
    shorter = [x.detach()[:, kept].clone() for x in given]
    shorter[3][:, 4] += given[3].detach()[:, 4]
    without, _ = hebbian(*shorter, state, rule=rule)
    assert torch.allclose(y[:, 5:], without[:, 4:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_keys_of_any_size_are_normalised(size):
    *given, state = drawn(1, 20, dtype=torch.float32)
    wanted, _ = hebbian(*given, state)
    given[1] = given[1] * size
    found, _ = hebbian(*given, state)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_streams_in_float32_when_the_state_is_float32(dtype):
    *given, state = drawn(1, 300, dtype=dtype)
    given[3], given[4] = torch.tensor(1e-3), torch.tensor(1e-2)
    carried = state.float()
    for part in zip(*(x.split(7, 1) for x in given[:3]), strict=True):
        y, carried = hebbian(*part, *given[3:], carried)
    assert y.dtype == dtype
    assert carried.dtype == torch.float32
    exact = hebbian(*(x.double() for x in given), state.double())[1]
    assert (carried - exact).abs().max() < 1e-5 * exact.abs().max()


def test_autocast_leaves_the_recurrence_alone():
    *given, state = drawn(1, 80, dtype=torch.float32)
    wanted, _ = hebbian(*given, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("chunked", "eager"):
            found, _ = hebbian(*given, state, backend=backend)
            assert found.dtype == torch.float32
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert energy_balance(*given[1:], state).residual.abs().max() < 1e-4


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_the_bound_holds_and_is_reached(discretization):
    *given, state = drawn(2, 100)
    bound = state_bound(*given[1:], state, discretization=discretization)
    energy = energy_balance(*given[1:], state, discretization=discretization).energy
    assert ((2 * energy).sqrt() <= bound * (1 + 1e-12)).all()
    same = [x[:, :1].expand(x.shape).clone() for x in given[:5]]
    bound, energy = (f(*same[1:], discretization=discretization) for f in (state_bound, energy_balance))
    assert torch.allclose((2 * energy.energy).sqrt(), bound, rtol=1e-12)
    # the geometric series, and for held inputs the bound that does not know dt
    rate, eta, v = same[3][:, 0], same[4][:, 0], same[2][:, 0].norm(dim=-1)
    ceiling = eta * v / rate if discretization == "zoh" else eta * v / -torch.expm1(-rate)
    assert (bound <= ceiling[:, None] * (1 + 1e-12)).all()


def test_only_arguments_and_one_state_per_chunk_are_saved():
    *given, state = (x.requires_grad_() for x in drawn(1, 256, 2, 8, 8))
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        hebbian(*given, state, key_norm="none")
    tokens, states = 256 * 2 * (8 + 8 + 8 + 3), (256 // eager.CHUNK) * 2 * 8 * 8
    assert sum(kept) <= tokens + states + 2 * 2 * 64


def opcheck_examples():
    for delta in (False, True):
        q, k, v, decay, eta, state = drawn(2, 3, 1, 2, 2)
        restart = torch.tensor([[False, False, True]] * 2)
        k = 0.5 * k
        for start, flags in ((state, restart), (None, None))[: 1 if delta else 2]:
            states = FORWARD(q, k, v, -decay, eta, start, flags, delta, "chunked")[2]
            yield FORWARD, (q, k, v, -decay, eta, start, flags, delta, "chunked")
            grads = torch.ones_like(v), torch.ones_like(state)
            yield GRADIENT, (*grads, q, k, v, -decay, eta, start, flags, states, delta, "chunked")


@pytest.mark.parametrize(("operation", "arguments"), list(opcheck_examples()))
def test_the_registration_is_sound(operation, arguments):
    for x in arguments[: 7 if operation is FORWARD else 9]:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    # the gradient's own backward differentiates the loop twice: traced with symbolic shapes it takes a minute
    light = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operation, arguments, **({} if operation is FORWARD else {"test_utils": light}))


def test_states_that_are_handed_in_transposed_leave_as_the_registration_says():
    q, k, v, decay, eta, state = drawn(2, 3, 2, 4, 3)
    turned = state.mT.contiguous().mT
    found = FORWARD(q, k, v, -decay, eta, turned, None, False, "chunked")
    wanted = FORWARD(q, k, v, -decay, eta, state, None, False, "chunked")
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()


def test_forward_mode_takes_the_plain_form_and_is_never_silently_zero():
    *given, state = drawn(1, 12)
    direction = torch.randn(given[1].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def read(k, backend="auto"):
        return hebbian(given[0], k, *given[2:], state, backend=backend)[0]

    _, slope = torch.func.jvp(read, (given[1],), (direction,))
    ahead, behind = (read(given[1] + s * direction) for s in (1e-6, -1e-6))
    assert torch.allclose(slope, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-8)
    with pytest.raises(BackendError, match="tangent"):
        torch.func.jvp(lambda k: read(k, "chunked"), (given[1],), (direction,))


def test_a_negative_rate_is_nan_where_nothing_waits_for_values():
    *given, state = drawn(1, 6)
    given[3][0, 3, 0] = -1.0
    with pytest.raises(DomainError, match="map it by softplus"):
        hebbian(*given, state)
    torch.compiler.reset()
    checked = torch.compile(lambda x: arguments.not_negative("hebbian", x), backend="aot_eager", fullgraph=True)
    rates = checked(given[3])
    assert rates.isnan().sum() == 1
    assert rates[0, 3, 0].isnan()
    y, _ = hebbian(*given[:3], rates, given[4], state)
    assert y[0, 3:, 0].isnan().all()
    assert y[0, :3].isfinite().all()


def test_the_backends_say_why_not():
    q, k, v, *_ = drawn(1, 4)
    assert "chunked: can run" in room.explain_backend(q, k, v)
    assert "rule 'hebb' alone" in room.explain_backend(q, k, v, "delta")
