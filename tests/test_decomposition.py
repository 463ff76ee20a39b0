"""TT-SVD against numpy's singular values, least squares against numpy's, one slice at a time."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.ops.tensor_train import decompose, decomposition, refine

EPS = float(np.finfo(np.float64).eps)
CASES = [
    (23, 10, (5, 5), (3, 4), (4,)),
    (25, 12, (5, 5), (3, 4), (12,)),
    (23, 10, (3, 4, 2), (2, 2, 3), (4, 3)),
    (7, 6, (2, 2, 2, 1), (1, 3, 2, 1), (2, 3, 1)),
]


def random_table(v: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(v, d, dtype=dtype, generator=torch.Generator().manual_seed(v + d))


def whole(cores) -> np.ndarray:
    """The padded table from the cores, one einsum per core."""
    found = np.ones((1, 1, 1))
    for core in cores:
        found = np.einsum("idp,jpqe->ijdeq", found, core.detach().to(torch.complex128).numpy())
        found = found.reshape(found.shape[0] * found.shape[1], -1, found.shape[-1])
    return found[:, :, 0]


def error(table: Tensor, cores) -> float:
    return float(np.linalg.norm(whole(cores)[: table.shape[0], : table.shape[1]] - table.numpy()))


def bond(table: Tensor, vocab, feature, k: int) -> np.ndarray:
    """The matrix of bond k of the zero-padded table."""
    padded = np.zeros((math.prod(vocab), math.prod(feature)), table.numpy().dtype)
    padded[: table.shape[0], : table.shape[1]] = table.numpy()
    order = len(vocab)
    axes = [axis for i in range(order) for axis in (i, order + i)]
    rows = math.prod(vocab[:k]) * math.prod(feature[:k])
    return padded.reshape(*vocab, *feature).transpose(axes).reshape(rows, -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("v", "d", "vocab", "feature", "ranks"), CASES)
def test_the_error_is_what_the_singular_values_leave_out(v, d, vocab, feature, ranks, dtype):
    table = random_table(v, d, dtype)
    cores = decompose(table, vocab_factors=vocab, feature_factors=feature, ranks=ranks)
    assert [tuple(c.shape) for c in cores] == [
        (i, p, q, j) for i, j, p, q in zip(vocab, feature, (1, *ranks), (*ranks, 1), strict=True)
    ]
    left_out = [
        float((np.linalg.svd(bond(table, vocab, feature, k + 1), compute_uv=False)[r:] ** 2).sum())
        for k, r in enumerate(ranks)
    ]
    padded = bond(table, vocab, feature, len(vocab)).size
    full = np.zeros((math.prod(vocab), math.prod(feature)), complex)
    full[:v, :d] = table.numpy()
    found = float(np.linalg.norm(whole(cores) - full)) ** 2
    bound = sum(left_out)
    slack = 100 * EPS * padded
    assert found <= bound + slack
    assert found >= max(left_out) - slack
    if len(vocab) == 2:
        assert found == pytest.approx(bound, rel=1e-10, abs=slack)


@pytest.mark.parametrize(("v", "d", "vocab", "feature", "ranks"), CASES)
def test_cores_share_one_norm_and_their_left_vectors_point_one_way(v, d, vocab, feature, ranks):
    cores = decompose(random_table(v, d), vocab_factors=vocab, feature_factors=feature, ranks=ranks)
    norms = [float(c.norm()) for c in cores]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-12)
    for core in cores[:-1]:
        columns = core.permute(1, 0, 3, 2).reshape(-1, core.shape[2])
        assert bool((columns.gather(0, columns.abs().argmax(0, keepdim=True)) > 0).all())
        gram = columns.T @ columns
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-12 * float(gram.max()))


def exact(v: int, vocab, feature, rank: int) -> Tensor:
    """A table of v rows cut out of an exactly rank-r train."""
    generator = torch.Generator().manual_seed(9)
    left, right = (
        torch.randn(n, m, generator=generator, dtype=torch.float64)
        for n, m in ((vocab[0] * feature[0], rank), (rank, vocab[1] * feature[1]))
    )
    tensor = (left @ right).reshape(vocab[0], feature[0], vocab[1], feature[1])
    return tensor.transpose(1, 2).reshape(math.prod(vocab), -1)[:v]


def test_least_squares_recover_what_padding_with_zeros_hides():
    table = exact(370, (20, 20), (4, 6), 5)
    cores = decompose(table, vocab_factors=(20, 20), feature_factors=(4, 6), ranks=(5,))
    assert error(table, cores) > 0.01 * float(table.norm()), "zero rows do not fit a train of this rank"
    assert error(table, refine(table, *cores, sweeps=60)) < 1e-10 * float(table.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize(("v", "d", "vocab", "feature", "ranks"), CASES)
def test_no_sweep_raises_the_error(v, d, vocab, feature, ranks, dtype):
    table = random_table(v, d, dtype)
    cores = decompose(table, vocab_factors=vocab, feature_factors=feature, ranks=ranks)
    errors = [error(table, refine(table, *cores, sweeps=n)) for n in range(6)]
    rounding = 20 * torch.finfo(dtype).eps * float(table.norm())
    assert all(after <= before + rounding for before, after in pairwise(errors))
    assert errors[0] == pytest.approx(error(table, cores), rel=1e-5, abs=rounding)


@pytest.mark.parametrize(("v", "d", "vocab", "feature", "ranks"), CASES)
@pytest.mark.parametrize("k", [0, 1])
def test_a_core_is_the_least_squares_solution_of_each_slice(v, d, vocab, feature, ranks, k):
    table, order = random_table(v, d), len(vocab)
    cores = list(decompose(table, vocab_factors=vocab, feature_factors=feature, ranks=ranks))
    goal = torch.zeros(math.prod(vocab), math.prod(feature), dtype=torch.float64)
    goal[:v, :d] = table
    found = decomposition._best_core(goal, (v, d), cores, k)
    seen = np.zeros(goal.shape)
    seen[:v, :d] = 1
    axes = [axis for i in range(order) for axis in (i, order + i)]
    tensors = [x.reshape(*vocab, *feature).transpose(axes) for x in (goal.numpy(), seen)]
    for i in range(vocab[k]):
        for a in range(feature[k]):
            wanted, weight = (np.take(np.take(t, i, 2 * k), a, 2 * k).ravel() for t in tensors)
            columns = []
            for p in range(cores[k].shape[1]):
                for q in range(cores[k].shape[2]):
                    probe = torch.zeros_like(cores[k])
                    probe[i, p, q, a] = 1
                    column = whole([*cores[:k], probe, *cores[k + 1 :]]).real
                    column = column.reshape(*vocab, *feature).transpose(axes)
                    columns.append(np.take(np.take(column, i, 2 * k), a, 2 * k).ravel())
            design = np.stack(columns, 1) * weight[:, None]
            x = np.linalg.lstsq(design, wanted * weight, rcond=None)[0]
            assert np.allclose(found[i, :, :, a].numpy().ravel(), x, rtol=1e-8, atol=1e-9)


def decaying(rows: int, columns: int, decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, 200, dtype=torch.float64, generator=generator)).Q for n in (rows, columns))
    return u * decay ** torch.arange(200, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("kind", ["decaying", "noise", "low rank"])
def test_iteration_finds_the_triplets_of_the_whole_decomposition(monkeypatch, kind):
    matrix = {
        "decaying": lambda: decaying(600, 500, 0.9),
        "noise": lambda: random_table(600, 500),
        "low rank": lambda: decaying(600, 500, 0.9)[:, :1] @ torch.ones(1, 500, dtype=torch.float64),
    }[kind]()
    rank = 1 if kind == "low rank" else 8
    wanted = decomposition.leading_triplets(matrix, rank)
    monkeypatch.setattr(decomposition, "DENSE_LIMIT", 0)
    calls = []
    monkeypatch.setattr(
        torch.linalg, "svd", lambda m, svd=torch.linalg.svd, **kw: calls.append(m.shape) or svd(m, **kw)
    )
    found = decomposition.leading_triplets(matrix, rank)
    assert matrix.shape not in calls, "the large matrix is only multiplied"
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


def test_what_does_not_converge_is_decomposed_whole(monkeypatch):
    monkeypatch.setattr(decomposition, "DENSE_LIMIT", 0)
    monkeypatch.setattr(decomposition, "RESIDUAL", 0.0)
    monkeypatch.setattr(decomposition, "_RESTARTS", 1)
    matrix = random_table(120, 110)
    u, s, vh = decomposition.leading_triplets(matrix, 5)
    assert np.allclose(s, np.linalg.svd(matrix.numpy(), compute_uv=False)[:5], rtol=1e-13)
    assert torch.allclose(matrix @ vh.T, u * s, atol=1e-12)


@pytest.mark.parametrize(("v", "d", "vocab", "feature", "ranks"), CASES)
def test_bond_spectra_are_squared_singular_values(v, d, vocab, feature, ranks):
    table = random_table(v, d)
    for k, found in enumerate(decomposition.bond_spectra(table, vocab_factors=vocab, feature_factors=feature)):
        wanted = np.linalg.svd(bond(table, vocab, feature, k + 1), compute_uv=False) ** 2
        assert len(ranks) > k
        assert np.allclose(found.numpy(), wanted, rtol=1e-9, atol=100 * EPS * wanted[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_cores_have_the_dtype_of_the_table_and_no_history(dtype):
    table = random_table(23, 10, torch.promote_types(dtype, torch.float32)).to(dtype).requires_grad_()
    cores = decompose(table, vocab_factors=(5, 5), feature_factors=(3, 4), ranks=(15,))
    better = refine(table, *cores)
    for core in (*cores, *better):
        assert core.dtype == dtype
        assert not core.requires_grad
        assert core.is_contiguous()
    wide = table.detach().to(torch.promote_types(dtype, torch.float64))
    assert error(wide, better) < 4 * torch.finfo(dtype).eps * float(wide.norm())


def test_a_zero_table_and_a_single_core_are_allowed():
    zero = torch.zeros(9, 6, dtype=torch.float64)
    cores = decompose(zero, vocab_factors=(3, 3), feature_factors=(2, 3), ranks=(2,))
    assert error(zero, refine(zero, *cores)) == 0.0
    table = random_table(9, 6)
    (core,) = decompose(table, vocab_factors=(9,), feature_factors=(6,), ranks=())
    assert torch.equal(core[:, 0, 0], table)


TABLE = random_table(9, 6)
FACTORS = {"vocab_factors": (3, 3), "feature_factors": (2, 3)}


@pytest.mark.parametrize(
    ("table", "change", "kind", "match"),
    [
        (TABLE[0], {}, ShapeError, "table"),
        (TABLE[:0], {}, ShapeError, "table"),
        (TABLE.int(), {}, DomainError, "floating"),
        (TABLE * math.nan, {}, DomainError, "row 0"),
        (torch.cat([TABLE[:8], TABLE[8:] * math.inf]), {}, DomainError, "row 8"),
        (TABLE, {"ranks": (7,)}, ConfigError, r"rank 1 in 1\.\.6"),
        (TABLE, {"ranks": (0,)}, ConfigError, "rank 1"),
        (TABLE, {"ranks": (2, 2)}, ConfigError, "K − 1 ranks"),
        (TABLE, {"vocab_factors": (2, 3)}, ShapeError, "cover"),
        (TABLE, {"feature_factors": (-2, -3)}, ConfigError, "factors ≥ 1"),
    ],
)
def test_a_table_that_cannot_be_decomposed_is_refused(table, change, kind, match):
    with pytest.raises(kind, match=match):
        decompose(table, **{**FACTORS, "ranks": (2,), **change})


def test_cores_that_cannot_be_refined_are_refused():
    cores = decompose(TABLE, **FACTORS, ranks=(2,))
    for arguments, kind, match in (
        ((cores[0], cores[0]), ShapeError, "chain"),
        ((cores[0],), ShapeError, "chain"),
        ((), ShapeError, "cores"),
        ((cores[0][:2], cores[1]), ShapeError, "cover"),
        ((cores[0] * math.nan, cores[1]), DomainError, "finite cores"),
    ):
        with pytest.raises(kind, match=match):
            refine(TABLE, *arguments)
    with pytest.raises(ConfigError, match="sweeps"):
        refine(TABLE, *cores, sweeps=-1)
    with pytest.raises(DomainError, match="NaN"):
        refine(TABLE * math.nan, *cores)
