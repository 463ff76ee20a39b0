"""What one pair cannot say about sign–log products: conventions, weights, guards, shapes, registration, transforms."""

import math

import pytest
import torch
from scipy.special import logsumexp
from torch.autograd import forward_ad

from so8t_torch.core.errors import BackendError, DomainError
from so8t_torch.ops import lns

MATMUL = torch.ops.so8t.lns_matmul.default
BACKENDS = ("rescaled", "eager")


def drawn(*shape, seed=0, dtype=torch.float64, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def encoded(*shape, seed=0, dtype=torch.float64):
    return lns.encode(drawn(*shape, seed=seed, dtype=dtype))


def pair(value):
    sign, log = lns.encode(torch.tensor(value, dtype=torch.float64))
    return sign, log


def test_a_round_trip_keeps_zeros_infinities_and_nan():
    x = torch.tensor([0.0, -0.0, 2.5, -3.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    sign, log = lns.encode(x)
    assert sign.tolist() == [0, 0, 1, -1, 1, -1, 1]
    assert torch.allclose(lns.decode(sign, log), x, rtol=1e-15, atol=0, equal_nan=True)


def test_a_zero_sign_wins_over_every_log():
    zero, one = torch.zeros(3, dtype=torch.int8), torch.ones(3, dtype=torch.int8)
    garbage = torch.tensor([math.nan, math.inf, 7.0])
    assert lns.decode(zero, garbage).tolist() == [0.0] * 3
    for sign, log in (lns.mul(zero, garbage, one, garbage), lns.sum(zero, garbage)):
        assert not sign.any()
        assert log.isneginf().all()
    sign, log = lns.add(zero, garbage, one, torch.full((3,), 2.0))
    assert sign.tolist() == [1, 1, 1]
    assert log.tolist() == [2.0] * 3
    sign, log = lns.matmul(zero[None], garbage[None], one[:, None], garbage[:, None])
    assert (sign.item(), log.item()) == (0, -math.inf)


@pytest.mark.parametrize("left", [3.0, -2.0, 0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("right", [3.0, 2.0, 0.0, math.inf, -math.inf, math.nan])
def test_arithmetic_follows_that_of_floating_point(left, right):
    for op, plain in ((lns.add, left + right), (lns.sub, left - right)):
        found = lns.decode(*op(*pair(left), *pair(right))).item()
        assert found == pytest.approx(plain, rel=1e-14, nan_ok=True)
    found = lns.decode(*lns.mul(*pair(left), *pair(right))).item()
    assert found == pytest.approx(0.0 if 0.0 in (left, right) else left * right, rel=1e-14, nan_ok=True)


def test_equal_numbers_are_added_smoothly():
    def total(a, b):
        return lns.add(torch.ones((), dtype=torch.int8), a, torch.ones((), dtype=torch.int8), b)[1]

    logs = tuple(torch.tensor(2.0, dtype=torch.float64) for _ in range(2))
    assert [g.item() for g in torch.autograd.functional.jacobian(total, logs)] == pytest.approx([0.5, 0.5])
    hessian = torch.autograd.functional.hessian(total, logs)
    assert [[h.item() for h in row] for row in hessian] == [pytest.approx([0.25, -0.25]), pytest.approx([-0.25, 0.25])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_each_output_sum_to_one(backend):
    (sign_a, log_a), (sign_b, log_b) = encoded(6, 17, seed=1), encoded(17, 5, seed=2)
    log_a.requires_grad_()
    log_b.requires_grad_()
    g = drawn(6, 5, seed=3)
    _, log = lns.matmul(sign_a, log_a, sign_b, log_b, backend=backend)
    da, db = torch.autograd.grad(log, (log_a, log_b), g)
    assert torch.allclose(da.sum(1), g.sum(1), rtol=1e-11, atol=1e-11)
    assert torch.allclose(db.sum(0), g.sum(0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_those_of_scipy(backend):
    a, b = drawn(7, 23, seed=4, std=20.0), drawn(23, 6, seed=5, std=20.0)
    expected = logsumexp((a[:, :, None] + b).numpy(), axis=1)
    assert torch.allclose(lns.logmatmulexp(a, b, backend=backend), torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_zero_and_no_gradient(backend):
    for shape in ((3, 4, 5), (3, 0, 5), (0, 4, 5)):
        a, b = (torch.full(s, -math.inf, requires_grad=True) for s in (shape[:2], shape[1:]))
        out = lns.logmatmulexp(a, b, backend=backend)
        assert out.shape == (shape[0], shape[2])
        assert out.isneginf().all()
        for gradient in torch.autograd.grad(out, (a, b), torch.ones_like(out)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.9])
def test_the_guard_silences_what_cancels_and_changes_no_value(tau):
    (sign_a, log_a), (sign_b, log_b) = encoded(9, 12, seed=6), encoded(12, 8, seed=7)
    kappa = lns.condition_number(sign_a, log_a, sign_b, log_b)
    log_a.requires_grad_()
    sign, log = lns.matmul(sign_a, log_a, sign_b, log_b, cancellation_guard=tau)
    assert torch.equal(log, lns.matmul(sign_a, log_a, sign_b, log_b)[1])
    kept = kappa * tau <= 1
    assert tau in (0.0, 0.9) or 0 < kept.sum() < kept.numel()
    (found,) = torch.autograd.grad(log, log_a, torch.ones_like(log))
    terms = (sign_a[:, :, None] * sign_b) * torch.exp(log_a[:, :, None] + log_b)
    weights = terms * torch.where(kept, sign * torch.exp(-log), 0.0)[:, None]
    assert torch.allclose(found, weights.sum(-1).detach(), rtol=1e-9, atol=1e-9)


def test_one_nan_and_one_infinity_stay_where_they_are():
    a, b = drawn(40, 30, seed=8, std=90.0, dtype=torch.float32), drawn(30, 20, seed=9, dtype=torch.float32)
    clean = lns.logmatmulexp(a, b)
    a[3, 5], b[7, 11], b[2, 4] = math.nan, math.inf, math.nan
    found = lns.logmatmulexp(a, b)
    touched = torch.zeros_like(found, dtype=torch.bool)
    touched[3], touched[:, 4], touched[:, 11] = True, True, True
    assert torch.equal(found[~touched], clean[~touched])
    assert found[3].isnan().all()
    assert found[:, 4].isnan().all()
    rest = torch.arange(40) != 3
    assert found[rest, 11].isposinf().all()


def test_opposite_infinities_are_undefined():
    sign_a, log_a = torch.tensor([[1, -1, 1]], dtype=torch.int8), torch.tensor([[math.inf, math.inf, math.inf]])
    for sign, log in (
        lns.matmul(sign_a, log_a, torch.ones(3, 1, dtype=torch.int8), torch.zeros(3, 1)),
        lns.sum(sign_a, log_a),
        lns.sum(sign_a[:, :2], log_a[:, :2]),
        lns.add(sign_a[:, :1], log_a[:, :1], sign_a[:, 1:2], log_a[:, 1:2]),
    ):
        assert log.isnan().all()
        assert sign.all()
    assert lns.logmatmulexp(torch.tensor([[math.inf]]), torch.tensor([[-math.inf]])).isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_plain_operations_refuse_or_agree_beside_what_is_not_finite(value):
    a, b = drawn(4, 5, seed=10), drawn(5, 3, seed=11)
    a[1, 2] = value
    try:
        found = lns.logmatmulexp(a, b, backend="eager")
    except DomainError:
        return
    assert torch.allclose(found, lns.logmatmulexp(a, b), rtol=0, atol=1e-12, equal_nan=True)


def test_batch_axes_broadcast_as_in_torch_matmul():
    (sign_a, log_a), (sign_b, log_b) = encoded(3, 1, 4, 5, seed=12), encoded(2, 5, 6, seed=13)
    sign, log = lns.matmul(sign_a, log_a, sign_b, log_b)
    expected = drawn(3, 1, 4, 5, seed=12) @ drawn(2, 5, 6, seed=13)
    assert torch.allclose(lns.decode(sign, log), expected, rtol=1e-12, atol=1e-12)


def test_products_of_encoded_matrices_train_like_the_matrices():
    x, y = drawn(6, 7, seed=14).requires_grad_(), drawn(7, 5, seed=15).requires_grad_()
    found = lns.decode(*lns.matmul(*lns.encode(x), *lns.encode(y)))
    g = drawn(6, 5, seed=16)
    for ours, plain in zip(torch.autograd.grad(found, (x, y), g), torch.autograd.grad(x @ y, (x, y), g), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-10)


def test_a_float32_product_is_float32_whatever_autocast_says():
    (sign_a, log_a), (sign_b, log_b) = (encoded(32, 32, seed=s, dtype=torch.float32) for s in (17, 18))
    plain = lns.matmul(sign_a, log_a, sign_b, log_b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lns.matmul(sign_a, log_a, sign_b, log_b)
    assert all(torch.equal(p, c) for p, c in zip(plain, cast, strict=True))


def test_forward_mode_takes_the_plain_path_and_no_other():
    (sign_a, log_a), (sign_b, log_b) = encoded(4, 6, seed=19), encoded(6, 3, seed=20)
    direction = drawn(4, 6, seed=21)
    step = 1e-6
    ends = [lns.matmul(sign_a, log_a + s * step * direction, sign_b, log_b)[1] for s in (1, -1)]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(log_a, direction)
        tangent = forward_ad.unpack_dual(lns.matmul(sign_a, dual, sign_b, log_b)[1]).tangent
        with pytest.raises(BackendError, match="forward-mode"):
            lns.matmul(sign_a, dual, sign_b, log_b, backend="rescaled")
    assert torch.allclose(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


def test_the_registration_is_sound():
    (sign_a, log_a), (sign_b, log_b) = encoded(2, 4, 6, seed=22), encoded(2, 6, 3, seed=23)
    log_a.requires_grad_()
    log_b.requires_grad_()
    arguments = (sign_a, log_a, sign_b, log_b, *("sum", "rescaled")[4 - len(MATMUL._schema.arguments) :])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(MATMUL, arguments, test_utils=checks).values()) == {"SUCCESS"}


def test_the_report_says_why_a_backend_cannot_run():
    text = lns.explain_backend(drawn(2, 2), drawn(2, 2))
    assert "rescaled: can run" in text
    assert "eager: can run" in text


@pytest.mark.parametrize("height", [1e-30, 1e20, 1e30])
@pytest.mark.parametrize("std", [1.0, 60.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cotangents_of_any_size_give_gradients_of_that_size(height, std, dtype):
    log_a, log_b = (drawn(*shape, seed=seed, dtype=dtype, std=std) for seed, shape in enumerate([(4, 70), (70, 3)]))
    p = log_a.double()[:, :, None] + log_b.double()
    weights = torch.softmax(p, 1)
    log_a.requires_grad_()
    log_b.requires_grad_()
    c = lns.logmatmulexp(log_a, log_b)
    da, db = torch.autograd.grad(c, (log_a, log_b), torch.full_like(c, height))
    tolerance = 2000 * torch.finfo(dtype).eps
    torch.testing.assert_close(da.double() / height, weights.sum(2), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(db.double() / height, weights.sum(0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 4, 0), (3, 0, 2), (0, 0, 0)])
@pytest.mark.parametrize("batch", [(), (0,), (2,), (2, 0)])
def test_nothing_is_reported_as_zeros_that_are_not_in_doubt(shape, batch):
    m, k, n = shape
    report = lns.matmul_report(*encoded(*batch, m, k), *encoded(*batch, k, n))
    assert report.log.shape == report.sign.shape == report.rung.shape == (*batch, m, n)
    assert report.log.isneginf().all()
    assert not report.sign.any() | report.undecided.any()
    assert (report.condition == 1).all()
    assert set(report.shares()) == {"rescaled", "boosted", "blocked", "float64", "streamed"}


@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("call", [lns.matmul, lns.matmul_report, lns.condition_number])
def test_missing_signs_are_refused(call, missing):
    factors = [*encoded(2, 3), *encoded(3, 2)]
    factors[missing] = None
    with pytest.raises(DomainError, match="int8 tensor of signs"):
        call(*factors)
