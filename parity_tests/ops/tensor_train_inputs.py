"""What judges tensor trains, and what they are judged on: sums of Kronecker products, loops, and drawn examples."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.special

from parity_tests.harness.pair import Example, Size, Strategy

Factors = tuple[int, ...]


def factors(size: Size) -> tuple[Factors, Factors, Factors]:
    """Return (v_1 … v_K), (w_1 … w_K) and (r_0 … r_K) of a size: no two neighbours are equal, so that swaps show."""
    steps = range(size["K"])
    inner = tuple(size["r"] + k for k in steps[:-1])
    return tuple(size["v"] + k for k in steps), tuple(size["w"] + k % 2 for k in steps), (1, *inner, 1)


def drawn_cores(generator: np.random.Generator, size: Size, complex_valued: bool = False) -> tuple[np.ndarray, ...]:
    """Draw cores whose table has entries of order one."""
    found = []
    for v, w, left, right in zip(*factors(size)[:2], *neighbours(factors(size)[2]), strict=True):
        core = generator.standard_normal((v, left, right, w))
        if complex_valued:
            core = (core + 1j * generator.standard_normal(core.shape)) / math.sqrt(2.0)
        found.append(core / math.sqrt(right))
    return tuple(found)


def neighbours(ranks: Factors) -> tuple[Factors, Factors]:
    """Return the ranks left and the ranks right of every core."""
    return ranks[:-1], ranks[1:]


def kronecker_table(*cores: np.ndarray, vocab_size: int | None = None, d_model: int | None = None) -> np.ndarray:
    """Return Σ_ρ C_1[:, 1, ρ_1, :] ⊗ C_2[:, ρ_1, ρ_2, :] ⊗ …, one path of ranks at a time."""
    total = np.zeros([math.prod(core.shape[axis] for core in cores) for axis in (0, 3)], np.result_type(*cores))
    for path in itertools.product(*(range(core.shape[2]) for core in cores)):
        slices = [core[:, p, q, :] for core, p, q in zip(cores, (0, *path), path, strict=False)]
        total += functools.reduce(np.kron, slices)
    return total[:vocab_size, :d_model]


def row_of_table(ids: np.ndarray, *cores: np.ndarray, padding_idx: int | None = None, **shape: Any) -> np.ndarray:
    """Return one row of the sum of Kronecker products; zero for the padding id."""
    dense = kronecker_table(*cores, **shape)
    return np.zeros_like(dense[0]) if int(ids) == padding_idx else dense[int(ids)]


def dense_logits(hidden: np.ndarray, *cores: np.ndarray, vocab_size: int | None = None) -> np.ndarray:
    """Return the scalar product with every row, one row at a time."""
    dense = kronecker_table(*cores, vocab_size=vocab_size, d_model=hidden.size)
    return np.asarray([math.fsum(row * hidden) for row in dense])


def dense_cross_entropy(
    hidden: np.ndarray,
    targets: np.ndarray,
    *cores: np.ndarray,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> np.ndarray:
    """Return scipy's logarithm of the softmax at the target, negated; 0 where it is ignored."""
    if int(targets) == ignore_index:
        return np.zeros(())
    return np.asarray(-scipy.special.log_softmax(dense_logits(hidden, *cores, vocab_size=vocab_size))[int(targets)])


def dense_topk(
    hidden: np.ndarray, *cores: np.ndarray, k: int, vocab_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first k of all ids sorted by falling logit, then by id."""
    score = dense_logits(hidden, *cores, vocab_size=vocab_size)
    ids = sorted(range(score.size), key=lambda i: (-score[i], i))[:k]
    return score[ids], np.asarray(ids, np.int64)


def digits(number: int, sizes: Factors) -> Factors:
    """Return the row-major digits of a number, the last one found first."""
    found = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.append(digit)
    return tuple(reversed(found))


def letters(shape: tuple[int, ...], vocab: Factors, feature: Factors) -> Iterator[tuple[int, int, Factors]]:
    """Yield every entry (i, d) of a table with its place (i_1, d_1, i_2, d_2, …)."""
    for i, d in itertools.product(range(shape[0]), range(shape[1])):
        yield i, d, tuple(itertools.chain(*zip(digits(i, vocab), digits(d, feature), strict=True)))


def unfolded(dense: np.ndarray, vocab: Factors, feature: Factors) -> np.ndarray:
    """Return the table as a tensor with axes i_1, d_1, i_2, d_2, …, entry by entry; what it lacks is zero."""
    tensor = np.zeros(tuple(itertools.chain(*zip(vocab, feature, strict=True))), dense.dtype)
    for i, d, place in letters(dense.shape, vocab, feature):
        tensor[place] = dense[i, d]
    return tensor


def svd_by_hand(
    dense: np.ndarray, *, vocab_factors: Factors, feature_factors: Factors, ranks: Factors
) -> tuple[np.ndarray, ...]:
    """Return the cores by numpy's decomposition of one bond after another."""
    rest, found, left = unfolded(dense, vocab_factors, feature_factors), [], 1
    for k, rank in enumerate(ranks):
        v, w = vocab_factors[k], feature_factors[k]
        u, s, vh = np.linalg.svd(rest.reshape(left * v * w, -1), full_matrices=False)
        for column in range(rank):
            largest = max(u[:, column], key=abs)
            u[:, column] *= abs(largest) / largest
            vh[column] *= largest / abs(largest)
        split = np.sqrt(s[:rank]) if k == len(ranks) - 1 else np.ones(rank)
        found.append(np.moveaxis((u[:, :rank] * split).reshape(left, v, w, rank), (1, 3), (0, 2)))
        rest, left = vh[:rank] * (s[:rank] / split)[:, None], rank
    last = rest.reshape(left, vocab_factors[-1], feature_factors[-1])
    found.append(np.moveaxis(last, 1, 0)[:, :, None, :])
    norms = [float(np.linalg.norm(core)) for core in found]
    return tuple(
        core * (math.prod(norms) ** (1.0 / len(norms)) / norm) for core, norm in zip(found, norms, strict=True)
    )


def least_squares_by_loops(dense: np.ndarray, *cores: np.ndarray, sweeps: int = 1) -> tuple[np.ndarray, ...]:
    """Return the cores after alternating least squares, one equation for each entry that the table has."""
    vocab, feature = (tuple(core.shape[axis] for core in cores) for axis in (0, 3))
    fitted = [np.array(core) for core in cores]
    for k in list(range(len(cores))) * sweeps:
        equations: dict[tuple[int, int], list[tuple[np.ndarray, Any]]] = {}
        for i, d, place in letters(dense.shape, vocab, feature):
            chosen = [core[a, :, :, b] for core, a, b in zip(fitted, place[::2], place[1::2], strict=True)]
            before = functools.reduce(np.matmul, chosen[:k], np.ones((1, 1)))
            after = functools.reduce(np.matmul, chosen[k + 1 :], np.eye(fitted[k].shape[2]))
            slot = (place[2 * k], place[2 * k + 1])
            equations.setdefault(slot, []).append((np.outer(before[0], after[:, 0]).ravel(), dense[i, d]))
        fitted[k] = np.zeros_like(fitted[k])
        for (a, b), rows in equations.items():
            found = np.linalg.lstsq(np.asarray([row for row, _ in rows]), np.asarray([goal for _, goal in rows]))[0]
            fitted[k][a, :, :, b] = found.reshape(fitted[k].shape[1:3])
    ranks = tuple(core.shape[2] for core in cores[:-1])
    return svd_by_hand(kronecker_table(*fitted), vocab_factors=vocab, feature_factors=feature, ranks=ranks)


def rows_inputs(
    vocab_size: int | None = None, padding: int | None = None, complex_valued: bool = False
) -> dict[str, Strategy]:
    """Return strategies for ``rows``: any ids, few ids, ids of 32 bits, slices of very unlike size."""

    def example(
        generator: np.random.Generator, size: Size, pick: Callable[[int], Any], uneven: bool = False
    ) -> Example:
        cores = drawn_cores(generator, size, complex_valued)
        count = vocab_size or math.prod(factors(size)[0])
        if uneven:
            cores = (cores[0] * 2.0 ** generator.integers(-6, 7, (len(cores[0]), 1, 1, 1)), *cores[1:])
        ids = padding if padding is not None and generator.random() < 0.4 else pick(count)
        return np.asarray(ids), *cores

    def generic(generator: np.random.Generator, size: Size) -> Example:
        return example(generator, size, lambda count: generator.integers(count))

    def repeated(generator: np.random.Generator, size: Size) -> Example:
        return example(generator, size, lambda count: generator.choice([0, count - 1]))

    def narrow(generator: np.random.Generator, size: Size) -> Example:
        ids, *cores = generic(generator, size)
        return ids.astype(np.int32), *cores

    def uneven(generator: np.random.Generator, size: Size) -> Example:
        return example(generator, size, lambda count: generator.integers(count), uneven=True)

    return {"generic": generic, "repeated": repeated, "narrow_ids": narrow, "uneven": uneven}


def table_inputs(complex_valued: bool = False) -> dict[str, Strategy]:
    """Return the strategy of ``table``: cores alone."""
    return {"generic": lambda generator, size: drawn_cores(generator, size, complex_valued)}


def head_inputs(
    d_model: int | None = None,
    targets: Callable[[np.random.Generator, int], int] | None = None,
    vocab: int | None = None,
) -> dict[str, Strategy]:
    """Return strategies for the head: logits of order one, and of order six, where one row takes most."""

    def example(generator: np.random.Generator, size: Size, scale: float) -> Example:
        cores = drawn_cores(generator, size)
        v, w, _ = factors(size)
        width = d_model or math.prod(w)
        hidden = generator.standard_normal(width) * scale / math.sqrt(width)
        if targets is None:
            return hidden, *cores
        return hidden, np.asarray(targets(generator, vocab or math.prod(v))), *cores

    return {
        "generic": lambda generator, size: example(generator, size, 1.0),
        "peaked": lambda generator, size: example(generator, size, 6.0),
    }


def whole_numbers(generator: np.random.Generator, size: Size) -> Example:
    """Draw small whole numbers: logits are exact in every dtype, and many are equal."""
    v, w, ranks = factors(size)
    shapes = zip(v, *neighbours(ranks), w, strict=True)
    cores = [generator.integers(-1, 2, shape).astype(float) for shape in shapes]
    return generator.integers(-2, 3, math.prod(w)).astype(float), *cores


def falling(generator: np.random.Generator, shape: tuple[int, int], vocab: Factors, feature: Factors) -> np.ndarray:
    """Draw a matrix U S Vᵀ of the first bond with S = 1, 1/2, 1/4, …, as a table cropped to ``shape``."""
    m = vocab[0] * feature[0]
    n = math.prod(vocab[1:]) * math.prod(feature[1:])
    u, v = (np.linalg.qr(generator.standard_normal((side, min(m, n))))[0] for side in (m, n))
    tensor = ((u * 2.0 ** -np.arange(min(m, n))) @ v.T).reshape(
        tuple(itertools.chain(*zip(vocab, feature, strict=True)))
    )
    found = np.zeros((math.prod(vocab), math.prod(feature)))
    for i, d, place in letters(found.shape, vocab, feature):
        found[i, d] = tensor[place]
    return found[: shape[0], : shape[1]]


def decompose_inputs(vocab: Factors, feature: Factors, ranks: Factors) -> dict[str, Strategy]:
    """Return strategies for ``decompose``: falling singular values, and tables of just these ranks, then cropped."""

    def generic(generator: np.random.Generator, size: Size) -> Example:
        return (falling(generator, (size["V"], size["D"]), vocab, feature),)

    def drawn(generator: np.random.Generator, size: Size) -> Example:
        shapes = zip(vocab, *neighbours((1, *ranks, 1)), feature, strict=True)
        full = kronecker_table(*(generator.standard_normal(shape) for shape in shapes))
        return (full[: size["V"], : size["D"]],)

    return {"generic": generic, "low_rank": drawn}


def refine_inputs(vocab: int | None, width: int | None) -> dict[str, Strategy]:
    """Return strategies for ``refine``: a drawn table and a start near it, cropped where sizes are given."""

    def example(generator: np.random.Generator, size: Size, noise: float) -> Example:
        truth = kronecker_table(*drawn_cores(generator, size))[:vocab, :width]
        dense = truth + noise * generator.standard_normal(truth.shape)
        v, w, ranks = factors(size)
        return dense, *svd_by_hand(dense, vocab_factors=v, feature_factors=w, ranks=ranks[1:-1])

    return {
        "generic": lambda generator, size: example(generator, size, 0.3),
        "exact": lambda generator, size: example(generator, size, 0.0),
    }
