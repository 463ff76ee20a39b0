"""Launchers of the tensor-train kernels, interpreted, against dense float64 arithmetic in NumPy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import Tile

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs a process started with TRITON_INTERPRET=1"),
]
pytest.importorskip("triton")
kernels = importlib.import_module("so8t_torch.ops.tensor_train.kernels")
head_kernels = importlib.import_module("so8t_torch.ops.tensor_train.head_kernels")

PAIR = ((5, 7), (6, 8), (3,), 45)
TRIPLE = ((4, 5, 3), (3, 5, 4), (3, 2), 58)
WIDE_PAIR = ((3, 4), (18, 70), (20,), 1250)
WIDE_TRIPLE = ((2, 3, 2), (5, 17, 17), (17, 18), 1440)
SHAPES = {"pair": PAIR, "triple": TRIPLE, "wide pair": WIDE_PAIR, "wide triple": WIDE_TRIPLE}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUMS = {2: ("txra,tryb->tab", ("tab,tryb->tra", "tab,txra->trb")), 3: (
    "txra,trsb,tsyc->tabc", ("tabc,trsb,tsyc->tra", "tabc,txra,tsyc->trsb", "tabc,txra,trsb->tsc"),
)}  # fmt: skip


def cores_of(shape: Any, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    v, d, inner, _ = shape
    r = (1, *inner, 1)
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(v[k], r[k], r[k + 1], d[k], generator=generator).to(dtype) for k in range(len(v)))


def parts_of(shape: Any, tokens: int, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(v, (tokens,), generator=generator) for v in shape[0])


def exact(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def dense_rows(parts: Any, cores: Any, d_model: int) -> np.ndarray:
    slices = [exact(core)[np.maximum(part.numpy(), 0)] for part, core in zip(parts, cores, strict=True)]
    rows = np.einsum(SUMS[len(cores)][0], *slices).reshape(len(parts[0]), -1)[:, :d_model]
    return rows * (parts[0].numpy() >= 0)[:, None]


def dense_gradients(dy: Tensor, parts: Any, cores: Any) -> list[np.ndarray]:
    d = [core.shape[3] for core in cores]
    padded = np.zeros((len(dy), int(np.prod(d))))
    padded[:, : dy.shape[1]] = exact(dy) * (parts[0].numpy() >= 0)[:, None]
    padded = padded.reshape(-1, *d)
    slices = [exact(core)[np.maximum(part.numpy(), 0)] for part, core in zip(parts, cores, strict=True)]
    found = []
    for k, (core, formula) in enumerate(zip(cores, SUMS[len(cores)][1], strict=True)):
        total = np.zeros(core.shape)
        share = np.einsum(formula, padded, *(s for j, s in enumerate(slices) if j != k))
        np.add.at(total, np.maximum(parts[k].numpy(), 0), share.reshape(-1, *core.shape[1:]))
        found.append(total)
    return found


def error(found: Tensor, expected: np.ndarray) -> float:
    """Relative distance in units of eps of the dtype found."""
    distance = np.linalg.norm(exact(found) - expected) / np.linalg.norm(expected)
    return float(distance / torch.finfo(found.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_within_one_eps(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    cores, parts = cores_of(shape, dtype), parts_of(shape, 3)
    y = kernels.rows(parts, cores, shape[3])
    assert y.dtype == dtype
    assert error(y, dense_rows(parts, cores, shape[3])) <= 1


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["pair", "triple"])
def test_core_gradients_are_float32_sums(name: str, dtype: torch.dtype, atomic: bool) -> None:
    shape = SHAPES[name]
    cores, parts = cores_of(shape, dtype), parts_of(shape, 25)
    parts[0][::4] = -1
    dy = torch.randn(25, shape[3], generator=torch.Generator().manual_seed(2)).to(dtype)
    for found, expected in zip(
        kernels.rows_backward(dy, parts, cores, atomic=atomic), dense_gradients(dy, parts, cores), strict=True
    ):
        assert found.dtype == torch.float32
        assert error(found, expected) <= 4


@pytest.mark.parametrize("name", ["wide pair", "wide triple"])
def test_ranks_and_widths_beyond_a_tile_are_walked(name: str) -> None:
    shape = SHAPES[name]
    cores, parts = cores_of(shape, torch.float32), parts_of(shape, 3)
    dy = torch.randn(3, shape[3], generator=torch.Generator().manual_seed(2))
    for found, expected in zip(kernels.rows_backward(dy, parts, cores), dense_gradients(dy, parts, cores), strict=True):
        assert error(found, expected) <= 4


@pytest.mark.parametrize("table", ["PAIR_ROWS_TILES", "TRIPLE_ROWS_TILES", "PAIR_GRADIENT_TILES"])
def test_every_tile_gives_the_same_sums(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TRIPLE if table.startswith("TRIPLE") else PAIR
    cores, parts = cores_of(shape, torch.float32), parts_of(shape, 9)
    dy = torch.randn(9, shape[3], generator=torch.Generator().manual_seed(2))
    tiles = getattr(kernels, table)
    for tile in (tiles if "ROWS" in table else tiles[4])[1:]:
        monkeypatch.setattr(kernels, table, (tile,) if "ROWS" in table else {4: (tile,)})
        if "ROWS" in table:
            assert error(kernels.rows(parts, cores, shape[3]), dense_rows(parts, cores, shape[3])) <= 1
        else:
            found = kernels.rows_backward(dy, parts, cores)
            assert max(map(error, found, dense_gradients(dy, parts, cores))) <= 4


def test_a_frequent_id_is_split_over_chunks_and_added_in_order() -> None:
    cores = cores_of(PAIR, torch.float32)
    tokens = 3 * kernels.CHUNK + 5
    parts = (torch.full((tokens,), 2), torch.full((tokens,), 3))
    parts[1][::9] = 6
    parts[0][-1] = 4
    dy = torch.randn(tokens, PAIR[3], generator=torch.Generator().manual_seed(2))
    found = kernels.rows_backward(dy, parts, cores)
    assert max(map(error, found, dense_gradients(dy, parts, cores))) <= 4
    assert all(map(torch.equal, found, kernels.rows_backward(dy, parts, cores)))


def test_the_order_of_different_ids_leaves_every_bit() -> None:
    cores = cores_of(PAIR, torch.float32)
    ids = torch.randperm(35, generator=torch.Generator().manual_seed(3))
    dy = torch.randn(35, PAIR[3], generator=torch.Generator().manual_seed(2))
    turned = torch.randperm(35, generator=torch.Generator().manual_seed(4))
    first = kernels.rows_backward(dy, (ids // 7, ids % 7), cores)
    second = kernels.rows_backward(dy[turned], (ids[turned] // 7, ids[turned] % 7), cores)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("shape", [PAIR, TRIPLE], ids=["pair", "triple"])
def test_a_part_that_is_none_gives_nan_and_minus_one_gives_zero(shape: Any) -> None:
    cores, parts = cores_of(shape, torch.float32), parts_of(shape, 4)
    parts[0][:] = torch.tensor([-1, shape[0][0], -7, 1])
    y = kernels.rows(parts, cores, shape[3])
    assert torch.equal(y[0], torch.zeros(shape[3]))
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()
    found = kernels.rows_backward(torch.ones(4, shape[3]), parts, cores)
    alone = kernels.rows_backward(torch.ones(1, shape[3]), tuple(part[3:] for part in parts), cores)
    assert all(map(torch.equal, found, alone))


def test_no_tokens_give_no_rows_and_zero_gradients() -> None:
    cores, parts = cores_of(PAIR, torch.float32), parts_of(PAIR, 0)
    assert kernels.rows(parts, cores, PAIR[3]).shape == (0, PAIR[3])
    assert not any(found.any() for found in kernels.rows_backward(torch.zeros(0, PAIR[3]), parts, cores))


@pytest.fixture
def poisoned() -> Any:
    """Fill what ``torch.empty`` returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
def test_nothing_unwritten_is_read() -> None:
    assert torch.empty(1).isnan()
    for shape in (PAIR, TRIPLE):
        cores, parts = cores_of(shape, torch.float32), parts_of(shape, 5)
        assert kernels.rows(parts, cores, shape[3]).isfinite().all()
        assert all(g.isfinite().all() for g in kernels.rows_backward(torch.ones(5, shape[3]), parts, cores))


HEAD = (18, 17, 300, 2, 5, 7, 33)
"""v1, v2, vocab_size, rank, d1, d2, d_model."""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks smaller than the shapes above, so that slabs, blocks and their merge take part."""
    monkeypatch.setattr(head_kernels, "MULTIPLE", 4)
    tile = Tile(warps=1, constants={"V1": 16, "V2": 16, "A": 16, "B": 16})
    for table in ("LOGIT_TILES", "HIDDEN_TILES"):
        monkeypatch.setattr(head_kernels, table, {2: (tile,), 4: (tile,)})
    tile = Tile(warps=1, constants={"OWN": 16, "OTHER": 16, "D_OWN": 16, "D_OTHER": 16})
    monkeypatch.setattr(head_kernels, "CORE_TILES", {2: (tile,), 4: (tile,)})


def head_case(dtype: torch.dtype, tokens: int) -> Any:
    v1, v2, vocab_size, rank, d1, d2, d_model = HEAD
    cores = cores_of(((v1, v2), (d1, d2), (rank,), d_model), dtype)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, d_model, generator=generator).mul(0.1).to(dtype)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    return hidden, targets, cores, torch.rand(tokens, generator=generator)


def dense_cross_entropy(hidden: Any, targets: Any, cores: Any, g: Any) -> Any:
    """Loss and gradients by the dense table; targets of −1 count for nothing."""
    vocab_size, d_model = HEAD[2], HEAD[6]
    c1, c2 = exact(cores[0])[:, 0], exact(cores[1])[:, :, 0]
    table = np.einsum("xra,yrb->xyab", c1, c2).reshape(HEAD[0] * HEAD[1], -1)[:vocab_size, :d_model]
    counted = targets.numpy() >= 0
    H = np.where(counted[:, None], exact(hidden), 0.0)
    L = H @ table.T
    lse = np.log(np.exp(L - L.max(1, keepdims=True)).sum(1)) + L.max(1)
    aim = np.maximum(targets.numpy(), 0)
    loss = (lse - L[np.arange(len(aim)), aim]) * counted
    P = np.exp(L - lse[:, None])
    P[np.arange(len(aim)), aim] -= 1
    P *= (exact(g) * counted)[:, None]
    dtable = np.zeros((HEAD[0] * HEAD[1], HEAD[4] * HEAD[5]))
    dtable[:vocab_size, :d_model] = P.T @ H
    full = dtable.reshape(HEAD[0], HEAD[1], HEAD[4], HEAD[5])
    dc1, dc2 = np.einsum("xyab,yrb->xra", full, c2), np.einsum("xyab,xra->yrb", full, c1)
    return loss, P @ table, dc1[:, None], dc2[:, :, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("narrow")
def test_cross_entropy_under_the_tied_head(dtype: torch.dtype) -> None:
    hidden, targets, cores, g = head_case(dtype, 7)
    targets[3::3] = -1
    hidden[3] = float("nan")
    loss, lse = head_kernels.head_forward(hidden, targets, *cores, HEAD[2])
    gradients = head_kernels.head_backward(g, hidden, targets, lse, *cores, HEAD[2])
    expected = dense_cross_entropy(hidden, targets, cores, g)
    assert loss.dtype == torch.float32
    assert error(loss, expected[0]) <= 4
    assert gradients[0].dtype == dtype
    for found, correct in zip(gradients, expected[1:], strict=True):
        assert error(found.to(dtype), correct) <= (4 if dtype == torch.float32 else 1)


@pytest.mark.usefixtures("narrow")
def test_a_target_that_is_no_id_is_nan_and_touches_no_other_token() -> None:
    hidden, targets, cores, g = head_case(torch.float32, 4)
    whole, _ = head_kernels.head_forward(hidden, targets, *cores, HEAD[2])
    targets[1], targets[2] = HEAD[2], -2
    loss, lse = head_kernels.head_forward(hidden, targets, *cores, HEAD[2])
    assert loss[1:3].isnan().all()
    assert torch.equal(loss[[0, 3]], whole[[0, 3]])
    dhidden = head_kernels.head_backward(g, hidden, targets, lse, *cores, HEAD[2])[0]
    assert dhidden[1:3].isnan().all()
    assert dhidden[[0, 3]].isfinite().all()


def test_no_tokens_give_no_loss() -> None:
    hidden, targets, cores, g = head_case(torch.float32, 0)
    loss, lse = head_kernels.head_forward(hidden, targets, *cores, HEAD[2])
    dhidden, dc1, dc2 = head_kernels.head_backward(g, hidden, targets, lse, *cores, HEAD[2])
    assert loss.shape == lse.shape == (0,)
    assert dhidden.shape == hidden.shape
    assert not dc1.any()
    assert not dc2.any()


class Allocations(TorchDispatchMode):
    """Add up the bytes of every new tensor, also of those that do not last."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.bytes += made.untyped_storage().nbytes()
        return made


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_the_head_allocates_less_than_a_tenth_of_the_logits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_kernels, "launch", lambda *_, **__: None)
    vocab_size, d_model = 32_064, 3072
    cores = cores_of(((180, 180), (48, 64), (16,), d_model), torch.bfloat16)
    hidden, targets = torch.zeros(tokens, d_model, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.int64)
    with Allocations() as forward:
        _, lse = head_kernels.head_forward(hidden, targets, *cores, vocab_size)
    with Allocations() as backward:
        found = head_kernels.head_backward(lse, hidden, targets, lse, *cores, vocab_size)
    outputs = sum(x.numel() * x.element_size() for x in found)
    logits = tokens * vocab_size * 2
    assert forward.bytes < logits / 10
    assert backward.bytes - outputs < logits / 10
