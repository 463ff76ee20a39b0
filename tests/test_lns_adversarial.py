"""Sign–log products on inputs made to break them, judged entry by entry by sums in extended precision.

Each family draws float32 or float64 factors; every output is held to the bound that docs/math/lns.md proves, with its
own κ, depth and rung. ``pytest tests/test_lns_adversarial.py -k shares -s`` prints which rung decided what.
"""

import math
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch

from so8t_torch.core.errors import DomainError
from so8t_torch.ops import lns

EXTENDED = np.longdouble
U = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
RANGE = {torch.float32: 87.3, torch.float64: 708.0}
RUNGS = ("rescaled", "boosted", "blocked", "float64", "streamed")
ROWS, TERMS, COLUMNS = 45, 61, 37

pytestmark = pytest.mark.skipif(
    np.finfo(EXTENDED).eps > 2.0**-60, reason="needs a long double of at least 64 significant bits"
)


class Factors(NamedTuple):
    """A product in sign–log form."""

    sign_a: torch.Tensor
    log_a: torch.Tensor
    sign_b: torch.Tensor
    log_b: torch.Tensor


class Truth(NamedTuple):
    """The product in extended precision: weights are s s sign(S) exp(p − ℓ)."""

    sign: np.ndarray
    log: np.ndarray
    magnitude: np.ndarray
    kappa: np.ndarray
    weights: np.ndarray


def truth_of(factors):
    a, b = (factors[i].numpy().astype(EXTENDED) for i in (1, 3))
    s = factors.sign_a.numpy()[:, None, :] * factors.sign_b.numpy().T[None]
    left, right = a[:, None, :], b.T[None]
    p = np.where(s == 0, -np.inf, left + right)
    with np.errstate(invalid="ignore"):
        part = p - left
        rest = finite((right - part) + (left - (p - part)))
    top = p.max(-1)
    terms = s * np.exp((p - finite(top)[..., None]) + rest)
    total, size = terms.sum(-1), np.abs(terms).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kappa = np.where(size == 0, 1, size / np.abs(total))
        weights = np.where((total == 0)[..., None], 0, terms / total[..., None])
        log, magnitude = top + np.log(np.abs(total)), top + np.log(size)
    return Truth(np.sign(total).astype(np.int8), log, magnitude, kappa, weights)


def error_bounds(factors, truth, rung):
    """Return the proven relative error of Σ terms, and the proven error of its log, for each output and its rung."""
    dtype, terms = factors.log_a.dtype, factors.log_a.shape[1]
    with np.errstate(invalid="ignore"):
        depth = finite(np.maximum(shift_of(factors) - truth.magnitude, 0))
    linear = np.where(
        rung == 3, depth + RANGE[torch.float64], np.where(rung == 4, 0, depth + (rung > 0) * RANGE[dtype])
    )
    height = linear + np.where(rung == 3, finite(np.abs(truth.magnitude)), 0)
    unit = np.where(rung >= 3, U[torch.float64], U[dtype])
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.asarray(truth.kappa * unit * (terms + math.log(terms) + 16 + height), float)
        summed = np.where(relative < 1, -np.log1p(-np.minimum(relative, 1)), np.inf)
        logs = finite(np.abs(truth.log)) + np.where(rung >= 3, 0, linear + finite(np.log(truth.kappa)))
    return relative, np.asarray(summed + 2 * U[dtype] * logs, float)


def finite(x):
    return np.where(np.isfinite(x), x, 0)


def shift_of(factors):
    """Return a_i + b_j, the largest logs of each row and column."""
    counted = [
        np.where(s == 0, -np.inf, x) for s, x in ((f.numpy() for f in pair) for pair in (factors[:2], factors[2:]))
    ]
    return counted[0].max(1)[:, None].astype(float) + counted[1].max(0).astype(float)


def gaussian(generator, std, shape=(ROWS, TERMS, COLUMNS)):
    m, k, n = shape
    drawn = []
    for size in ((m, k), (k, n)):
        drawn += [generator.choice([-1, 1], size), std * generator.standard_normal(size)]
    return drawn


def with_zeros(generator):
    sign_a, log_a, sign_b, log_b = gaussian(generator, 3.0)
    sign_a[generator.random(sign_a.shape) < 0.7] = 0
    sign_b[generator.random(sign_b.shape) < 0.7] = 0
    sign_a[::9], sign_b[:, ::7] = 0, 0
    return sign_a, log_a, sign_b, log_b


def with_shifts(height):
    def draw(generator):
        sign_a, log_a, sign_b, log_b = gaussian(generator, 2.0)
        log_a += height * generator.choice([-1, 0, 1], (ROWS, 1))
        return sign_a, log_a, sign_b, log_b + height * generator.choice([-1, 0, 1], COLUMNS)

    return draw


def with_distant_rows(generator):
    """Wide logs about 10⁸, where float32 counts by eights."""
    sign_a, log_a, sign_b, log_b = gaussian(generator, 60.0, (45, 200, 37))
    log_a += 1e8 * generator.standard_normal((len(log_a), 1))
    return sign_a, log_a, sign_b, log_b + 1e8 * generator.standard_normal(log_b.shape[1])


def with_useless_giants(generator):
    sign_a, log_a, sign_b, log_b = gaussian(generator, 2.0)
    giant = generator.integers(0, TERMS, ROWS)
    log_a[np.arange(ROWS), giant] += 500.0
    log_b[np.unique(giant)] -= generator.choice([1000.0, 5000.0])
    log_b[generator.integers(0, TERMS, COLUMNS), np.arange(COLUMNS)] += 40.0
    return sign_a, log_a, sign_b, log_b


def with_opposed_factors(std):
    """Factors of wildly different size whose products are all of size one."""

    def draw(generator):
        sign_a, log_a, sign_b, log_b = gaussian(generator, 1.0)
        opposed = std * generator.standard_normal(TERMS)
        return sign_a, log_a + opposed, sign_b, log_b - opposed[:, None]

    return draw


def with_cancellation(generator):
    """Pairs that differ in their log by 10⁻¹ to 10⁻⁷ by row; every ninth row cancels exactly."""
    sign_a, log_a, sign_b, log_b = gaussian(generator, 1.0)
    sign_a[:, :], sign_b[:, :] = 1, 1
    last = TERMS - 1
    closeness = 10.0 ** -generator.uniform(1, 7, (ROWS, 1)) * generator.choice([0.5, 1.0, 2.0], (ROWS, last // 2))
    closeness[::9] = 0.0
    sign_a[:, 1:last:2], log_a[:, 1:last:2] = -1, log_a[:, 0:last:2] - closeness
    log_b[1:last:2] = log_b[0:last:2]
    sign_a[:, last] = 0
    return sign_a, log_a, sign_b, log_b


def with_deep_cancellation(generator):
    """Two columns of cancelling pairs against each other: what is left is second order, κ up to 10¹³."""
    sign_a, log_a, sign_b, log_b = with_cancellation(generator)
    half = (TERMS - 1) // 4 * 2
    sign_a[:, half : 2 * half] = -sign_a[:, :half]
    log_a[:, half : 2 * half] = log_a[:, :half]
    log_a[:, half : half + 2] += 1e-5 * generator.standard_normal((ROWS, 1))
    log_b[half : 2 * half] = log_b[:half]
    sign_a[:, 2 * half :] = 0
    return sign_a, log_a, sign_b, log_b


def with_distant_cancellation(generator):
    """Cancelling pairs far below the largest factors, with logs of 10⁸."""
    sign_a, log_a, sign_b, log_b = with_cancellation(generator)
    opposed = np.repeat(400.0 * generator.standard_normal((TERMS + 1) // 2), 2)[:TERMS]
    return sign_a, log_a + opposed + 1e8 * generator.choice([-1, 1], (ROWS, 1)), sign_b, log_b - opposed[:, None]


FAMILIES = {
    "std 1": lambda g: gaussian(g, 1.0),
    "std 10": lambda g: gaussian(g, 10.0),
    "std 40": lambda g: gaussian(g, 40.0),
    "std 60": lambda g: gaussian(g, 60.0),
    "std 300": lambda g: gaussian(g, 300.0),
    "std 1000": lambda g: gaussian(g, 1000.0),
    "zeros": with_zeros,
    "shifts of 80": with_shifts(80.0),
    "shifts of 10⁴": with_shifts(1e4),
    "std 60 about 10⁸": with_distant_rows,
    "useless giants": with_useless_giants,
    "opposed, std 30": with_opposed_factors(30.0),
    "opposed, std 200": with_opposed_factors(200.0),
    "cancelling pairs": with_cancellation,
    "cancelling twice": with_deep_cancellation,
    "cancelling at 10⁸": with_distant_cancellation,
    "one term": lambda g: gaussian(g, 100.0, (ROWS, 1, COLUMNS)),
    "4096 terms": lambda g: gaussian(g, 2.0, (7, 4096, 9)),
    "4096 wide terms": lambda g: gaussian(g, 80.0, (7, 4096, 9)),
}
SIGNED = [pytest.param(draw, dtype, id=f"{name}, {str(dtype)[6:]}") for name, draw in FAMILIES.items() for dtype in U]


def drawn(draw, dtype, seed=0):
    sign_a, log_a, sign_b, log_b = draw(np.random.default_rng(seed))
    signs = [torch.from_numpy(s.astype(np.int8)) for s in (sign_a, sign_b)]
    logs = [
        torch.from_numpy(x).to(dtype).masked_fill(s == 0, -math.inf) for s, x in zip(signs, (log_a, log_b), strict=True)
    ]
    return Factors(signs[0], logs[0], signs[1], logs[1])


def positive(factors):
    return Factors(factors.sign_a.abs(), factors.log_a, factors.sign_b.abs(), factors.log_b)


def wrong(found, expected, bound):
    """Return where a log is off by more than its bound, or −∞ on one side only, or NaN."""
    found, expected = np.asarray(found, float), np.asarray(expected)
    with np.errstate(invalid="ignore"):
        return ~(np.isneginf(found) & np.isneginf(expected)) & ~(np.abs(found - expected) <= bound)


def mp_terms(factors, i, j):
    rows = zip(
        *(x.tolist() for x in (factors.sign_a[i], factors.log_a[i], factors.sign_b[:, j], factors.log_b[:, j])),
        strict=True,
    )
    return [s * t * mpmath.exp(mpmath.mpf(a) + mpmath.mpf(b)) for s, a, t, b in rows if s * t]


@pytest.mark.parametrize(("draw", "dtype"), SIGNED)
def test_the_judge_is_exact_enough(draw, dtype):
    factors = drawn(draw, dtype)
    truth = truth_of(factors)
    with mpmath.workdps(60):
        for i, j in ((0, 0), (3, 5), (6, 8)):
            terms = mp_terms(factors, i, j)
            total, size = mpmath.fsum(terms), mpmath.fsum(map(abs, terms))
            assert int(mpmath.sign(total)) == truth.sign[i, j]
            if total:
                error = abs(mpmath.log(abs(total)) - mpmath.mpf(np.format_float_positional(truth.log[i, j])))
                noise = size / abs(total) * (20 + abs(mpmath.log(abs(total)))) + abs(mpmath.log(abs(total)))
                assert error <= noise * 2.0**-62


@pytest.mark.parametrize(("draw", "dtype"), SIGNED)
def test_signs_are_exact_and_logs_within_their_bound(draw, dtype):
    factors = drawn(draw, dtype)
    truth, report = truth_of(factors), lns.matmul_report(*factors)
    rung, undecided = report.rung.numpy(), report.undecided.numpy()
    _, bound = error_bounds(factors, truth, rung)
    assert not report.log.isnan().any()
    assert np.array_equal(report.sign.numpy()[~undecided], truth.sign[~undecided])
    assert not (wrong(report.log, truth.log, bound) & ~undecided).any()
    sign, log = lns.matmul(*factors)
    assert torch.equal(sign, report.sign)
    assert torch.equal(log, report.log)


@pytest.mark.parametrize(("draw", "dtype"), SIGNED)
def test_what_is_undecided_deserves_it_and_says_how_much_cancelled(draw, dtype):
    factors = drawn(draw, dtype)
    truth, report = truth_of(factors), lns.matmul_report(*factors)
    undecided, condition = report.undecided.numpy(), report.condition.numpy()
    terms = factors.log_a.shape[1]
    threshold = 1 / (U[torch.float64] * (terms + math.log(terms) + 16))
    assert (truth.kappa[undecided] >= threshold / 4).all()
    assert (condition[undecided] >= threshold / 4).all()
    assert (condition[~undecided] == 1).all()
    gone = np.isinf(truth.kappa)
    assert undecided[gone].all()


@pytest.mark.parametrize(("draw", "dtype"), SIGNED)
def test_logs_without_signs_are_within_their_bound(draw, dtype):
    factors = positive(drawn(draw, dtype))
    truth, report = truth_of(factors), lns.matmul_report(*factors)
    assert not report.undecided.any()
    found = lns.logmatmulexp(factors.log_a, factors.log_b)
    for log, rung in ((report.log, report.rung.numpy()), (found, np.ones(found.shape))):
        assert not wrong(log, truth.log, error_bounds(factors, truth, rung)[1]).any()


@pytest.mark.parametrize(("draw", "dtype"), SIGNED)
def test_plain_operations_refuse_what_they_cannot_do(draw, dtype):
    factors = drawn(draw, dtype)
    truth = truth_of(factors)
    try:
        sign, log = lns.matmul(*factors, backend="eager")
    except DomainError:
        return
    relative, bound = error_bounds(factors, truth, np.full(truth.sign.shape, 3))
    if dtype == torch.float64:
        relative, bound = error_bounds(factors, truth, np.zeros(truth.sign.shape))
    assert np.array_equal(sign.numpy()[relative < 0.5], truth.sign[relative < 0.5])
    assert not (wrong(log, truth.log, bound) & (relative < 0.5)).any()


@pytest.mark.parametrize(("draw", "dtype"), SIGNED)
def test_the_largest_term_is_exact(draw, dtype):
    factors = drawn(draw, dtype)
    sign_a, log_a, sign_b, log_b = (x.numpy() for x in factors)
    p = log_a[:, None] + log_b.T[None]
    first = p.argmax(-1)[..., None]
    signs = np.take_along_axis(sign_a[:, None] * sign_b.T[None], first, -1)[..., 0]
    sign, log = lns.matmul(*factors, mode="max")
    assert np.array_equal(log.numpy(), p.max(-1))
    assert np.array_equal(sign.numpy(), np.where(np.isneginf(p.max(-1)), 0, signs))


@pytest.mark.parametrize(("draw", "dtype"), SIGNED)
def test_gradients_are_within_their_bound_and_zero_at_zeros(draw, dtype):
    factors = drawn(draw, dtype)
    truth, rung = truth_of(factors), lns.matmul_report(*factors).rung.numpy()
    relative, _ = error_bounds(factors, truth, rung)
    g = np.random.default_rng(1).standard_normal(truth.sign.shape)
    g[~(relative < 0.25)] = 0.0
    log_a, log_b = (x.clone().requires_grad_() for x in (factors.log_a, factors.log_b))
    sent = torch.from_numpy(g).to(dtype)
    _, log = lns.matmul(factors.sign_a, log_a, factors.sign_b, log_b)
    found = torch.autograd.grad(log, (log_a, log_b), sent)
    weights = sent.numpy().astype(EXTENDED)[..., None] * truth.weights
    noise = gradient_noise(factors, weights, relative, sent.numpy())
    for gradient, axis, x in zip(found, (1, 0), (factors.log_a, factors.log_b), strict=True):
        exact = weights.sum(axis) if axis == 1 else weights.sum(axis).T
        allowed = noise.sum(axis) if axis == 1 else noise.sum(axis).T
        assert (np.abs(gradient.numpy() - exact) <= allowed).all()
        assert (gradient[x.isneginf()] == 0).all()


def gradient_noise(factors, weights, relative, g):
    """Return the proven error of each g_ij w_ikj: of the sum that divides it, of its exponentials, of underflow."""
    terms, u = weights.shape[-1], U[factors.log_a.dtype]
    rows = [distance(*factors[:2], 1), distance(*factors[2:], 0)]
    below = np.minimum(rows[0][:, None] + rows[1].T[None], 4 * RANGE[factors.log_a.dtype])
    own = u * (below + sum(g.shape) + 16) + np.minimum(2 * relative, 1)[..., None]
    return np.abs(weights) * own + (u / terms) * np.abs(g)[..., None]


def distance(sign, log, axis):
    """Return how far below the maximum of its row or column each log is, 0 for zeros."""
    peak = log.amax(axis, keepdim=True)
    return torch.where(sign == 0, 0.0, (peak - log).double()).numpy()


def test_tens_of_thousands_of_outputs_were_judged():
    judged = sum(
        drawn(draw, dtype).log_a.shape[0] * drawn(draw, dtype).log_b.shape[1]
        for draw in FAMILIES.values()
        for dtype in U
    )
    assert judged > 40_000


def test_shares_of_the_rungs_add_up(capsys):
    lines = ["| family | " + " | ".join((*RUNGS, "undecided", "largest κ")) + " |", "|---" * (len(RUNGS) + 3) + "|"]
    for name, draw in FAMILIES.items():
        factors = drawn(draw, torch.float32)
        report = lns.matmul_report(*factors)
        shares = report.shares()
        assert sum(shares[rung] for rung in RUNGS) == pytest.approx(1.0)
        cells = [f"{shares[rung]:.1%}" for rung in RUNGS] + [f"{report.undecided.double().mean():.1%}"]
        lines.append("| " + " | ".join((name, *cells, f"{truth_of(factors).kappa.max():.1e}")) + " |")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
