"""What the parity table cannot express about rotations: what is kept, one node, contained infinities, limits."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from so8t_torch.core.errors import BackendError, DomainError, ShapeError
from so8t_torch.ops import rotation
from so8t_torch.ops.rotation import charts, eager

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def coordinates(blocks: int, size: float = 0.1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return size * torch.randn(blocks, 28, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def channels(rows: int, width: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block_diagonal(R: torch.Tensor, width: int) -> torch.Tensor:
    return torch.block_diag(*R.double().expand(width // 8, 8, 8))


@pytest.fixture(scope="module")
def mixed_norms() -> tuple[torch.Tensor, np.ndarray]:
    """Coordinates of norm 1e-8 to 50 in one batch, and scipy's exponentials."""
    a = torch.nn.functional.normalize(coordinates(40, dtype=torch.float64), dim=1)
    a = a * torch.logspace(-8, np.log10(50.0), 40, dtype=torch.float64)[:, None]
    return a, np.stack([scipy.linalg.expm(A.numpy()) for A in rotation.skew(a)])


def test_mixed_norms_match_scipy(mixed_norms: tuple[torch.Tensor, np.ndarray]) -> None:
    a, expected = mixed_norms
    R = rotation.exponential(a)
    assert np.abs(R.numpy() - expected).max() < 1e-12
    assert rotation.orthogonality_error(R).max() <= 1e-13
    assert rotation.determinant_error(R).max() <= 1e-13
    single = rotation.exponential(a.float())
    assert single.dtype == torch.float32
    assert rotation.orthogonality_error(single).max() <= 2e-6


def test_a_block_does_not_depend_on_its_batch(mixed_norms: tuple[torch.Tensor, np.ndarray]) -> None:
    a, _ = mixed_norms
    together = rotation.exponential(a)
    halves = torch.cat([rotation.exponential(a[:20]), rotation.exponential(a[20:])])
    assert (together - halves).abs().max() < 1e-14


def test_beyond_any_norm_the_result_is_still_a_rotation() -> None:
    a = coordinates(4, size=1e6, dtype=torch.float64)
    R = rotation.exponential(a)
    assert rotation.orthogonality_error(R).max() < 1e-12
    expected = np.stack([scipy.linalg.expm(A.numpy()) for A in rotation.skew(a)])
    assert np.abs(R.numpy() - expected).max() < 1e7 * 20 * np.finfo(float).eps


def test_where_norms_are_not_read_blocks_out_of_range_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.nn.functional.normalize(coordinates(3, dtype=torch.float64), dim=1)
    a = a * torch.tensor([1.0, 4000.0, 5000.0], dtype=torch.float64)[:, None]
    expected = rotation.exponential(a)
    monkeypatch.setattr(charts, "_range", lambda _: (0, charts.DEVICE_HALVINGS))
    R = charts.exponential(a)
    assert (R[:2] - expected[:2]).abs().max() < 1e-11
    assert R[2].isnan().all()


def test_no_blocks_at_all() -> None:
    a = torch.zeros(0, 28, requires_grad=True)
    R = rotation.exponential(a)
    assert R.shape == (0, 8, 8)
    assert torch.autograd.grad(R.sum(), a)[0].shape == (0, 28)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "rows", "size"), [(384, 40, 0.05), (8, 300, 0.7), (5, 300, 0.3), (1, 33, 0.3)])
def test_many_rows_match_the_dense_matrix(dtype: torch.dtype, blocks: int, rows: int, size: float) -> None:
    R = rotation.exponential(coordinates(blocks, size, dtype=torch.float64))
    R = R if dtype == torch.float64 else R.float()
    x, dy = channels(rows, 8 * blocks, dtype), channels(rows, 8 * blocks, dtype, seed=2)
    R.requires_grad_()
    x.requires_grad_()
    y = rotation.apply(R, x)
    dR, dx = torch.autograd.grad(y, (R, x), dy)
    dense = block_diagonal(R.detach(), 8 * blocks)
    outer = dy.double().T @ x.detach().double()
    expected = (x.detach().double() @ dense.T, dy.double() @ dense)
    eps = torch.finfo(dtype).eps
    # half an eps is the rounding of the answer; the rest is the float32 (or float64) sum of eight products
    for found, truth in zip((y.detach(), dx), expected, strict=True):
        assert found.dtype == dtype
        assert (found.double() - truth).abs().max() <= (0.75 if dtype.itemsize == 2 else 4.0) * eps * truth.abs().max()
    blocks_of_outer = torch.stack([outer[k : k + 8, k : k + 8] for k in range(0, 8 * blocks, 8)])
    assert (dR.double() - blocks_of_outer).abs().max() <= 16 * torch.finfo(R.dtype).eps * blocks_of_outer.abs().max()


def test_bfloat16_channels_see_an_orthogonal_rotation() -> None:
    """Rounding R to bfloat16 would be off by 4e-3 in a fixed direction; the mean over many rows shows it."""
    R = rotation.exponential(coordinates(4, 0.5))
    x = channels(4096, 32, torch.bfloat16)
    y = rotation.apply(R, x).double()
    exact = x.double() @ block_diagonal(R, 32).T
    slope = (y * exact).sum(0) / (exact**2).sum(0)
    assert (slope - 1).abs().max() < 3e-4


def test_identity_is_bit_equal() -> None:
    for dtype in DTYPES:
        x = channels(300, 64, dtype)
        R = rotation.exponential(torch.zeros(8, 28, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
        assert torch.equal(rotation.apply(R, x), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 300])
def test_infinities_stay_in_their_block(dtype: torch.dtype, rows: int) -> None:
    R = rotation.exponential(coordinates(8)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    clean, dirty = channels(rows, 64, dtype), channels(rows, 64, dtype)
    dirty[1, 20], dirty[2, 63] = torch.inf, torch.nan
    found, expected = rotation.apply(R, dirty), rotation.apply(R, clean)
    touched = torch.zeros(rows, 64, dtype=torch.bool)
    touched[1, 16:24] = touched[2, 56:64] = True
    assert torch.equal(~found.isfinite(), touched)
    error = (found - expected).masked_fill(touched, 0.0).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_infinite_gradients_stay_in_their_block() -> None:
    R = rotation.exponential(coordinates(8)).requires_grad_()
    x = channels(300, 64, torch.bfloat16).requires_grad_()
    dy = channels(300, 64, torch.bfloat16)
    dy[7, 20] = torch.inf
    dR, dx = torch.autograd.grad(rotation.apply(R, x), (R, x), dy)
    assert (~dR.isfinite()).any((1, 2)).tolist() == [False, False, True, False, False, False, False, False]
    assert (~dx.isfinite()).nonzero().tolist() == [[7, k] for k in range(16, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_x_and_the_rotation_are_kept(dtype: torch.dtype) -> None:
    R = rotation.exponential(coordinates(8)).requires_grad_()
    x = channels(256, 64, dtype).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotation.apply(R, x)
    assert {t.data_ptr() for t in kept} == {R.data_ptr(), x.data_ptr()}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotation.apply(R.detach(), x)
    assert {t.data_ptr() for t in kept} == {R.data_ptr()}


def test_the_exponential_keeps_its_coordinates_alone() -> None:
    a = coordinates(8).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotation.exponential(a)
    assert [t.data_ptr() for t in kept] == [a.data_ptr()]


def test_strides_of_zero_and_transposed_channels() -> None:
    R = rotation.exponential(coordinates(4, dtype=torch.float64)).requires_grad_()
    x = channels(64, 40, torch.float64).T[:32].T.requires_grad_()
    y = rotation.apply(R, x)
    dR, dx = torch.autograd.grad(y.sum(), (R, x))
    ones = torch.ones(64, 32, dtype=torch.float64)
    assert (dx - ones @ block_diagonal(R.detach(), 32)).abs().max() < 1e-13
    expected = torch.einsum("ti,tj->ij", ones, x.detach())
    assert (dR - torch.stack([expected[k : k + 8, k : k + 8] for k in range(0, 32, 8)])).abs().max() < 1e-12


def test_equal_inputs_give_equal_bits() -> None:
    R, x, dy = (
        rotation.exponential(coordinates(8)),
        channels(300, 64, torch.bfloat16),
        channels(300, 64, torch.bfloat16),
    )

    def step() -> tuple[torch.Tensor, ...]:
        leaves = R.clone().requires_grad_(), x.clone().requires_grad_()
        y = rotation.apply(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


def test_operators_are_registered_as_pytorch_demands() -> None:
    R = rotation.exponential(coordinates(2, dtype=torch.float64)).requires_grad_()
    x = channels(3, 16, torch.float64).requires_grad_()
    dy = channels(3, 16, torch.float64, seed=3).requires_grad_()
    a = coordinates(2, dtype=torch.float64).requires_grad_()
    ops = torch.ops.so8t
    for op, arguments in (
        (ops.rotate_eager, (R, x)),
        (ops.rotate_eager_backward, (dy, R, x, True, True)),
        (ops.exponential, (a,)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=OPCHECKS)
    # its derivative is the second one of exp, which torch.compile does not trace
    torch.library.opcheck(ops.exponential_adjoint.default, (a, R.detach()), test_utils=OPCHECKS[:3])


def test_compiled_gate_is_one_node_each() -> None:
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def gate(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return rotation.apply(rotation.exponential(a), x)

    a, x = coordinates(2), channels(3, 16, torch.float32)
    y = torch.compile(gate, backend=record, fullgraph=True)(a, x)
    assert torch.equal(y, gate(a, x))
    assert [name for name in seen if "so8t" in name] == ["so8t.exponential.default", "so8t.rotate_eager.default"]
    assert len(seen) == 2


def test_forward_mode_is_exact_on_the_eager_path() -> None:
    R = rotation.exponential(coordinates(2, dtype=torch.float64))
    x, tangent = channels(3, 16, torch.float64), channels(3, 16, torch.float64, seed=4)
    y, dy = torch.func.jvp(lambda v: rotation.apply(R, v), (x,), (tangent,))
    assert (y - x @ block_diagonal(R, 16).T).abs().max() < 1e-14
    assert (dy - tangent @ block_diagonal(R, 16).T).abs().max() < 1e-14
    a, da = coordinates(1, dtype=torch.float64)[0], coordinates(1, seed=5, dtype=torch.float64)[0]
    _, dR = torch.func.jvp(rotation.exponential, (a,), (da,))
    _, expected = scipy.linalg.expm_frechet(rotation.skew(a).numpy(), rotation.skew(da).numpy())
    assert np.abs(dR.numpy() - expected).max() < 1e-13


def test_the_triton_backend_says_why_it_cannot_run() -> None:
    R, x = rotation.exponential(coordinates(2, dtype=torch.float64)), channels(3, 16, torch.float64)
    with pytest.raises(BackendError, match="needs a CUDA device") as caught:
        rotation.apply(R, x, backend="triton")
    assert "not torch.float64" in str(caught.value)
    assert "eager: can run" in rotation.explain_backend(R, x)


def test_forward_mode_refuses_the_triton_backend() -> None:
    R, x = rotation.exponential(coordinates(2)), channels(3, 16, torch.float32)
    with pytest.raises(BackendError, match="forward-mode"):
        torch.func.jvp(lambda v: rotation.apply(R, v, backend="triton"), (x,), (x,))


def test_safe_acts_before_cmd() -> None:
    safe, cmd = rotation.exponential(coordinates(2, dtype=torch.float64)).unbind()
    x = channels(1, 8, torch.float64)
    one_after_the_other = rotation.apply(cmd[None], rotation.apply(safe[None], x))
    at_once = rotation.apply(rotation.compose(safe, cmd)[None], x)
    swapped = rotation.apply(rotation.compose(cmd, safe)[None], x)
    assert (at_once - one_after_the_other).abs().max() < 1e-15
    assert (swapped - one_after_the_other).abs().max() > 1e-3


def test_the_two_charts_are_not_interchangeable() -> None:
    a = coordinates(1, 0.3, dtype=torch.float64)
    small = 1e-3 * a
    assert (rotation.exponential(a) - rotation.cayley(a)).abs().max() > 1e-2
    gap = rotation.exponential(small) - rotation.cayley(small)
    A = rotation.skew(small)
    # the next term, −A⁴/12, is smaller by a factor of at most the largest row sum of |A|
    assert (gap + A @ A @ A / 12).abs().max() < torch.linalg.matrix_norm(A, torch.inf).max() * gap.abs().max()


def test_gradient_descent_moves_the_coordinates() -> None:
    target = rotation.exponential(coordinates(4, 0.3, dtype=torch.float64))
    a = torch.zeros(4, 28, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([a], max_iter=100)

    def distance() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (rotation.exponential(a) - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(distance)
    assert distance() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_and_unfolding_return_the_weight(dtype: torch.dtype) -> None:
    W, b = channels(24, 16, dtype), channels(1, 24, dtype)[0]
    R = rotation.exponential(coordinates(3, 0.5))
    folded, shift = rotation.fold_output(W, b, R)
    again, bias = rotation.unfold_output(folded, shift, R)
    bound = 8 * torch.finfo(dtype).eps
    assert (again - W).abs().max() <= bound * W.abs().max()
    assert bias is not None
    assert (bias - b).abs().max() <= bound * b.abs().max()
    back = rotation.unfold_input(rotation.fold_input(W, R[:2]), R[:2])
    assert (back - W).abs().max() <= bound * W.abs().max()


def test_the_bfloat16_path_is_the_one_tested_here() -> None:
    if not eager._bfloat16_products():
        pytest.skip("this processor has no bfloat16 products; the float32 path was tested instead")
    slight = eager._rotate_rows_bfloat16(
        rotation.exponential(coordinates(4, 0.02)), channels(64, 32, torch.bfloat16), True
    )
    assert slight.shape == (64, 32)


BAD = torch.zeros(2, 8, 8)


@pytest.mark.parametrize("norm", [1e4, 1e6, 1e9])
def test_a_huge_block_stays_a_rotation_beside_small_ones(norm):
    coordinates = torch.randn(4, 28, generator=torch.Generator().manual_seed(0))
    coordinates[0, 0] = norm
    assert float(rotation.orthogonality_error(rotation.exponential(coordinates)).max()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.complex64])
def test_a_dtype_that_would_be_rounded_away_is_refused(dtype):
    with pytest.raises(DomainError, match="real floating"):
        rotation.exponential(torch.ones(2, 28).to(dtype))
    with pytest.raises(DomainError, match="real floating"):
        rotation.apply(BAD, torch.ones(3, 16).to(dtype))


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ShapeError, match="one device"):
        rotation.apply(BAD.to("meta"), torch.ones(3, 16))


@pytest.mark.parametrize(
    "call",
    [
        lambda: rotation.apply(BAD, torch.tensor(1.0)),
        lambda: rotation.isometry_error(BAD, torch.tensor(0.0)),
        lambda: rotation.fold_output(torch.ones(16), None, BAD),
        lambda: rotation.fold_output(torch.ones(16, 4), torch.ones(8), BAD),
        lambda: rotation.unfold_output(torch.ones(16, 4), torch.tensor(1.0), BAD),
    ],
)
def test_a_missing_axis_or_a_bias_of_another_length_is_a_shape_error(call):
    with pytest.raises(ShapeError, match="expected"):
        call()


@pytest.mark.parametrize(
    ("matrix", "margin"),
    [(torch.zeros(1, 8, 8), 1e-3), (torch.eye(8)[None], -1.0), (torch.eye(8)[None], float("nan"))],
)
def test_the_logarithm_refuses_what_is_no_rotation_and_no_margin(matrix, margin):
    with pytest.raises(DomainError, match="expected"):
        rotation.logarithm(matrix, margin)
