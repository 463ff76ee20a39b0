"""Finds the cores of a given table: the truncated singular value decomposition of each bond, and least squares after.

    E[i, d] read as T[(i₁ d₁), (i₂ d₂), …];   at bond k:  M = U S Vᴴ,  core k ← U,  M ← S Vᴴ;   at the last one √S | √S
    refine: core k ← argmin Σ_{i<V, d<D} |E[i, d] − (C₁ C₂ … C_K)[i, d]|²   for k = 1 … K, the others held fixed

Symbols: core k has shape (v_k, r_{k−1}, r_k, d_k), r_0 = r_K = 1; V ≤ Π v_k ids, D ≤ Π d_k features. Rows and columns
that the factors add are zero for the decomposition; in the refinement they carry no weight at all.
Computed in float64. A bond of m × n costs O(m n min(m, n)) up to `DENSE_LIMIT`; above, block Krylov iteration from a
fixed start costs O(m n r) per product and is accepted when ‖M v − σ u‖ ≤ `RESIDUAL` σ₁ holds for every triplet kept.
Twin: so8t_jax/ops/tensor_train.py. Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.nn.functional import pad

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError

DENSE_LIMIT = 2_000_000_000
"""Products m n min(m, n) up to which a bond is decomposed whole (about a second on one core)."""

RESIDUAL = 1e-8
"""Largest residual of a singular triplet found by iteration, in units of the largest singular value."""

_DEPTH, _EXTRA, _RESTARTS = 8, 16, 40


@torch.no_grad()
def decompose(
    table: Inexact[Tensor, "v d"],
    *,
    vocab_factors: Sequence[int],
    feature_factors: Sequence[int],
    ranks: Sequence[int],
) -> tuple[Tensor, ...]:
    """Return cores of given ranks that approximate a table: one truncated singular value decomposition per bond.

    The largest entry of every left singular vector is positive. The last bond is split as U√S and √S Vᴴ, then every
    core is scaled to the same Frobenius norm (two cores already have it).

    Args:
        table: E, (V, D), finite, real or complex.
        vocab_factors: v_1 … v_K, whose product is at least V.
        feature_factors: d_1 … d_K, whose product is at least D.
        ranks: r_1 … r_{K−1}; r_k ≤ min(r_{k−1} v_k d_k, Π_{j>k} v_j d_j).

    Returns:
        K cores in the dtype of the table, without gradient history. For two of them the squared error is the sum of
        the squared singular values left out, the least possible; for more it is at most the sum over all bonds.

    Raises:
        ShapeError: the table is not a matrix, or the factors do not cover it.
        ConfigError: a factor is not positive, their numbers disagree, or a rank exceeds its matrix.
        DomainError: the table holds NaN or infinity, or whole numbers.

    Source: Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 33 (2011).
    """
    _check_table("decompose", table)
    check_factors("decompose", tuple(table.shape), vocab_factors, feature_factors, ranks)
    rest, lefts = _interleaved(_wide(table), vocab_factors, feature_factors).reshape(1, -1), []
    for v, d, rank in zip(vocab_factors, feature_factors, ranks, strict=False):
        p = rest.shape[0]
        u, s, vh = leading_triplets(rest.reshape(p * v * d, -1), rank)
        lefts.append(u.reshape(p, v, d, rank).permute(1, 0, 3, 2))
        rest = s[:, None] * vh
    if lefts:
        lefts[-1], rest = lefts[-1] * s.sqrt()[:, None], s.sqrt()[:, None] * vh
    last = rest.reshape(-1, vocab_factors[-1], feature_factors[-1], 1).permute(1, 0, 3, 2)
    return _narrow(_balanced([*lefts, last]), table.dtype)


@torch.no_grad()
def refine(table: Inexact[Tensor, "v d"], *cores: Tensor, sweeps: int = 1) -> tuple[Tensor, ...]:
    """Return cores that fit a table no worse: alternating least squares over the entries that the table has.

    A sweep goes from the first core to the last; each becomes the least squares solution for the others held fixed,
    the shortest one where there are several. It is found in orthonormal bases of what the others span.

    Args:
        table: E, (V, D), finite; V ≤ Π v_k, D ≤ Π d_k.
        *cores: the start, (v_k, r_{k−1}, r_k, d_k).
        sweeps: how often every core is renewed, at least 0.

    Returns:
        As many cores of the same shapes and dtypes, in the form that ``decompose`` gives; without gradient history.

    Raises:
        ShapeError: the cores do not chain from 1 to 1, or do not cover the table.
        ConfigError: a rank exceeds its matrix, or sweeps is negative.
        DomainError: the table or a core holds NaN, infinity or whole numbers, the cores differ in dtype, or they are
            real and the table is complex.
    """
    _check_table("refine", table)
    factors = _check_cores("refine", table, cores)
    if not isinstance(sweeps, Integral) or sweeps < 0:
        raise ConfigError(f"refine: expected a whole number of sweeps ≥ 0, got {sweeps!r}.")
    wide = torch.promote_types(_wide(table).dtype, torch.promote_types(cores[0].dtype, torch.float64))
    trains = [core.to(wide) for core in cores]
    goal = _padded(table.to(wide), tuple(map(math.prod, factors)))
    for _ in range(sweeps):
        for k in range(len(trains)):
            trains[k] = _best_core(goal, (table.shape[0], table.shape[1]), trains, k)
    found = _balanced(_canonical(trains))
    return tuple(core.to(given.dtype).contiguous() for core, given in zip(found, cores, strict=True))


@torch.no_grad()
def bond_spectra(
    table: Inexact[Tensor, "v d"], *, vocab_factors: Sequence[int], feature_factors: Sequence[int]
) -> list[Tensor]:
    """Return the squared singular values of every bond, largest first, from the eigenvalues of MMᴴ in float64.

    Args:
        table: E, (V, D), finite.
        vocab_factors: v_1 … v_K.
        feature_factors: d_1 … d_K.

    Returns:
        K − 1 tensors; their accuracy is eps times the largest value. A bond of m × n costs m n min(m, n) products:
        a minute for 8640 × 11520.

    Raises:
        ShapeError, ConfigError, DomainError: as for ``decompose``.
    """
    _check_table("bond_spectra", table)
    check_factors("bond_spectra", tuple(table.shape), vocab_factors, feature_factors, (1,) * (len(vocab_factors) - 1))
    tensor = _interleaved(_wide(table), vocab_factors, feature_factors)
    spectra, left = [], 1
    for v, d in zip(vocab_factors[:-1], feature_factors[:-1], strict=True):
        left *= v * d
        matrix = tensor.reshape(left, -1)
        gram = matrix @ matrix.mH if left <= matrix.shape[1] else matrix.mH @ matrix
        spectra.append(torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0))
    return spectra


def leading_triplets(matrix: Inexact[Tensor, "m n"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets (U, S, Vᴴ); the largest entry of each left vector is positive.

    Args:
        matrix: M, in float64 or complex128.
        rank: how many, at most min(m, n).

    Numerics: large matrices go through block Krylov iteration; one that does not converge is decomposed whole.
    """
    block = rank + _EXTRA
    small = math.prod(matrix.shape) * min(matrix.shape) <= DENSE_LIMIT or 2 * block > min(matrix.shape)
    found = None if small else _krylov(matrix, rank, block)
    u, s, vh = found or torch.linalg.svd(matrix, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    phase = largest / largest.abs()
    return u / phase, s, vh * phase.mT


def _krylov(matrix: Tensor, rank: int, block: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return leading triplets by restarted block Krylov iteration, or None where the residual stays too large.

    Source: Musco and Musco, Randomized block Krylov methods, NeurIPS 2015; restarted from its Ritz vectors.
    """
    generator = torch.Generator(matrix.device).manual_seed(0)
    start = torch.randn(matrix.shape[1], block, dtype=matrix.dtype, device=matrix.device, generator=generator)
    depth = max(2, min(_DEPTH, min(matrix.shape) // block))
    for _ in range(_RESTARTS):
        basis: list[Tensor] = []
        images: list[Tensor] = []
        for _ in range(depth):
            fresh = matrix @ (images[-1] if images else start)
            # by reflections over everything so far: orthonormal even where nothing is left but rounding
            fresh = torch.linalg.qr(torch.cat([*basis, fresh], 1)).Q[:, -block:]
            basis.append(fresh)
            images.append(matrix.mH @ fresh)
        v, s, uh = torch.linalg.svd(torch.cat(images, 1), full_matrices=False)
        u = torch.cat(basis, 1) @ uh.mH
        residual = (matrix @ v[:, :rank] - u[:, :rank] * s[:rank]).norm(dim=0).max()
        if residual <= RESIDUAL * s[0]:
            return u[:, :rank], s[:rank], v[:, :rank].mH
        start = v[:, :block]
    return None


def _best_core(goal: Tensor, seen: tuple[int, int], trains: list[Tensor], k: int) -> Tensor:
    """Return the least squares solution for core k: one small problem for each of its slices (i_k, d_k)."""
    (before, lift_left), (after, lift_right) = _frame(_before(trains, k)), _frame(_after(trains, k))
    lift = torch.kron(lift_left, lift_right)
    if lift.shape[1] == 0:
        return torch.zeros_like(trains[k])
    v, p, q, d = trains[k].shape
    axes = (before.shape[0], v, after.shape[0]), (before.shape[1], d, after.shape[1])
    wanted = _projected(goal.reshape(*axes[0], *axes[1]), before, after)
    (row_masks, row_kind), (column_masks, column_kind) = (
        torch.unique(_seen_of_slice(sizes, count, goal.device), dim=0, return_inverse=True)
        for sizes, count in zip(axes, seen, strict=True)
    )
    solution = goal.new_empty(v, d, p * q)
    for i, row_mask in enumerate(row_masks):
        for j, column_mask in enumerate(column_masks):
            rows, columns = row_mask.reshape(axes[0][::2]), column_mask.reshape(axes[1][::2])
            at = torch.nonzero(row_kind == i), torch.nonzero(column_kind == j).T
            solution[at] = _shortest_solution(_gram(before, after, rows, columns), wanted[at], lift)
    return solution.reshape(v, d, p, q).permute(0, 2, 3, 1)


def _frame(product: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis U of the columns of B = U Σ Vᴴ, with B's leading axes, and V Σ⁻¹."""
    u, s, vh = torch.linalg.svd(product.flatten(0, 1), full_matrices=False)
    rank = int((s > torch.finfo(s.dtype).eps * len(u) * s[0]).sum())
    return u[:, :rank].reshape(*product.shape[:2], rank), vh[:rank].mH / s[:rank]


def _seen_of_slice(sizes: tuple[int, int, int], count: int, device: torch.device) -> Tensor:
    """Return for every middle digit which of the other digits give a number below count."""
    return (torch.arange(math.prod(sizes), device=device) < count).reshape(sizes).transpose(0, 1).flatten(1)


def _projected(goal: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return Σ conj(before) E conj(after) for every slice, (v, d, p, q); entries that the table lacks are zero."""
    slabs = [
        torch.einsum("lxp,lxaq->apq", before.conj(), torch.einsum("lrxay,ryq->lxaq", goal[:, i], after.conj()))
        for i in range(goal.shape[1])
    ]
    return torch.stack(slabs).flatten(2)


def _gram(before: Tensor, after: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return Σ_{seen} conj(b_p a_q) b_p' a_q' as a matrix (p q) × (p' q')."""
    p, q = before.shape[-1], after.shape[-1]
    left = torch.einsum("lxp,lxyo->lypo", before.conj(), before[:, :, None] * columns[None, :, :, None])
    right = torch.einsum("ryq,lryo->lyqo", after.conj(), after[None] * rows[:, :, None, None])
    gram = left.reshape(-1, p * p).mT @ right.reshape(-1, q * q)
    return gram.reshape(p, p, q, q).transpose(1, 2).reshape(p * q, p * q)


def _shortest_solution(gram: Tensor, wanted: Tensor, lift: Tensor) -> Tensor:
    """Return the shortest x = K y with G y = b, for every b along the last axis."""
    values, vectors = torch.linalg.eigh(gram)
    determined = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
    inverse = torch.where(determined, 1 / values.where(determined, 1.0), 0.0)
    x = (((wanted @ vectors.conj()) * inverse) @ vectors.mT) @ lift.mT
    free = torch.linalg.qr(lift @ vectors[:, ~determined]).Q
    return x - (x @ free.conj()) @ free.mT


def _before(trains: list[Tensor], k: int) -> Tensor:
    """Return the product of the cores left of k, (ids, features, r_{k−1})."""
    product = trains[0].new_ones(1, 1, 1)
    for core in trains[:k]:
        joined = torch.einsum("lxp,vpqd->lvxdq", product, core)
        product = joined.flatten(0, 1).flatten(1, 2)
    return product


def _after(trains: list[Tensor], k: int) -> Tensor:
    """Return the product of the cores right of k, (ids, features, r_k)."""
    product = trains[0].new_ones(1, 1, 1)
    for core in reversed(trains[k + 1 :]):
        joined = torch.einsum("vpqd,ryq->vrdyp", core, product)
        product = joined.flatten(0, 1).flatten(1, 2)
    return product


def _canonical(trains: list[Tensor]) -> list[Tensor]:
    """Return the same train with singular vectors left of every bond, the last singular values split."""
    trains = _right_orthonormal(trains)
    for k in range(len(trains) - 1):
        v, p, rank, d = trains[k].shape
        u, s, vh = leading_triplets(trains[k].permute(1, 0, 3, 2).reshape(-1, rank), rank)
        last = k == len(trains) - 2
        left, right = (u * s.sqrt(), s.sqrt()[:, None] * vh) if last else (u, s[:, None] * vh)
        trains[k] = left.reshape(p, v, d, rank).permute(1, 0, 3, 2)
        trains[k + 1] = torch.einsum("op,vpqd->voqd", right, trains[k + 1])
    return trains


def _right_orthonormal(trains: list[Tensor]) -> list[Tensor]:
    """Return the same train with every core but the first orthonormal over all but its left rank."""
    trains = list(trains)
    for k in range(len(trains) - 1, 0, -1):
        v, rank, q, d = trains[k].shape
        basis, rest = torch.linalg.qr(trains[k].permute(0, 2, 3, 1).reshape(-1, rank))
        lack = rank - basis.shape[1]
        trains[k] = pad(basis, (0, lack)).reshape(v, q, d, rank).permute(0, 3, 1, 2)
        trains[k - 1] = torch.einsum("vpqd,oq->vpod", trains[k - 1], pad(rest, (0, 0, 0, lack)))
    return trains


def _balanced(cores: list[Tensor]) -> list[Tensor]:
    """Return the cores scaled to one Frobenius norm, the geometric mean of theirs; a zero train stays as it is."""
    norms = [float(core.norm()) for core in cores]
    if len(cores) == 1 or min(norms) == 0.0:
        return cores
    shared = math.exp(math.fsum(map(math.log, norms)) / len(norms))
    return [core * (shared / norm) for core, norm in zip(cores, norms, strict=True)]


def _padded(table: Tensor, full: tuple[int, ...]) -> Tensor:
    return pad(table, (0, full[1] - table.shape[1], 0, full[0] - table.shape[0]))


def _interleaved(table: Tensor, vocab_factors: Sequence[int], feature_factors: Sequence[int]) -> Tensor:
    """Return the table, padded with zeros, as a tensor with axes i_1, d_1, i_2, d_2, …"""
    order = len(vocab_factors)
    padded = _padded(table, (math.prod(vocab_factors), math.prod(feature_factors)))
    pairs = [axis for k in range(order) for axis in (k, order + k)]
    return padded.reshape(*vocab_factors, *feature_factors).permute(pairs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def _narrow(cores: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(core.to(dtype).contiguous() for core in cores)


def check_factors(
    op: str,
    shape: tuple[int, ...],
    vocab_factors: Sequence[int],
    feature_factors: Sequence[int],
    ranks: Sequence[int],
) -> None:
    """Refuse factors that do not match each other or the table, and ranks that exceed their matrices.

    Args:
        op: name used in the error text.
        shape: (V, D).
        vocab_factors: v_1 … v_K.
        feature_factors: d_1 … d_K.
        ranks: r_1 … r_{K−1}.

    Raises:
        ShapeError: the factors do not cover the table.
        ConfigError: any other mismatch.
    """
    order = len(vocab_factors)
    if order == 0 or len(feature_factors) != order or len(ranks) != order - 1:
        raise ConfigError(
            f"{op}: expected K factors of each kind and K − 1 ranks, got {tuple(vocab_factors)}, "
            f"{tuple(feature_factors)} and {tuple(ranks)}."
        )
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in (*vocab_factors, *feature_factors, *ranks)):
        raise ConfigError(
            f"{op}: expected whole numbers for factors and ranks, got {tuple(vocab_factors)}, "
            f"{tuple(feature_factors)} and {tuple(ranks)}."
        )
    if min(*vocab_factors, *feature_factors) < 1:
        raise ConfigError(f"{op}: expected factors ≥ 1, got {tuple(vocab_factors)} and {tuple(feature_factors)}.")
    if math.prod(vocab_factors) < shape[0] or math.prod(feature_factors) < shape[1]:
        raise ShapeError(
            f"{op}: expected factors whose products cover a table {shape}, got {tuple(vocab_factors)} and "
            f"{tuple(feature_factors)}; enlarge one."
        )
    sizes = [v * d for v, d in zip(vocab_factors, feature_factors, strict=True)]
    for k, (left, rank) in enumerate(pairwise((1, *ranks))):
        limit = min(left * sizes[k], math.prod(sizes[k + 1 :]))
        if not 1 <= rank <= limit:
            raise ConfigError(f"{op}: expected rank {k + 1} in 1..{limit}, that of its matrix, got {rank}; change it.")


def _check_table(op: str, table: Tensor) -> None:
    if table.ndim != 2 or 0 in table.shape:
        raise ShapeError(f"{op}: expected a table (V, D) with V, D ≥ 1, got {tuple(table.shape)}.")
    if not (table.is_floating_point() or table.is_complex()) or table.dtype.itemsize < 2:
        raise DomainError(f"{op}: expected a floating-point table of 16 bits or more, got {table.dtype}; convert it.")
    if not bool(torch.isfinite(table).all()):
        bad = int((~torch.isfinite(table)).any(1).nonzero()[0])
        raise DomainError(f"{op}: expected a finite table, found NaN or infinity, first in row {bad}; repair it first.")


def _check_cores(op: str, table: Tensor, cores: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the factors after checking that the cores chain, are finite, and cover the table."""
    if not cores or any(core.ndim != 4 or 0 in core.shape for core in cores):
        raise ShapeError(
            f"{op}: expected cores (v, r, r', d), got {[tuple(core.shape) for core in cores]}; see decompose."
        )
    ends = [1, *(rank for core in cores for rank in core.shape[1:3]), 1]
    if any(a != b for a, b in zip(ends[::2], ends[1::2], strict=True)):
        raise ShapeError(f"{op}: expected ranks that chain from 1 to 1, got {[tuple(c.shape[1:3]) for c in cores]}.")
    vocab_factors, feature_factors = (tuple(core.shape[axis] for core in cores) for axis in (0, 3))
    ranks = tuple(core.shape[2] for core in cores[:-1])
    check_factors(op, tuple(table.shape), vocab_factors, feature_factors, ranks)
    kinds = sorted({str(core.dtype) for core in cores})
    if len(kinds) > 1 or not (cores[0].is_floating_point() or cores[0].is_complex()):
        raise DomainError(f"{op}: expected floating-point cores of one dtype, got {', '.join(kinds)}; convert them.")
    if table.is_complex() and not cores[0].is_complex():
        raise DomainError(f"{op}: a complex table has no fit by real cores, got {kinds[0]}; make the cores complex.")
    if not all(bool(torch.isfinite(core).all()) for core in cores):
        raise DomainError(f"{op}: expected finite cores, found NaN or infinity; start from decompose.")
    return vocab_factors, feature_factors
