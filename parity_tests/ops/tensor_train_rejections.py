"""Calls that production of the room ``tensor_train`` must refuse, and the errors that it must raise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from parity_tests.harness.pair import Rejection
from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError


def two_cores(*ranks: int, v: tuple[int, int] = (3, 4), w: tuple[int, int] = (2, 3)) -> tuple[torch.Tensor, ...]:
    """Return cores of ones with the given ranks (left, right) of both."""
    return torch.ones(v[0], ranks[0], ranks[1], w[0]), torch.ones(v[1], ranks[2], ranks[3], w[1])


SOUND = (1, 2, 2, 1)
CHAIN_CALLS: dict[str, tuple[tuple[torch.Tensor, ...], str]] = {
    "broken_chain": (two_cores(1, 2, 3, 1), "chain"),
    "first_rank": (two_cores(2, 2, 2, 1), "chain"),
    "last_rank": (two_cores(1, 2, 2, 2), "chain"),
    "three_axes": ((torch.ones(3, 2, 2), torch.ones(4, 2, 1, 3)), r"\(v_k, "),
}


def chain_rejections(*leading: torch.Tensor, **keywords: Any) -> tuple[Rejection, ...]:
    """Return the calls with cores that do not chain, after the given leading arguments."""
    return tuple(
        Rejection(name, lambda cores=cores: (*leading, *cores), ShapeError, text, keywords)  # type: ignore[misc]
        for name, (cores, text) in CHAIN_CALLS.items()
    )


def rows_call(*ids: float, dtype: torch.dtype = torch.int64) -> Callable[[], tuple[Any, ...]]:
    """Return a call of ``rows`` with 12 rows of width 6."""
    return lambda: (torch.tensor(ids, dtype=dtype), *two_cores(*SOUND))


def head_call(width: int = 6, *targets: float, dtype: torch.dtype = torch.int64) -> Callable[[], tuple[Any, ...]]:
    """Return a call of the head with 12 rows, and with targets if there are any."""
    hidden = torch.ones(len(targets) or 1, width)
    between = (torch.tensor(targets, dtype=dtype),) if targets else ()
    return lambda: (hidden, *between, *two_cores(*SOUND))


def complex_head(*between: torch.Tensor) -> Callable[[], tuple[Any, ...]]:
    """Return a call of the head with complex cores."""
    return lambda: (torch.ones(1, 6), *between, *(core.to(torch.complex64) for core in two_cores(*SOUND)))


ROWS = (
    Rejection("too_large", rows_call(0, 12), DomainError, "12"),
    Rejection("beyond_vocabulary", rows_call(0, 11), DomainError, "11", {"vocab_size": 11}),
    Rejection("negative", rows_call(-1, 3), DomainError, "-1"),
    Rejection("negative_beside_padding", rows_call(-1, -2), DomainError, "-2", {"padding_idx": -1}),
    Rejection("floating_ids", rows_call(0, 1, dtype=torch.float32), DomainError, "float32"),
    Rejection("wide", rows_call(0), ShapeError, "d_model", {"d_model": 7}),
    Rejection("long", rows_call(0), ShapeError, "vocab_size", {"vocab_size": 13}),
    Rejection("backend", rows_call(0), BackendError, "unknown backend", {"backend": "fast"}),
    Rejection("no_cores", lambda: (torch.tensor([0]),), ShapeError, "core"),
    *chain_rejections(torch.tensor([0])),
)
TABLE = (
    Rejection("wide", lambda: two_cores(*SOUND), ShapeError, "d_model", {"d_model": 7}),
    Rejection("long", lambda: two_cores(*SOUND), ShapeError, "vocab_size", {"vocab_size": 13}),
    *chain_rejections(),
)
HEAD = (
    Rejection("too_wide", head_call(7), ShapeError, "7"),
    Rejection("long", head_call(), ShapeError, "vocab_size", {"vocab_size": 13}),
    Rejection("complex", complex_head(), DomainError, "complex"),
    *chain_rejections(torch.ones(1, 6)),
)
CROSS_ENTROPY = (
    Rejection("too_wide", head_call(7, 0), ShapeError, "7"),
    Rejection("target_too_large", head_call(6, 0, 12), DomainError, "12"),
    Rejection("target_beyond_vocabulary", head_call(6, 11), DomainError, "11", {"vocab_size": 11}),
    Rejection("target_negative", head_call(6, -1), DomainError, "-1"),
    Rejection("target_not_ignored", head_call(6, -100), DomainError, "-100", {"ignore_index": -1}),
    Rejection("floating_targets", head_call(6, 0, dtype=torch.float32), DomainError, "float32"),
    Rejection(
        "targets_short",
        lambda: (torch.ones(2, 6), torch.zeros(3, dtype=torch.int64), *two_cores(*SOUND)),
        ShapeError,
        "one target per hidden state",
    ),
    Rejection("complex", complex_head(torch.tensor([0])), DomainError, "complex"),
    *chain_rejections(torch.ones(1, 6), torch.tensor([0])),
)
TOPK = (
    Rejection("none", head_call(), ConfigError, "k", {"k": 0}),
    Rejection("too_many", head_call(), ConfigError, "k", {"k": 13}),
    Rejection("complex", complex_head(), DomainError, "complex"),
)


def decompose_call(fill: float = 1.0, shape: tuple[int, ...] = (12, 6)) -> Callable[[], tuple[Any, ...]]:
    """Return a call of ``decompose`` with a constant table, whose last entry may differ."""

    def call() -> tuple[Any, ...]:
        dense = torch.ones(shape)
        dense.view(-1)[-1] = fill
        return (dense,)

    return call


DECOMPOSE = (
    Rejection("rank_above_matrix", decompose_call(), ConfigError, r"rank 1 in 1\.\.6", {"ranks": (7,)}),
    Rejection("rank_zero", decompose_call(), ConfigError, "rank 1", {"ranks": (0,)}),
    Rejection("ranks_missing", decompose_call(), ConfigError, "K − 1 ranks", {"ranks": ()}),
    Rejection("factors_missing", decompose_call(), ConfigError, "factors", {"feature_factors": (6,)}),
    Rejection("uncovered_rows", decompose_call(shape=(13, 6)), ShapeError, "cover"),
    Rejection("uncovered_columns", decompose_call(shape=(12, 7)), ShapeError, "cover"),
    Rejection("nan", decompose_call(math.nan), DomainError, "finite"),
    Rejection("infinite", decompose_call(math.inf), DomainError, "finite"),
    Rejection("vector", decompose_call(shape=(12,)), ShapeError, "table"),
    Rejection("whole_numbers", lambda: (torch.ones(12, 6, dtype=torch.int64),), DomainError, "floating"),
)
REFINE = (
    Rejection("sweeps", lambda: (torch.ones(12, 6), *two_cores(*SOUND)), ConfigError, "sweeps", {"sweeps": -1}),
    Rejection("uncovered", lambda: (torch.ones(13, 6), *two_cores(*SOUND)), ShapeError, "cover"),
    Rejection("nan", lambda: (torch.full((12, 6), math.nan), *two_cores(*SOUND)), DomainError, "finite"),
    Rejection("broken_chain", lambda: (torch.ones(12, 6), *two_cores(1, 2, 3, 1)), ShapeError, "chain"),
)
