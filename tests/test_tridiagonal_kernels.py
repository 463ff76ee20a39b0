"""Launchers of the chain's kernels, interpreted: blocks, parts and lanes against loops in NumPy."""

import importlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from so8t_torch.core.backend import interpreting
from so8t_torch.ops import tridiagonal as room

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs a process started with TRITON_INTERPRET=1"),
]
pytest.importorskip("triton")
kernels = importlib.import_module("so8t_torch.ops.tridiagonal.kernels")
SITES = 2
BLOCK = 4 * SITES
"""Sites of a block of the fewest lanes."""
CUTS = [(1, 4), (3, 4)]
"""Parts and lanes: blocks in a row, and parts of them side by side."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """An interpreter takes every site and every lane of a scan by itself: shorter lanes, fewer parts."""
    monkeypatch.setattr(kernels, "SITES", SITES)
    monkeypatch.setattr(kernels, "MOST_PARTS", 4)


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.complex(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)))


def chains(n):
    """Return d and β of two chains, parted within a lane, between lanes and between blocks."""
    d, beta = drawn(2, n) - 1.5j, 0.4 * drawn(2, n, seed=1)
    for i in (2, 3, BLOCK - 1):
        beta[0, i] = 0
    return d, beta


def sweep(d, beta, backwards):
    """Return the ratios of one chain, site by site."""
    order = list(range(len(d)))[:: -1 if backwards else 1]
    x = {order[0]: d[order[0]]}
    for before, i in pairwise(order):
        coupling = beta[min(before, i)]
        x[i] = d[i] - (coupling / x[before] if coupling != 0 else 0)
    return np.asarray([x[i] for i in range(len(d))])


def scan(m, s, backwards):
    """Return the linear scan of one chain, site by site."""
    order = list(range(len(s)))[:: -1 if backwards else 1]
    x = {order[0]: s[order[0]]}
    for before, i in pairwise(order):
        x[i] = s[i] + (m[i] * x[before] if m[i] != 0 else 0)
    return np.asarray([x[i] for i in range(len(s))])


def near(found, wanted, tolerance):
    return (np.abs(found.numpy() - wanted) <= tolerance * np.abs(wanted).max(-1, keepdims=True)).all()


@pytest.mark.parametrize(("parts", "lanes"), [*CUTS, (1, 32)])
@pytest.mark.parametrize("reverse", [[True, False]])
def test_blocks_and_parts_carry_what_the_loop_carries(reverse, parts, lanes):
    n = 3 * BLOCK + 3
    d, beta = chains(n)
    wanted = [[sweep(d[b].numpy(), beta[b].numpy(), backwards) for b in range(2)] for backwards in reverse]
    assert near(kernels.ratios(d, beta, reverse, parts, lanes), np.asarray(wanted), 1e-13)
    m, s = 0.9 * drawn(len(reverse), 2, n, seed=2), drawn(len(reverse), 2, n, seed=3)
    m[:, 0, [2, 3, BLOCK, n - 1]] = 0
    wanted = [
        [scan(m[k, b].numpy(), s[k, b].numpy(), backwards) for b in range(2)] for k, backwards in enumerate(reverse)
    ]
    assert near(kernels.linear_scan(m, s, reverse, parts, lanes), np.asarray(wanted), 1e-13)


@pytest.mark.parametrize(("parts", "lanes"), CUTS)
def test_what_comes_later_changes_no_bit(parts, lanes):
    n = 2 * BLOCK + 5
    d, beta = (x[:1] for x in chains(n))
    m, s = 0.9 * drawn(1, 1, n, seed=2), drawn(1, 1, n, seed=3)
    before = kernels.ratios(d, beta, [False], parts, lanes), kernels.linear_scan(m, s, [False], parts, lanes)
    for j, poison in ((BLOCK - 1, torch.inf), (BLOCK + 3, torch.nan)):
        edited = [x.clone() for x in (d, beta, m, s)]
        for x, first in zip(edited, (j, j - 1, j, j), strict=True):
            x[..., first:] = poison
        after = (
            kernels.ratios(*edited[:2], [False], parts, lanes),
            kernels.linear_scan(*edited[2:], [False], parts, lanes),
        )
        for x, y in zip(after, before, strict=True):
            assert torch.equal(x[..., :j], y[..., :j])
            assert not torch.isfinite(torch.view_as_real(x[..., j:])).any(-1).all()


@pytest.mark.parametrize(("parts", "lanes"), CUTS)
@pytest.mark.parametrize("start", [5, BLOCK])
def test_a_zero_keeps_what_is_lost_on_its_side_and_nothing_else_does(start, parts, lanes):
    n = 2 * BLOCK + 5
    d, beta = chains(n)
    m, s = 0.9 * drawn(1, 2, n, seed=2), drawn(1, 2, n, seed=3)
    beta[:, start - 1], m[..., start] = 0, 0
    before = kernels.ratios(d, beta, [False], parts, lanes), kernels.linear_scan(m, s, [False], parts, lanes)
    beta[1, start - 1] = m[:, 1, start] = 0.3
    d[:, :start], s[..., :start], m[..., :start] = torch.nan, torch.inf, torch.nan
    beta[:, : start - 1] = torch.inf
    after = kernels.ratios(d, beta, [False], parts, lanes), kernels.linear_scan(m, s, [False], parts, lanes)
    for x, y in zip(after, before, strict=True):
        assert torch.equal(x[0, 0, start:], y[0, 0, start:])
        # the second chain goes on, and what is lost stays lost
        assert not torch.isfinite(torch.view_as_real(x[0, 1, start:])).any()


def test_the_last_coupling_is_not_read():
    d, beta = chains(BLOCK)
    before = kernels.ratios(d, beta, [False, True])
    beta[:, -1] = torch.nan
    assert torch.equal(kernels.ratios(d, beta, [False, True]), before)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_no_scale_of_energy_leaves_the_range(scale):
    d, beta = (x.to(torch.complex64) for x in chains(2 * BLOCK))
    wanted = kernels.ratios(d, beta, [False], 1, 4)
    found = kernels.ratios(d * scale, beta * scale**2, [False], 1, 4) / scale
    assert torch.allclose(found, wanted, rtol=1e-5, atol=0)


def test_single_precision_keeps_five_digits():
    generator = torch.Generator().manual_seed(0)
    n = 300
    h, b = (torch.randn(1, n - k, generator=generator) for k in range(2))
    z = torch.tensor([0.1 + 0.01j], dtype=torch.complex64)
    beta = np.append(b[0].double().numpy() ** 2, 0)
    exact = 1 / sweep(h[0].double().numpy() - complex(z), beta, False)
    found = room.green(h, b, b, z, backend="triton").numpy()[0]
    assert (np.abs(found - exact) / np.abs(exact)).max() <= 1e-5


def test_the_gradient_is_that_of_a_dense_inverse():
    n = 37
    h, b, c = (0.5 * drawn(1, size, seed=k) for k, size in enumerate((n, n - 1, n - 1)))
    z = torch.tensor([0.2 + 1.5j], dtype=torch.complex128)
    chain = [x.requires_grad_() for x in (torch.complex(h.real, -h.imag.abs()), b, c, z)]
    weight = drawn(1, n, seed=9)

    def dense(h, b, c, z):
        matrix = torch.diag_embed(h - z[:, None]) + torch.diag_embed(b, 1) + torch.diag_embed(c, -1)
        return torch.linalg.inv(matrix).diagonal(dim1=1, dim2=2)

    wanted = torch.autograd.grad(dense(*chain), chain, weight)
    found = torch.autograd.grad(room.green(*chain, mode="full", backend="triton"), chain, weight)
    for slope, expected in zip(found, wanted, strict=True):
        assert (slope - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_second_derivatives_are_those_of_plain_operations():
    chain = [0.5 * drawn(1, size, seed=k) for k, size in enumerate((6, 5, 5))]
    z, weight, direction = torch.tensor([0.2 + 2.5j], dtype=torch.complex128), drawn(1, 6, seed=5), drawn(1, 6, seed=6)

    def second(backend):
        h, b, c = (x.clone().requires_grad_() for x in chain)
        g = room.green(h, b, c, z, mode="full", require_dissipation=False, backend=backend)
        (slope,) = torch.autograd.grad(g, h, weight, create_graph=True)
        return torch.autograd.grad(slope, (h, b, c), direction)

    for found, wanted in zip(second("triton"), second("eager"), strict=True):
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_the_registered_operations_pass_opcheck():
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    d, beta = drawn(1, 3).requires_grad_(), drawn(1, 3, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.so8t.tridiagonal_ratios.default, (d, beta, [True], "triton"), test_utils=kinds)
    m, s = drawn(1, 1, 3).requires_grad_(), drawn(1, 1, 3, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.so8t.tridiagonal_linear_scan.default, (m, s, [True], "triton"), test_utils=kinds)


def test_long_chains_are_cut_where_they_are_few(monkeypatch):
    monkeypatch.undo()
    assert kernels._parts(rows=1, blocks=64, wanted=None) == 64
    assert kernels._parts(rows=32, blocks=4, wanted=None) == 4
    assert kernels._parts(rows=32, blocks=3, wanted=None) == 1
    assert kernels._parts(rows=4096, blocks=64, wanted=None) == 1
    assert kernels._parts(rows=2, blocks=1000, wanted=None) == kernels.MOST_PARTS
