"""What could go wrong unseen with tensor trains: narrow ids, autocast, slices that no row needs, the compiler."""

import math
import subprocess
import sys

import pytest
import torch

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.ops import tensor_train as room

# vocabulary factors, feature factors, ranks
SHAPES = {
    "two": ((31, 33), (6, 10), (4,)),
    "three": ((9, 10, 11), (4, 3, 5), (3, 4)),
}


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawn_cores(v, w, inner, seed=0, dtype=torch.float64):
    ranks = (1, *inner, 1)
    return [
        drawn(v[k], ranks[k], ranks[k + 1], w[k], seed=seed + k, dtype=dtype) / ranks[k + 1] ** 0.5
        for k in range(len(v))
    ]


def dense_table(cores):
    """E of two cores as one sum over digits and the rank."""
    return torch.einsum("ira,jrb->ijab", cores[0][:, 0], cores[1][:, :, 0]).flatten(2).flatten(0, 1)


def leaves(cores):
    return [core.detach().clone().requires_grad_() for core in cores]


def close(found, wanted, eps=256.0):
    found, wanted = found.detach(), wanted.detach()
    unit = torch.finfo(wanted.dtype).eps * max(float(wanted.abs().max()), 1e-300)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= eps * unit


def test_narrow_ids_are_compared_as_numbers_not_as_bytes():
    cores = drawn_cores((100, 10), (2, 3), (2,))
    narrow = torch.tensor([127, -56], dtype=torch.int8)
    assert torch.equal(room.rows(narrow[:1], *cores), room.rows(torch.tensor([127]), *cores))
    with pytest.raises(DomainError, match="-56"):
        room.rows(narrow, *cores, padding_idx=200)
    target, hidden = torch.tensor([156], dtype=torch.uint8), drawn(1, 6)
    assert room.cross_entropy(hidden, target, *cores) == room.cross_entropy(hidden, target.long(), *cores) > 0
    assert torch.equal(room.rows(torch.tensor([999], dtype=torch.uint16), *cores)[0], dense_table(cores)[999])


def test_a_slice_that_no_row_needs_may_hold_anything():
    v, w, inner = SHAPES["two"]
    size, width = math.prod(v) - v[1], math.prod(w) - w[1]
    cores = drawn_cores(v, w, inner)
    cores[0][-1], cores[0][..., -1] = torch.nan, torch.nan
    cores, hidden = leaves(cores), drawn(3, width).requires_grad_()
    targets = torch.tensor([0, 5, size - 1])
    for backend in ("tiled", "eager"):
        found = room.rows(targets, *cores, vocab_size=size, d_model=width, backend=backend)
        loss = room.cross_entropy(hidden, targets, *cores, vocab_size=size, backend=backend)
        score = room.logits(hidden, *cores, vocab_size=size, backend=backend)
        for out in (found, loss, score, room.table(*cores, vocab_size=size, d_model=width)):
            used = (hidden, *cores) if out is loss or out is score else cores
            assert out.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), used))


@pytest.mark.parametrize("backend", ["tiled", "eager"])
def test_autocast_changes_no_bit(backend):
    cores, ids = leaves(drawn_cores(*SHAPES["three"], dtype=torch.float32)), torch.arange(50) % 37 * 26
    hidden = drawn(50, 60, dtype=torch.float32)
    results = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            found = room.rows(ids, *cores, backend=backend)
            loss = room.cross_entropy(hidden, ids, *cores, backend=backend)
            score = room.logits(hidden, *cores, backend=backend)
            best = room.topk(hidden, *cores, k=3, backend=backend)
            outs = (found, loss, score, *best, room.table(*cores))
            gradients = torch.autograd.grad(loss.sum() + found.sum(), cores) if backend == "tiled" else ()
        results.append((*outs, *gradients))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_first_call_does_not_load_the_compiler():
    program = (
        "import sys, torch; from so8t_torch.ops import tensor_train as room; "
        "cores = [torch.ones(2, 1, 1, 2, requires_grad=True) for _ in range(2)]; ids = torch.tensor([0, 3]); "
        "room.cross_entropy(room.rows(ids, *cores), ids, *cores).sum().backward(); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("op", ["rows", "cross_entropy", "logits", "topk"])
def test_compiled_whole_the_operations_give_the_same(op):
    cores, ids = leaves(drawn_cores(*SHAPES["two"])), torch.tensor([3, 500, 3, 1022])
    hidden = drawn(4, 60)
    call = {
        "rows": lambda: room.rows(ids, *cores, padding_idx=500),
        "cross_entropy": lambda: room.cross_entropy(hidden, ids, *cores),
        "logits": lambda: room.logits(hidden, *cores, vocab_size=1000),
        "topk": lambda: room.topk(hidden, *cores, k=3)[0],
    }[op]
    found, wanted = torch.compile(call, fullgraph=True, backend="aot_eager")(), call()
    assert torch.equal(found, wanted)
    for ours, plain in zip(*(torch.autograd.grad(x.sum(), cores) for x in (found, wanted)), strict=True):
        close(ours, plain)


def test_a_complex_table_is_never_fitted_by_its_real_part():
    cores = drawn_cores((3, 4), (2, 3), (2,))
    with pytest.raises(DomainError, match="complex table"):
        room.refine(torch.complex(dense_table(cores), dense_table(cores)), *cores)
    with pytest.raises(DomainError, match="one dtype"):
        room.refine(dense_table(cores), cores[0], cores[1].float())
    with pytest.raises(DomainError, match="floating"):
        room.refine(dense_table(cores), *(core.long() for core in cores))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda c: room.rows(torch.tensor([0]), *c, padding_idx=1.5), ConfigError, "padding_idx"),
        (lambda c: room.rows(torch.tensor([0]), *c, vocab_size=9.0), ShapeError, "whole number vocab_size"),
        (lambda c: room.topk(torch.ones(6).double(), *c, k=2.0), ConfigError, "whole number k"),
        (lambda c: room.table(*(core.to(torch.float8_e5m2) for core in c)), DomainError, "16 bits"),
        (
            lambda _: room.decompose(torch.ones(12, 6), vocab_factors=(3.0, 4), feature_factors=(2, 3), ranks=(2,)),
            ConfigError,
            "whole numbers",
        ),
        (lambda c: room.refine(torch.ones(12, 6), *c, sweeps=0.5), ConfigError, "sweeps"),
    ],
)
def test_options_that_are_no_whole_numbers_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(drawn_cores((3, 4), (2, 3), (2,)))
