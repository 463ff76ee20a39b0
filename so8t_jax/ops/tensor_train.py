"""A table of vectors kept as a train of cores: its rows, the tied head, the cross-entropy, and how to decompose one.

    E[i, d] = Σ_ρ Π_k C_k[i_k, ρ_{k−1}, ρ_k, d_k]      i = (i_1 v_2 + i_2) v_3 + …      d = (d_1 w_2 + d_2) w_3 + …
    logits(h) = E h      loss(h, t) = log Σ_{i<V} exp(logits_i) − logits_t

Symbols: core C_k has shape (v_k, r_{k−1}, r_k, w_k) with r_0 = r_K = 1; v_k are the vocabulary factors, w_k the feature
factors, r_k the ranks; the digits i_k and d_k are row-major. The table has V ≤ Π v_k rows and D ≤ Π w_k columns: what
lies beyond is cropped, never wrapped. For two cores E, read as a (v_1 w_1) × (v_2 w_2) matrix, has rank r_1.
Cost of a row: Σ_k r_{k−1} r_k Π_{j≤k} w_j products. Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int

__all__ = ["cross_entropy", "decompose", "logits", "refine", "rows", "table", "topk"]


def rows(
    ids: Int[Array, ""],
    *cores: Inexact[Array, "_ _ _ _"],
    vocab_size: int | None = None,
    d_model: int | None = None,
    padding_idx: int | None = None,
) -> Inexact[Array, " d"]:
    """Return one row of the table.

    Args:
        ids: number of the row, in [0, vocab_size) or padding_idx.
        *cores: C_k of shape (v_k, r_{k−1}, r_k, w_k), real or complex; computed in float32, or float64 for float64.
        vocab_size: V, number of rows; Π v_k by default.
        d_model: D, width of a row; Π w_k by default.
        padding_idx: the id whose row is zero and sends no gradient; it may lie outside the table.

    Returns:
        E[i, :D] in the dtype of the cores; NaN for an id outside the table (production refuses it).

    Raises:
        ValueError: the cores do not chain, or the table that is asked for does not fit into them.
    """
    size, width = _table_shape(cores, vocab_size, d_model)
    padding = jnp.asarray(False) if padding_idx is None else ids == padding_idx
    inside = (ids >= 0) & (ids < size)
    digits = jnp.unravel_index(jnp.where(inside, ids, 0), tuple(core.shape[0] for core in cores))

    def chosen(core: Array, digit: Array) -> Array:
        return jnp.where(padding, 0.0, jnp.where(inside, core[digit], jnp.nan))

    row = functools.reduce(_join, map(chosen, _wide(*cores), digits))
    return row.reshape(-1)[:width].astype(np.result_type(*(core.dtype for core in cores)))


def table(
    *cores: Inexact[Array, "_ _ _ _"], vocab_size: int | None = None, d_model: int | None = None
) -> Inexact[Array, "v d"]:
    """Return the whole table E.

    Args:
        *cores: as in ``rows``.
        vocab_size: V; Π v_k by default.
        d_model: D; Π w_k by default.

    Raises:
        ValueError: as in ``rows``.
    """
    size, width = _table_shape(cores, vocab_size, d_model)
    return jax.vmap(lambda i: rows(i, *cores, vocab_size=size, d_model=width))(jnp.arange(size))


def logits(
    hidden: Float[Array, " d"], *cores: Float[Array, "_ _ _ _"], vocab_size: int | None = None
) -> Float[Array, " v"]:
    """Return E h: the transpose of the embedding, applied to a hidden state.

    Args:
        hidden: h, whose width D ≤ Π w_k is that of the table.
        *cores: as in ``rows``, real.
        vocab_size: V; Π v_k by default.

    Returns:
        One number for each row of the table, in the dtype of h.

    Raises:
        ValueError: as in ``rows``; or something is complex: a head has no unique complex meaning.
    """
    return _wide_logits(hidden, cores, vocab_size).astype(hidden.dtype)


def cross_entropy(
    hidden: Float[Array, " d"],
    targets: Int[Array, ""],
    *cores: Float[Array, "_ _ _ _"],
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Float[Array, ""]:
    """Return −log softmax(E h)_t over the V rows of the table.

    Args:
        hidden: h, whose width D ≤ Π w_k is that of the table.
        targets: t in [0, vocab_size), or ignore_index.
        *cores: as in ``rows``, real.
        vocab_size: V; Π v_k by default.
        ignore_index: the target whose loss is 0 and which sends no gradient.

    Returns:
        The loss in float32 (float64 for float64); NaN for a target outside the table (production refuses it).

    Raises:
        ValueError: as in ``logits``.
    """
    ignored = targets == ignore_index
    score = _wide_logits(jnp.where(ignored, 0.0, hidden), cores, vocab_size)
    loss = jax.nn.logsumexp(score) - jnp.take(score, targets, mode="fill", fill_value=jnp.nan)
    return jnp.where(ignored, 0.0, jnp.where(targets >= 0, loss, jnp.nan))


def topk(
    hidden: Float[Array, " d"], *cores: Float[Array, "_ _ _ _"], k: int, vocab_size: int | None = None
) -> tuple[Float[Array, " k"], Int[Array, " k"]]:
    """Return the k largest logits and their ids, largest first; of equal ones the lower id comes first.

    Args:
        hidden: h, whose width D ≤ Π w_k is that of the table.
        *cores: as in ``rows``, real.
        k: how many, 1 ≤ k ≤ V.
        vocab_size: V; Π v_k by default.

    Returns:
        The logits in the dtype of h, and their ids; chosen in float32 (float64 for float64), before any rounding.

    Raises:
        ValueError: as in ``logits``.
    """
    values, ids = jax.lax.top_k(_wide_logits(hidden, cores, vocab_size), k)
    return values.astype(hidden.dtype), ids.astype(int)


def decompose(
    table: Inexact[Array, "v d"],
    *,
    vocab_factors: tuple[int, ...],
    feature_factors: tuple[int, ...],
    ranks: tuple[int, ...],
) -> tuple[Inexact[Array, "_ _ _ _"], ...]:
    """Return cores of given ranks that approximate a table: the singular value decomposition of one bond after another.

    Rows and columns that the factors add are zero. All cores but the last are left singular vectors; the last bond is
    split as U√S and √S Vᴴ, then every core is scaled to one Frobenius norm (two cores have it already). The phase of a
    singular pair is free and therefore fixed: the largest entry of the left vector, the first of equal ones, is
    positive.

    Args:
        table: E, (V, D), finite.
        vocab_factors: v_1 … v_K, whose product is at least V.
        feature_factors: w_1 … w_K, whose product is at least D.
        ranks: r_1 … r_{K−1}; r_k ≤ min(r_{k−1} v_k w_k, Π_{j>k} v_j w_j).

    Returns:
        K cores. For two of them the squared error is the sum of the squared singular values left out, the least
        possible; for more it is at most the sum over all bonds.

    Raises:
        ValueError: the factors do not match each other or the table, or a rank exceeds its matrix.

    Source: Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 33 (2011).
    """
    _check_factors(table.shape, vocab_factors, feature_factors, ranks)
    (wide,) = _wide(table)
    cores, s, vh = [], jnp.ones(1, wide.dtype), _digits_of(wide, vocab_factors, feature_factors).reshape(1, -1)
    for v, w, rank in zip(vocab_factors, feature_factors, ranks, strict=False):
        left = len(s)
        u, s, vh = _svd((s[:, None] * vh).reshape(left * v * w, -1), rank)
        cores.append(u.reshape(left, v, w, rank).transpose(1, 0, 3, 2))
    cores[-1:] = [core * jnp.sqrt(s)[None, None, :, None] for core in cores[-1:]]
    last = jnp.sqrt(s)[:, None] * vh
    cores.append(last.reshape(len(s), vocab_factors[-1], feature_factors[-1], 1).transpose(1, 0, 3, 2))
    return tuple(core.astype(table.dtype) for core in _balanced(cores))


def refine(
    table: Inexact[Array, "v d"], *cores: Inexact[Array, "_ _ _ _"], sweeps: int = 1
) -> tuple[Inexact[Array, "_ _ _ _"], ...]:
    """Return cores that fit a table no worse: alternating least squares over the entries that the table has.

    Rows from V on and columns from D on carry no weight, which the decomposition of a table padded with zeros cannot
    express. A sweep goes from the first core to the last; each becomes the least squares solution for the others held
    fixed, the shortest one where there are several.

    Args:
        table: E, (V, D), finite; V ≤ Π v_k, D ≤ Π w_k.
        *cores: the start, as in ``rows``.
        sweeps: how often every core is renewed, at least 0.

    Returns:
        As many cores, of the same shapes, in the form that ``decompose`` gives.

    Raises:
        ValueError: as in ``rows``, or a rank exceeds its matrix.
    """
    _table_shape(cores, *table.shape)
    vocab_factors, feature_factors = (tuple(core.shape[axis] for core in cores) for axis in (0, 3))
    wide, *fitted = _wide(table, *cores)
    goal, seen = (_digits_of(x, vocab_factors, feature_factors) for x in (wide, jnp.ones_like(wide)))
    for k in list(range(len(cores))) * sweeps:
        fitted[k] = _best_core(goal, seen, fitted, k)
    ranks = tuple(core.shape[2] for core in cores[:-1])
    found = decompose(_product(*fitted), vocab_factors=vocab_factors, feature_factors=feature_factors, ranks=ranks)
    return tuple(new.astype(core.dtype) for new, core in zip(found, cores, strict=True))


def _best_core(goal: Array, seen: Array, cores: list[Array], k: int) -> Array:
    """Return the least squares solution for core k: one small problem for each of its slices (i_k, d_k)."""
    v, p, q, w = cores[k].shape
    before = after = jnp.ones((1, 1), goal.dtype)
    for core in cores[:k]:
        before = jnp.einsum("xp,jpq->xjq", before, _letters(core)).reshape(-1, core.shape[2])
    for core in reversed(cores[k + 1 :]):
        after = jnp.einsum("jpq,yq->jyp", _letters(core), after).reshape(-1, core.shape[1])
    design = jnp.einsum("xp,yq->xypq", before, after).reshape(-1, p * q)

    def slices(tensor: Array) -> Array:
        return tensor.reshape(len(before), v * w, len(after)).transpose(1, 0, 2).reshape(v * w, -1)

    def solve(weight: Array, wanted: Array) -> Array:
        return jnp.linalg.lstsq(design * weight[:, None], wanted * weight)[0]

    return jax.vmap(solve)(slices(seen), slices(goal)).reshape(v, w, p, q).transpose(0, 2, 3, 1)


def _digits_of(
    matrix: Inexact[Array, "v d"], vocab_factors: tuple[int, ...], feature_factors: tuple[int, ...]
) -> Inexact[Array, ...]:
    """Return the matrix, padded with zeros, as a tensor with axes i_1, d_1, i_2, d_2, …"""
    order, full = len(vocab_factors), (math.prod(vocab_factors), math.prod(feature_factors))
    padded = jnp.zeros(full, matrix.dtype).at[: matrix.shape[0], : matrix.shape[1]].set(matrix)
    pairs = [axis for k in range(order) for axis in (k, order + k)]
    return padded.reshape(*vocab_factors, *feature_factors).transpose(pairs)


def _svd(matrix: Inexact[Array, "m n"], rank: int) -> tuple[Array, Array, Array]:
    """Return the leading singular triplets; the largest entry of each left vector is positive."""
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=0)[None], axis=0)[0]
    phase = largest / jnp.abs(largest).astype(largest.dtype)
    return u / phase[None], s.astype(u.dtype), vh * phase[:, None]


def _balanced(cores: list[Array]) -> list[Array]:
    """Return the cores scaled to one Frobenius norm, the geometric mean of theirs."""
    norms = jnp.stack([jnp.linalg.norm(core) for core in cores])
    shared = jnp.exp(jnp.mean(jnp.log(norms)))
    factors = jnp.where(shared > 0, shared / norms, 1.0).astype(cores[0].dtype)
    return [core * factor for core, factor in zip(cores, factors, strict=True)]


def _join(left: Inexact[Array, "p q a"], right: Inexact[Array, "q r b"]) -> Inexact[Array, "p r ab"]:
    """Return the sum over the rank that two neighbouring slices share; their features become one row-major axis."""
    joined = jnp.einsum("pqa,qrb->prab", left, right, precision="highest")
    return joined.reshape(left.shape[0], right.shape[1], -1)


def _letters(core: Inexact[Array, "v p q w"]) -> Inexact[Array, "vw p q"]:
    """Return the slices of a core, one for each of its letters (i_k, d_k)."""
    return core.transpose(0, 3, 1, 2).reshape(-1, *core.shape[1:3])


def _product(*cores: Inexact[Array, "_ _ _ _"]) -> Inexact[Array, "v d"]:
    """Return the table that the cores hold, nothing cropped."""
    return table(*cores)


def _wide_logits(hidden: Array, cores: tuple[Array, ...], vocab_size: int | None) -> Array:
    """Return E h in the dtype of accumulation."""
    if any(jnp.iscomplexobj(array) for array in (hidden, *cores)):
        raise ValueError("expected a real hidden state and real cores: a head has no unique complex meaning")
    h, *wide = _wide(hidden, *cores)
    return jnp.matmul(table(*wide, vocab_size=vocab_size, d_model=len(h)), h, precision="highest")


def _table_shape(
    cores: tuple[Inexact[Array, "_ _ _ _"], ...], vocab_size: int | None, d_model: int | None
) -> tuple[int, int]:
    """Return (V, D) after checking that the cores chain and hold as much."""
    if not cores:
        raise ValueError("expected at least one core, got none")
    ranks = [core.shape[1:3] for core in cores]
    chained = all(left[1] == right[0] for left, right in pairwise(ranks))
    if not chained or ranks[0][0] != 1 or ranks[-1][1] != 1:
        raise ValueError(f"expected cores (v, r, r', d) whose ranks chain from 1 to 1, got ranks {ranks}")
    full = tuple(math.prod(core.shape[axis] for core in cores) for axis in (0, 3))
    size, width = full[0] if vocab_size is None else vocab_size, full[1] if d_model is None else d_model
    if not 0 < size <= full[0] or not 0 < width <= full[1]:
        raise ValueError(f"expected vocab_size in 1..{full[0]} and d_model in 1..{full[1]}, got {size} and {width}")
    return size, width


def _check_factors(
    shape: tuple[int, ...], vocab_factors: tuple[int, ...], feature_factors: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    """Refuse factors that do not match each other or the table, and ranks that exceed their matrices."""
    order = len(vocab_factors)
    if order == 0 or len(feature_factors) != order or len(ranks) != order - 1:
        got = f"{vocab_factors}, {feature_factors} and {ranks}"
        raise ValueError(f"expected K factors of each kind and K − 1 ranks, got {got}")
    if math.prod(vocab_factors) < shape[0] or math.prod(feature_factors) < shape[1]:
        got = f"{vocab_factors} and {feature_factors}"
        raise ValueError(f"expected factors whose products cover a table {shape}, got {got}")
    sizes = [v * w for v, w in zip(vocab_factors, feature_factors, strict=True)]
    for k, (left, rank) in enumerate(zip((1, *ranks), ranks, strict=False)):
        limit = min(left * sizes[k], math.prod(sizes[k + 1 :]))
        if not 0 < rank <= limit:
            raise ValueError(f"expected rank {k + 1} in 1..{limit}, that of its matrix, got {rank}")


def _wide(*arrays: Inexact[Array, ...]) -> tuple[Inexact[Array, ...], ...]:
    """Return the arrays in their dtype of accumulation: float32 for half dtypes, complex if one of them is."""
    dtype = np.result_type(np.float32, *(array.dtype for array in arrays))
    return tuple(array.astype(dtype) for array in arrays)
