"""The sign–log kernels against float64 NumPy: every rung, every tile, edges, zeros, ±∞, NaN, and their gradients."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from so8t_torch.core.backend import interpreting, triton_installed
from so8t_torch.core.launch import fixed_tile

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs Triton")
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def interpreter(test: Any) -> Any:
    reason = "needs a process started with TRITON_INTERPRET=1"
    return pytest.mark.interpreter(pytest.mark.skipif(not interpreting(), reason=reason)(test))


@dataclass(frozen=True)
class Case:
    sign_a: Tensor | None
    log_a: Tensor
    sign_b: Tensor | None
    log_b: Tensor

    def operands(self) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        return self.sign_a, self.log_a, self.sign_b, self.log_b

    def terms(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the signs (as floats) and logs of all terms, (batch, M, K, N)."""
        a, b = self.log_a.double().numpy()[..., None], self.log_b.double().numpy()[:, None]
        signs = np.ones(np.broadcast_shapes(a.shape, b.shape))
        if self.sign_a is not None and self.sign_b is not None:
            signs = self.sign_a.double().numpy()[..., None] * self.sign_b.double().numpy()[:, None]
        with np.errstate(invalid="ignore"):
            return signs, np.where(signs == 0, -np.inf, a + b)


def draw(
    shape: tuple[int, int, int, int], std: float, signed: bool, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Case:
    batch, M, K, N = shape
    generator = torch.Generator().manual_seed(seed)

    def factor(*size: int) -> tuple[Tensor | None, Tensor]:
        log = torch.randn(size, generator=generator, dtype=dtype) * std
        if not signed:
            return None, log
        sign = torch.randint(-1, 2, size, generator=generator, dtype=torch.int8)
        return sign, log.masked_fill(sign == 0, -torch.inf)

    return Case(*factor(batch, M, K), *factor(batch, K, N))


def truth(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return sign, log, κ and the largest |exponent| of each output, in float64."""
    signs, logs = case.terms()
    peak = logs.max(2)
    shift = np.where(np.isfinite(peak), peak, 0.0)
    terms = signs * np.exp(logs - shift[:, :, None])
    total, size = terms.sum(2), np.abs(terms).sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sign(total), np.log(np.abs(total)) + shift, np.where(size == 0, 1.0, size / np.abs(total)), shift


def assert_product(case: Case, found: tuple[Tensor | None, Tensor, Tensor, Tensor]) -> np.ndarray:
    """Hold log and sign to K·u·κ and the rounding of the exponents; return the rungs."""
    sign, log, _, rung = found
    expected_sign, expected, kappa, shift = truth(case)
    unit, K = EPS[log.dtype], case.log_a.shape[-1]
    reach = max(np.abs(x[np.isfinite(x)]).max(initial=0.0) for x in (case.log_a.numpy(), case.log_b.numpy()))
    bound = unit * ((K + 16 + 4 * min(reach, 100)) * kappa + 4 * (reach + np.abs(shift)))
    empty = expected == -np.inf
    decided = rung.numpy() >= 0
    assert np.array_equal(log.numpy()[empty & decided], expected[empty & decided])
    judged = ~empty & decided
    error = np.abs(log.double().numpy()[judged] - expected[judged])
    assert (error <= bound[judged]).all(), error.max()
    if sign is not None:
        assert np.array_equal(sign.numpy()[decided], expected_sign[decided])
    return rung.numpy()


@interpreter
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("std", "dtype"), [(1.0, torch.float32), (60.0, torch.float32), (300.0, torch.float64)])
def test_the_product_equals_float64(signed: bool, std: float, dtype: torch.dtype) -> None:
    from so8t_torch.ops.lns import kernels

    case = draw((2, 35, 40, 33), std, signed, dtype=dtype)
    rung = assert_product(case, kernels.matmul(*case.operands(), "sum"))
    assert set(np.unique(rung)) <= {0, 2, 3, 4}
    if std == 1.0:
        assert (rung == 0).mean() > 0.9


@interpreter
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 70), (1, 70, 5, 1), (3, 2, 33, 17), (1, 17, 260, 5)])
def test_sizes_that_no_tile_divides(shape: tuple[int, int, int, int]) -> None:
    from so8t_torch.ops.lns import kernels

    for signed in (False, True):
        case = draw(shape, 2.0, signed, seed=sum(shape))
        assert_product(case, kernels.matmul(*case.operands(), "sum"))


@interpreter
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_sizes_are_zero_products(shape: tuple[int, int, int, int]) -> None:
    from so8t_torch.ops.lns import kernels

    case = draw(shape, 1.0, True)
    for mode in ("sum", "max"):
        sign, log, low, rung = kernels.matmul(*case.operands(), mode)
        assert sign is not None
        assert log.shape == sign.shape == rung.shape == (shape[0], shape[1], shape[3])
        assert (log == -torch.inf).all()
        assert (sign == 0).all()
    for da in (
        kernels.matmul_backward(log, None, *case.operands(), sign, log, low),
        kernels.max_backward(log, *case.operands()),
    ):
        assert [x.shape for x in da] == [case.log_a.shape, case.log_b.shape]
        assert all((x == 0).all() for x in da)


@interpreter
def test_every_tile_finds_the_same() -> None:
    from so8t_torch.ops.lns import kernels

    case = draw((1, 33, 34, 40), 3.0, True)
    g = torch.randn(1, 33, 40, generator=torch.Generator().manual_seed(1))
    sign, log, low, _ = kernels.matmul(*case.operands(), "sum")
    first = kernels.matmul_backward(g, None, *case.operands(), sign, log, low)
    for index in range(max(len(kernels.FORWARD_TILES), len(kernels.GRADIENT_TILES))):
        with fixed_tile(index):
            assert_product(case, kernels.matmul(*case.operands(), "sum"))
            found = kernels.matmul_backward(g, None, *case.operands(), sign, log, low)
        for x, y in zip(found, first, strict=True):
            assert (x - y).abs().max() <= 64 * EPS[torch.float32] * y.abs().max()


@interpreter
def test_a_few_rejected_outputs_are_done_alone_and_many_by_tiles() -> None:
    from so8t_torch.ops.lns import kernels

    case = draw((1, 32, 32, 32), 1.0, False)
    case.log_a[0, 3] = -200.0
    case.log_a[0, 3, 7] = 0.0
    case.log_b[0, 7, 5] = -150.0
    rung = assert_product(case, kernels.matmul(*case.operands(), "sum"))
    assert rung[0, 3, 5] == 3
    assert (rung != 0).sum() == 1
    # each half of k rules one factor: the products are far below both maxima, but near those of 32 indices at a time
    wide = draw((1, 32, 64, 32), 1.0, False)
    wide.log_a[0, :, :32] += 60.0
    wide.log_a[0, :, 32:] -= 60.0
    wide.log_b[0, :32] -= 60.0
    wide.log_b[0, 32:] += 60.0
    rung = assert_product(wide, kernels.matmul(*wide.operands(), "sum"))
    assert (rung == 2).all()


@interpreter
def test_a_factor_that_underflows_though_its_product_matters() -> None:
    from so8t_torch.ops.lns import kernels

    for distance in (80.0, 95.0, 120.0, 1e4):
        case = draw((1, 20, 24, 20), 1.0, False)
        case.log_a[:, :, 0] += distance
        case.log_b[:, 0, :] -= 2 * distance
        assert_product(case, kernels.matmul(*case.operands(), "sum"))


@interpreter
def test_cancellation_is_decided_in_float64_or_reported() -> None:
    from so8t_torch.ops.lns import kernels

    K = 8
    log_a = torch.zeros(1, 3, K)
    log_b = torch.zeros(1, K, 1)
    sign_a = torch.ones(1, 3, K, dtype=torch.int8)
    sign_a[:, :, 1::2] = -1
    log_a[0, 1, 0] = 2.0**-22
    log_a[0, 2, 2:] = -torch.inf
    log_a[0, 2, :2] = torch.tensor([1e4, 1e4])
    sign, log, _, rung = kernels.matmul(sign_a, log_a, torch.ones(1, K, 1, dtype=torch.int8), log_b, "sum")
    assert sign is not None
    assert rung.flatten().tolist() == [-3, 3, -3]
    assert sign.flatten().tolist() == [0, 1, 0]
    assert torch.isneginf(log[0, [0, 2]]).all()
    assert abs(float(log[0, 1]) - np.log(np.expm1(2.0**-22))) < 1e-6


@interpreter
def test_what_is_not_finite_reaches_what_it_enters_and_no_more() -> None:
    from so8t_torch.ops.lns import kernels

    for signed in (False, True):
        case = draw((1, 34, 40, 34), 1.0, signed, seed=3)
        plain = kernels.matmul(*case.operands(), "sum")
        case.log_a[0, 2, 5] = torch.nan
        case.log_a[0, 4, 6] = torch.inf
        if case.sign_a is not None and case.sign_b is not None:
            case.sign_a[0, [2, 4], [5, 6]] = 1
            case.sign_b[0, 5:7] = 1
            case.log_b[0, 5:7] = 0.0
            plain = kernels.matmul(case.sign_a, torch.nan_to_num(case.log_a, nan=0.0, posinf=0.0, neginf=-torch.inf),
                                   case.sign_b, case.log_b, "sum")  # fmt: skip
        for mode in ("sum", "max"):
            sign, log, _, _ = kernels.matmul(*case.operands(), mode)
            assert torch.isnan(log[0, 2]).all()
            assert torch.isposinf(log[0, 4]).all()
            assert torch.isfinite(log).sum() >= 32 * 34 - 4
            if sign is not None:
                assert (sign[0, [2, 4]] == 1).all()
            if mode == "sum":
                others = [i for i in range(34) if i not in (2, 4)]
                assert torch.equal(log[0, others], plain[1][0, others])


@interpreter
def test_a_sign_of_zero_wins_over_whatever_the_log_is() -> None:
    from so8t_torch.ops.lns import kernels

    case = draw((1, 5, 6, 7), 1.0, True)
    assert case.sign_a is not None
    assert case.sign_b is not None
    case.log_a[0, 1] = torch.tensor([torch.nan, torch.inf, 1e30, 80.0, -3.0, 0.0])
    case.sign_a[0, 1] = 0
    for mode in ("sum", "max"):
        sign, log, low, _ = kernels.matmul(*case.operands(), mode)
        assert sign is not None
        assert (sign[0, 1] == 0).all()
        assert torch.isneginf(log[0, 1]).all()
    da, db = kernels.matmul_backward(torch.ones_like(log), None, *case.operands(), sign, log, low)
    assert torch.isfinite(da).all()
    assert torch.isfinite(db).all()


@interpreter
@pytest.mark.parametrize("signed", [False, True])
def test_the_largest_term_is_the_first_of_equals(signed: bool) -> None:
    from so8t_torch.ops.lns import kernels

    case = draw((2, 34, 9, 35), 1.0, signed)
    rounded = Case(case.sign_a, case.log_a.round(), case.sign_b, case.log_b.round())
    signs, logs = rounded.terms()
    first = logs.argmax(2)
    sign, log, _, rung = kernels.matmul(*rounded.operands(), "max")
    assert np.array_equal(log.numpy(), logs.max(2))
    assert (rung == 0).all()
    if sign is not None:
        expected = np.take_along_axis(signs, first[:, :, None], 2)[:, :, 0]
        assert np.array_equal(sign.numpy(), np.where(logs.max(2) == -np.inf, 0, expected))
    g = torch.randn(log.shape, generator=torch.Generator().manual_seed(2))
    chosen = (np.arange(9)[None, None, :, None] == first[:, :, None]) & (logs.max(2) > -np.inf)[:, :, None]
    weighted = chosen * g.double().numpy()[:, :, None]
    for found, axis in zip(kernels.max_backward(g, *rounded.operands()), (3, 1), strict=True):
        assert np.abs(found.numpy() - weighted.sum(axis)).max() < 1e-5


@interpreter
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("std", "dtype"), [(1.0, torch.float32), (50.0, torch.float32), (400.0, torch.float64)])
def test_the_gradient_is_a_signed_softmax(signed: bool, std: float, dtype: torch.dtype) -> None:
    from so8t_torch.ops.lns import kernels

    case = draw((2, 20, 70, 18), std, signed, seed=5, dtype=dtype)
    case.log_a[0, 3] = -torch.inf
    if case.sign_a is not None:
        case.sign_a[0, 3] = 0
    sign, log, _, _ = truth(case)
    g = torch.randn(log.shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
    guard = torch.rand(log.shape, generator=torch.Generator().manual_seed(6)) < 0.2
    signs, logs = case.terms()
    kept = np.where(guard.numpy() | (log == -np.inf), 0.0, g.double().numpy())
    weights = signs * (sign * kept)[:, :, None] * np.exp(logs - np.where(log == -np.inf, 0.0, log)[:, :, None])
    sign_c = torch.from_numpy(sign).to(torch.int8) if signed else None
    log_c = torch.from_numpy(log).to(dtype)
    finite = np.where(np.isfinite(log), log, 0.0)
    low_c = torch.from_numpy(finite - torch.from_numpy(finite).to(dtype).double().numpy()).to(dtype)
    found = kernels.matmul_backward(g, guard, *case.operands(), sign_c, log_c, low_c)
    for gradient, axis in zip(found, (3, 1), strict=True):
        spread = (np.abs(weights) * (128 + 4 * std)).sum(axis)
        assert np.isfinite(gradient.numpy()).all()
        bound = EPS[dtype] * (spread + 1e-3 * np.abs(weights).max())
        assert (np.abs(gradient.double().numpy() - weights.sum(axis)) <= bound).all()
    assert (found[0][0, 3] == 0).all()


@interpreter
def test_half_precision_and_strides_are_read_as_they_are() -> None:
    from so8t_torch.ops.lns import kernels

    case = draw((2, 18, 20, 19), 2.0, True)
    signs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.sign_a, case.sign_b) if x is not None]
    for dtype in (torch.bfloat16, torch.float16):
        logs = [x.to(dtype) for x in (case.log_a, case.log_b)]
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in logs]
        found = kernels.matmul(signs[0], strided[0], signs[1], strided[1], "sum")
        assert found[1].dtype == torch.float32
        assert_product(Case(signs[0], logs[0].float(), signs[1], logs[1].float()), found)


GATE_PROGRAM = """
from parity_tests.kernel_specs.lns import original_specs
from parity_tests.kernels import gate
from so8t_torch.ops.lns.kernels import FORWARD_TILES, ORIGINAL_TILES, PRUNED

for position in {positions}:
    rows = gate(original_specs()[position][: 1 if position in PRUNED else 2], (86,))
    found = set(problem.split()[0].removesuffix(":") for row in rows for problem in row.problems)
    assert found == set(PRUNED.get(position, ())), (position, rows)
    assert (ORIGINAL_TILES[position] in FORWARD_TILES) == (not found), position
"""


@pytest.mark.slow
@pytest.mark.compile_gate
@pytest.mark.parametrize("positions", [(5, 6, 7), (0, 1, 2, 3, 4)])
def test_the_gate_finds_what_the_table_of_pruned_tiles_says(positions: tuple[int, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GATE_PROGRAM.format(positions=positions)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
