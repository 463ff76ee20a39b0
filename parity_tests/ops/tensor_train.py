"""Declarations of the room ``tensor_train``: sums of Kronecker products and loops over entries judge the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Size, Strategy
from parity_tests.ops import tensor_train_inputs as judge
from parity_tests.ops import tensor_train_rejections as refused
from so8t_jax.ops import tensor_train as reference
from so8t_torch.ops import tensor_train as production

TWO = ({"K": 2, "v": 3, "w": 3, "r": 3}, {"K": 2, "v": 5, "w": 4, "r": 4})
WIDE = (*TWO, {"K": 2, "v": 11, "w": 8, "r": 6})
THREE = ({"K": 3, "v": 2, "w": 2, "r": 2}, {"K": 3, "v": 3, "w": 3, "r": 3})
FOUR = ({"K": 4, "v": 1, "w": 1, "r": 1}, {"K": 4, "v": 2, "w": 2, "r": 3})
ONE = ({"K": 1, "v": 5, "w": 4, "r": 1},)
SMALL = ({"K": 2, "v": 1, "w": 1, "r": 1}, {"K": 2, "v": 1, "w": 2, "r": 5})
# 5 · 6 rows cropped to 27 and 4 · 5 columns cropped to 18
RAGGED = ({"K": 2, "v": 5, "w": 4, "r": 2}, {"K": 2, "v": 5, "w": 4, "r": 4})
# 3 · 4 · 5 rows cropped to 53 and 3 · 4 · 3 columns cropped to 29
RAGGED_THREE = ({"K": 3, "v": 3, "w": 3, "r": 3},)
CROP = {"vocab_size": 27, "d_model": 18}
CROP_THREE = {"vocab_size": 53, "d_model": 29}
HALVES = ("float64", "float32", "bfloat16", "float16")
FULL = ("float64", "float32")
DOUBLE = ("float64",)
# The tiled head adds the gradient of a core in one long sum over tokens and tails, the definition in nested short ones:
# in float32 that is 6 eps against 1.5, beyond the second bar. Float32 is judged where the sums are as short.
ROUNDED = ("float64", "bfloat16")

VOCAB, FEATURE = (3, 4), (2, 3)
VOCAB_THREE, FEATURE_THREE = (2, 3, 3), (2, 2, 3)


def scale_of(values: np.ndarray) -> float:
    """Return the largest entry, at least the smallest normal number."""
    return max(float(np.abs(values).max()), float(np.finfo(np.float64).tiny))


def gauge_law(f: Any, example: Example) -> np.ndarray:
    """An orthogonal matrix put between two cores and taken out again changes nothing."""
    ids, left, right, *rest = example
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((left.shape[2],) * 2))[0]
    turned = np.einsum("vpqa,qs->vpsa", left, turn), np.einsum("qs,vqrb->vsrb", turn, right)
    before, after = (np.asarray(f(ids, *pair, *rest)) for pair in ((left, right), turned))
    size = scale_of(left[int(ids) // math.prod(len(core) for core in (right, *rest))])
    return (after - before) / (size * math.prod(scale_of(core) for core in (right, *rest)))


def multilinear_law(f: Any, example: Example) -> np.ndarray:
    """Every core enters once: twice a core is twice the row."""
    ids, *cores = example
    once = np.asarray(f(ids, *cores))
    twice = [np.asarray(f(ids, *cores[:k], 2.0 * core, *cores[k + 1 :])) for k, core in enumerate(cores)]
    return np.stack([row - 2.0 * once for row in twice]) / scale_of(once)


def column_law(f: Any, example: Example) -> np.ndarray:
    """The head is the transpose of the table: a unit vector gives a column of it."""
    hidden, *cores = example
    column = int(np.argmax(np.abs(hidden)))
    unit = np.eye(hidden.size)[column]
    dense = judge.kronecker_table(*cores)[: len(np.asarray(f(unit, *cores)))]
    return (np.asarray(f(unit, *cores)) - dense[:, column]) / scale_of(dense)


def probability_law(f: Any, example: Example) -> np.ndarray:
    """The probabilities exp(−loss) of all rows add up to one."""
    hidden, _, *cores = example
    count = math.prod(len(core) for core in cores)
    losses = np.asarray([float(np.asarray(f(hidden, np.asarray(t), *cores))) for t in range(count)])
    return np.asarray([np.exp(-losses).sum() - 1.0])


def order_law(f: Any, example: Example) -> np.ndarray:
    """The values are the logits of the ids, they fall, and no other row has a larger one."""
    hidden, *cores = example
    values, ids = (np.asarray(x) for x in f(hidden, *cores))
    score = judge.dense_logits(hidden, *cores)
    rising = np.maximum(np.diff(values), 0.0)
    missed = np.maximum(np.delete(score, ids).max(initial=-np.inf) - values.min(), 0.0)
    return np.concatenate([values - score[ids], rising, [missed]]) / max(1.0, scale_of(score))


def tails(dense: np.ndarray, cores: tuple[np.ndarray, ...]) -> list[float]:
    """Return for each bond the sum of the squared singular values beyond its rank."""
    vocab, feature = (tuple(core.shape[axis] for core in cores) for axis in (0, 3))
    tensor = judge.unfolded(dense, vocab, feature)
    found = []
    for k, core in enumerate(cores[:-1], start=1):
        rows = math.prod(tensor.shape[: 2 * k])
        s = np.linalg.svd(tensor.reshape(rows, -1), compute_uv=False)
        found.append(float((s[core.shape[2] :] ** 2).sum()))
    return found


def squared_error(dense: np.ndarray, cores: tuple[np.ndarray, ...], cropped: bool = True) -> float:
    """Return the squared distance of the cores' table from a table, over its entries or over the padded ones too."""
    made = judge.kronecker_table(*cores)
    padded = np.zeros_like(made)
    padded[: dense.shape[0], : dense.shape[1]] = dense
    error = np.abs(made - padded) ** 2
    return float((error[: dense.shape[0], : dense.shape[1]] if cropped else error).sum())


def tail_law(f: Any, example: Example) -> np.ndarray:
    """The squared error is the sum of the squared singular values left out; at most that for more than two cores."""
    (dense,) = example
    cores = tuple(np.asarray(core) for core in f(dense))
    error, left_out = squared_error(dense, cores, cropped=False), tails(dense, cores)
    wrong = abs(error - left_out[0]) if len(left_out) == 1 else max(error - sum(left_out), 0.0)
    return np.asarray([wrong / float((np.abs(dense) ** 2).sum())])


def descent_law(f: Any, example: Example) -> np.ndarray:
    """The error over the entries that exist has not grown, and the core that was fitted last cannot lower it."""
    dense, *start = example
    cores = tuple(np.asarray(core) for core in f(dense, *start))
    before, after = (math.sqrt(squared_error(dense, tuple(found))) for found in (start, cores))
    vocab, feature = (tuple(core.shape[axis] for core in cores) for axis in (0, 3))
    made = judge.kronecker_table(*cores, vocab_size=dense.shape[0], d_model=dense.shape[1])
    wrong = judge.unfolded(made - dense, vocab, feature).reshape(-1, vocab[-1] * feature[-1])
    fronts = [
        judge.unfolded(judge.kronecker_table(*cores[:-2], cores[-2][:, :, [rho]]), vocab[:-1], feature[:-1]).ravel()
        for rho in range(cores[-1].shape[1])
    ]
    slopes = np.stack(fronts) @ wrong / scale_of(np.stack(fronts))
    return np.append(slopes, max(after - before, 0.0)) / float(np.linalg.norm(dense))


# A row adds Π r_k products of K factors. Their signs differ, but the largest entry of a row seldom cancels.
ROWS_BUDGET = Budget(forward=32.0, gradient=64.0)
# A logit adds Π w_k products of a row and h. A loss is a difference of logits and is judged against one nat; the
# gradient of a hidden state is a mean of rows minus a row, whose entries are of order one.
HEAD_BUDGET = Budget(forward=64.0, gradient=64.0)
LOSS_BUDGET = Budget(forward=64.0, gradient=64.0, floor=1.0, gradient_floor=1.0)
# Singular vectors turn by eps times the largest singular value over the gap, here at most a few hundred.
SVD_BUDGET = Budget(forward=4096.0)


def by_kernels(dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Return which backends are judged in which dtypes: kernels accumulate in float32 and refuse float64."""
    narrow = tuple(dtype for dtype in dtypes if dtype != "float64")
    return {"backends": ("tiled", "triton") if narrow else ("tiled",), "backend_dtypes": {"triton": narrow}}


def rows_pair(
    variant: str, sizes: tuple[Size, ...], inputs: Mapping[str, Strategy], *, cores: int = 2, **options: Any
) -> OpPair:
    """Declare ``rows`` for some number of cores."""
    places = tuple(range(1, cores + 1))
    options = {"dtypes": HALVES} | options
    return OpPair(
        name=f"tensor_train.rows{variant}",
        reference=reference.rows,
        production=production.rows,
        oracle=judge.row_of_table,
        inputs=inputs,
        sizes=sizes,
        shared=places,
        wrt=places,
        budget=ROWS_BUDGET,
        **by_kernels(options["dtypes"]),
        **options,
    )


def table_pair(
    variant: str, sizes: tuple[Size, ...], cores: int, complex_valued: bool = False, **options: Any
) -> OpPair:
    """Declare ``table`` for some number of cores."""
    places = tuple(range(cores))
    return OpPair(
        name=f"tensor_train.table{variant}",
        reference=reference.table,
        production=production.table,
        oracle=judge.kronecker_table,
        inputs=judge.table_inputs(complex_valued),
        sizes=sizes,
        shared=places,
        wrt=places,
        budget=ROWS_BUDGET,
        **options,
    )


def logits_pair(
    variant: str, sizes: tuple[Size, ...], inputs: Mapping[str, Strategy], cores: int, **options: Any
) -> OpPair:
    """Declare ``logits`` for some number of cores."""
    places = tuple(range(1, cores + 1))
    return OpPair(
        name=f"tensor_train.logits{variant}",
        reference=reference.logits,
        production=production.logits,
        oracle=judge.dense_logits,
        inputs=inputs,
        sizes=sizes,
        shared=places,
        wrt=(0, *places),
        budget=HEAD_BUDGET,
        **options,
    )


def cross_entropy_pair(
    variant: str, sizes: tuple[Size, ...], inputs: Mapping[str, Strategy], cores: int, **options: Any
) -> OpPair:
    """Declare ``cross_entropy`` for some number of cores."""
    places = tuple(range(2, cores + 2))
    options = {"dtypes": HALVES} | options
    return OpPair(
        name=f"tensor_train.cross_entropy{variant}",
        reference=reference.cross_entropy,
        production=production.cross_entropy,
        oracle=judge.dense_cross_entropy,
        inputs=inputs,
        sizes=sizes,
        shared=places,
        wrt=(0, *places),
        budget=LOSS_BUDGET,
        returns="accumulation",
        **(by_kernels(options["dtypes"]) if cores == 2 else {}),
        **options,
    )


def topk_pair(variant: str, sizes: tuple[Size, ...], inputs: Mapping[str, Strategy], **options: Any) -> OpPair:
    """Declare ``topk`` of two cores."""
    return OpPair(
        name=f"tensor_train.topk{variant}",
        reference=reference.topk,
        production=production.topk,
        oracle=judge.dense_topk,
        inputs=inputs,
        sizes=sizes,
        shared=(1, 2),
        wrt=(0, 1, 2),
        budget=HEAD_BUDGET,
        **options,
    )


def any_target(generator: np.random.Generator, count: int) -> int:
    """Draw a row of the table."""
    return int(generator.integers(count))


def sometimes_ignored(ignored: int) -> Callable[[np.random.Generator, int], int]:
    """Return a draw that gives the ignored target in two cases of five."""
    return lambda generator, count: ignored if generator.random() < 0.4 else any_target(generator, count)


WATCHES_VALUES = "reads its table on the host (finite, converged), which no graph can hold"


def decompose_pair(
    variant: str, vocab: judge.Factors, feature: judge.Factors, ranks: judge.Factors, **options: Any
) -> OpPair:
    """Declare ``decompose`` with its factors, on a whole and on a cropped table."""
    full = {"V": math.prod(vocab), "D": math.prod(feature)}
    return OpPair(
        name=f"tensor_train.decompose{variant}",
        reference=reference.decompose,
        production=production.decompose,
        oracle=judge.svd_by_hand,
        inputs=judge.decompose_inputs(vocab, feature, ranks),
        sizes=({"V": full["V"] - 1, "D": full["D"] - 1}, full),
        shared=(0,),
        keywords={"vocab_factors": vocab, "feature_factors": feature, "ranks": ranks},
        budget=SVD_BUDGET,
        laws=(Law("tail", tail_law, 256.0),),
        known_gaps={"variant-compile": WATCHES_VALUES},
        **options,
    )


def refine_pair(variant: str, size: Size, shape: tuple[int, int] | None, cores: int, **options: Any) -> OpPair:
    """Declare ``refine`` on a whole or on a cropped table."""
    return OpPair(
        name=f"tensor_train.refine{variant}",
        reference=reference.refine,
        production=production.refine,
        oracle=judge.least_squares_by_loops,
        inputs=judge.refine_inputs(*(shape or (None, None))),
        sizes=(size,),
        shared=tuple(range(cores + 1)),
        budget=SVD_BUDGET,
        laws=(Law("descent", descent_law, 256.0),),
        known_gaps={"variant-compile": WATCHES_VALUES},
        **options,
    )


ROWS_LAWS = (Law("gauge", gauge_law, 64.0), Law("multilinear", multilinear_law, 16.0))
HEAD_CROP = {"vocab_size": 27}

PAIRS: tuple[OpPair, ...] = (
    rows_pair("", WIDE, judge.rows_inputs(), laws=ROWS_LAWS, rejections=refused.ROWS, edge_sizes=SMALL),
    rows_pair(":ragged", RAGGED, judge.rows_inputs(27), keywords=CROP, dtypes=FULL),
    rows_pair(":padding", TWO, judge.rows_inputs(padding=3), keywords={"padding_idx": 3}, dtypes=FULL),
    rows_pair(":complex", TWO, judge.rows_inputs(complex_valued=True), dtypes=FULL),
    rows_pair(":one_core", ONE, judge.rows_inputs(), cores=1, dtypes=DOUBLE),
    rows_pair(":three_cores", THREE, judge.rows_inputs(), cores=3, laws=ROWS_LAWS),
    rows_pair(
        ":three_cores_ragged",
        RAGGED_THREE,
        judge.rows_inputs(53, -1),
        cores=3,
        keywords=CROP_THREE | {"padding_idx": -1},
        dtypes=FULL,
    ),
    rows_pair(":four_cores", FOUR, judge.rows_inputs(), cores=4, dtypes=DOUBLE),
    table_pair("", TWO, 2, rejections=refused.TABLE, edge_sizes=SMALL),
    table_pair(":ragged", RAGGED, 2, keywords=CROP, dtypes=FULL),
    table_pair(":three_cores", RAGGED_THREE, 3, keywords=CROP_THREE, dtypes=DOUBLE),
    table_pair(":complex", TWO[:1], 2, complex_valued=True, dtypes=FULL),
    logits_pair(
        "",
        TWO,
        judge.head_inputs(),
        2,
        laws=(Law("column", column_law, 16.0),),
        rejections=refused.HEAD,
        edge_sizes=SMALL,
    ),
    logits_pair(":ragged", RAGGED, judge.head_inputs(18), 2, keywords=HEAD_CROP, dtypes=ROUNDED),
    logits_pair(":three_cores", THREE, judge.head_inputs(), 3, dtypes=ROUNDED),
    logits_pair(":four_cores", FOUR, judge.head_inputs(), 4, dtypes=DOUBLE),
    cross_entropy_pair(
        "",
        TWO,
        judge.head_inputs(targets=any_target),
        2,
        laws=(Law("probability", probability_law, 64.0),),
        rejections=refused.CROSS_ENTROPY,
        edge_sizes=SMALL,
    ),
    cross_entropy_pair(
        ":ragged",
        RAGGED,
        judge.head_inputs(18, sometimes_ignored(0), 27),
        2,
        keywords=HEAD_CROP | {"ignore_index": 0},
        dtypes=ROUNDED,
    ),
    cross_entropy_pair(":three_cores", THREE, judge.head_inputs(targets=sometimes_ignored(-100)), 3, dtypes=ROUNDED),
    topk_pair(
        "",
        TWO,
        judge.head_inputs(),
        keywords={"k": 4},
        laws=(Law("order", order_law, 64.0),),
        rejections=refused.TOPK,
        dtypes=FULL,
    ),
    topk_pair(":ragged", RAGGED, judge.head_inputs(18), keywords={"k": 27, **HEAD_CROP}, dtypes=DOUBLE),
    topk_pair(":ties", TWO, {"whole_numbers": judge.whole_numbers}, keywords={"k": 6}, finite_differences=False),
    decompose_pair("", VOCAB, FEATURE, (3,), rejections=refused.DECOMPOSE),
    decompose_pair(":three_cores", VOCAB_THREE, FEATURE_THREE, (3, 2), dtypes=FULL),
    refine_pair("", TWO[0], (11, 11), 2, rejections=refused.REFINE),
    refine_pair(":whole", TWO[0], None, 2, dtypes=FULL),
    refine_pair(":three_cores", THREE[0], (23, 11), 3, keywords={"sweeps": 2}, dtypes=FULL),
)
