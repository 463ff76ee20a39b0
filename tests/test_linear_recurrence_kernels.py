"""Launchers of the recurrence's kernels, interpreted, whole and cut into parts, against a loop in NumPy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import fixed_tile

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs a process started with TRITON_INTERPRET=1"),
]
pytest.importorskip("triton")
kernels = importlib.import_module("so8t_torch.ops.linear_recurrence.kernels")
ROWS, LENGTH, WIDTH = 2, 21, 5


def drawn(kind: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, LENGTH, WIDTH)
    b, grad = (torch.randn(shape, generator=generator, dtype=kind) for _ in range(2))
    start, last = (torch.randn(ROWS, WIDTH, generator=generator, dtype=kind) for _ in range(2))
    a = 0.9 * torch.rand(shape, generator=generator, dtype=kind)
    restart = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    restart[0, 6] = restart[0, 7] = restart[1, 12] = True
    return {"a": a, "b": b, "initial": start, "restart": restart, "grad": grad, "grad_final": last}


def loop(x: dict[str, Any], reverse: bool) -> tuple[np.ndarray, ...]:
    """Return h, ∂a, ∂b, ∂initial token by token."""
    a, b, grad = (x[name].numpy() for name in ("a", "b", "grad"))
    kept = ~x["restart"].numpy()[..., None]
    run = list(range(LENGTH))[:: -1 if reverse else 1]
    h, da, db = np.zeros_like(b), np.zeros_like(b), np.zeros_like(b)
    before = {}
    state = x["initial"].numpy()
    for t in run:
        before[t] = np.where(kept[:, t], state, 0)
        h[:, t] = state = np.where(kept[:, t], a[:, t] * before[t], 0) + b[:, t]
    passed = x["grad_final"].numpy()
    for t in run[::-1]:
        db[:, t] = grad[:, t] + passed
        da[:, t] = db[:, t] * before[t].conj()
        passed = np.where(kept[:, t], a[:, t].conj() * db[:, t], 0)
    return h, da, db, passed


def near(found: Tensor, wanted: np.ndarray) -> bool:
    return bool(np.abs(found.numpy() - wanted).max() <= 1e-13 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_parts_carry_what_the_loop_carries(kind, reverse, parts):
    x = drawn(kind)
    h, da, db, dinitial = loop(x, reverse)
    found, last = kernels.recurrence(x["a"], x["b"], x["initial"], x["restart"], reverse, parts)
    assert near(found, h)
    assert near(last, h[:, 0 if reverse else -1])
    given = (x["grad"], x["grad_final"], x["a"], torch.from_numpy(h), x["initial"], x["restart"], reverse, parts)
    for gradient, wanted in zip(kernels.gradient(*given), (da, db, dinitial), strict=True):
        assert near(gradient, wanted)


def test_every_tile_gives_the_same_bits():
    x = drawn(torch.float32)
    results = []
    for index in range(len(kernels.TILES[4])):
        with fixed_tile(index):
            results.append(kernels.recurrence(x["a"], x["b"], x["initial"], x["restart"], False, 2)[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("parts", [1, 3])
def test_what_comes_later_changes_no_bit_and_overflow_means_what_it_means_in_the_loop(parts):
    a, b = (x.clone() for x in (drawn(torch.float32)["a"], drawn(torch.float32)["b"]))
    before, _ = kernels.recurrence(a, b, None, None, False, parts)
    a[0, 15, 1], b[0, 9, 2] = torch.nan, torch.inf
    after, _ = kernels.recurrence(a, b, None, None, False, parts)
    assert torch.equal(after[:, :9], before[:, :9])
    assert torch.equal(after[0, :15, 1], before[0, :15, 1])
    assert after[0, 15:, 1].isnan().all()
    assert after[0, 9:, 2].isinf().all()
    huge, late = torch.full((1, LENGTH, 1), 1e10), torch.zeros(1, LENGTH, 1)
    late[0, -1] = 3.0
    zero_until_then, _ = kernels.recurrence(huge, late, None, None, False, parts)
    assert torch.equal(zero_until_then, late)
