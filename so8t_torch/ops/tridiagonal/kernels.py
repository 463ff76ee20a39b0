"""Triton kernels of the ratios and of the linear scan: lanes of eight sites, blocks of lanes, parts of blocks.

    ratios    [u, v] ← [d u − β v, u],  x = u/v,  x_i = d_i − β/x_before        scan    x_i = s_i + m_i x_before

One program walks along one chain, a block of lanes at a time. Each lane reduces its sites to one 2×2 matrix (A, X for
the scan), an associative scan over the lanes gives what enters each, and then each lane runs the plain recurrence from
there; what leaves the last lane enters the next block. So results have the accuracy of the recurrence. Where chains are
too few to fill a device they are cut into parts: a first kernel reduces every part to its matrix, and in the second
every part multiplies those before it.
Matrices are divided by their largest entry wherever two meet, and everything is carried in double precision: in single
precision products lose the digits that the recurrence keeps. Where β = 0 (m = 0) a sweep starts afresh: a flag beside
each matrix says that it forgets what precedes it, and what it forgets is not multiplied by zero but left out. Complex
numbers are neighbouring real pairs.
"""

# Triton reads a kernel's annotations: only ``tl.constexpr`` may stand there. Tuples of sites grow as they unroll.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.launch import Tile, launch

SITES = 8
"""Sites of a lane: a product of eight numbers of float32, any at all, stays in the range of float64."""
PROGRAMS = 264
"""Programs that fill a device; with fewer chains than that the sites are cut into parts."""
MOST_PARTS = 64
FEWEST_PARTS = 4
"""Below, the second kernel costs more than the blocks that run side by side save."""
TILES = {
    4: (Tile(warps=1, constants={"LANES": 4}),),
    32: (Tile(warps=1, constants={"LANES": 32}),),
    128: (Tile(warps=4, constants={"LANES": 128}),),
}
"""Lanes of a block → tiles: the fewest lanes that hold a chain, else blocks of 1,024 sites."""


@triton.jit
def _times_plus(m, x, s):
    """Return m x + s."""
    return m[0] * x[0] - m[1] * x[1] + s[0], m[0] * x[1] + m[1] * x[0] + s[1]


@triton.jit
def _mixed(a, x, b, y):
    """Return a x + b y."""
    re = a[0] * x[0] - a[1] * x[1] + (b[0] * y[0] - b[1] * y[1])
    return re, a[0] * x[1] + a[1] * x[0] + (b[0] * y[1] + b[1] * y[0])


@triton.jit
def _over(x, y):
    """Return x/y."""
    scale = 1.0 / (y[0] * y[0] + y[1] * y[1])
    return (x[0] * y[0] + x[1] * y[1]) * scale, (x[1] * y[0] - x[0] * y[1]) * scale


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])


@triton.jit
def _normalised(a, b, c, d):
    """Return the matrix [[a, b], [c, d]] divided by its largest real or imaginary part."""
    upper = tl.maximum(tl.maximum(tl.abs(a[0]), tl.abs(a[1])), tl.maximum(tl.abs(b[0]), tl.abs(b[1])))
    lower = tl.maximum(tl.maximum(tl.abs(c[0]), tl.abs(c[1])), tl.maximum(tl.abs(d[0]), tl.abs(d[1])))
    t = 1.0 / tl.maximum(upper, lower)
    return (a[0] * t, a[1] * t), (b[0] * t, b[1] * t), (c[0] * t, c[1] * t), (d[0] * t, d[1] * t)


@triton.jit
def _after(ar, ai, br, bi, cr, ci, dr, di, af, er, ei, fr, fi, gr, gi, hr, hi, ef):
    """Return the matrix [[e, f], [g, h]] times [[a, b], [c, d]], or the former where it forgets."""
    a, b, c, d = (ar, ai), (br, bi), (cr, ci), (dr, di)
    e, f, g, h = (er, ei), (fr, fi), (gr, gi), (hr, hi)
    p, q, r, s = _normalised(_mixed(e, a, f, c), _mixed(e, b, f, d), _mixed(g, a, h, c), _mixed(g, b, h, d))
    forgets = ef > 0.0
    p, q, r, s = _where(forgets, e, p), _where(forgets, f, q), _where(forgets, g, r), _where(forgets, h, s)
    return p[0], p[1], q[0], q[1], r[0], r[1], s[0], s[1], tl.maximum(af, ef)


@triton.jit
def _then(ar, ai, xr, xi, af, br, bi, yr, yi, bf):
    """Return the map X ↦ b (a X + x) + y, or the latter alone where it forgets."""
    b, y, forgets = (br, bi), (yr, yi), bf > 0.0
    zero = tl.zeros_like(br)
    factor = _where(forgets, b, _times_plus(b, (ar, ai), (zero, zero)))
    found = _where(forgets, y, _times_plus(b, (xr, xi), y))
    return factor[0], factor[1], found[0], found[1], tl.maximum(af, bf)


@triton.jit
def _pair(ptr, site, inside, OTHER: tl.constexpr):
    """Return complex numbers as (re, im) in double precision, a real one where there are none."""
    at = ptr + site * 2
    re = tl.load(at, mask=inside, other=OTHER).to(tl.float64)
    return re, tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _put(ptr, site, x, inside):
    tl.store(ptr + site * 2, x[0].to(ptr.dtype.element_ty), mask=inside)
    tl.store(ptr + site * 2 + 1, x[1].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _last(x, lane, LANES: tl.constexpr):
    """Return the number of the last lane."""
    return tl.sum(tl.where(lane == LANES - 1, x, 0.0), 0)


@triton.jit
def _entering(x, first, lane):
    """Return the number of the lane before, for the first lane what enters the block."""
    return tl.where(lane == 0, first, tl.gather(x, tl.maximum(lane - 1, 0), 0))


@triton.jit
def _place(parts_run, chains, parts, backwards):
    """Return sweep, chain, part of a program, and whether its sweep runs back."""
    part = tl.program_id(0) % parts_run
    row = tl.program_id(0) // parts_run
    return row // chains, row % chains, part, ((backwards >> (row // chains)) & 1) > 0, row.to(tl.int64) * parts + part


@triton.jit
def _at(visited, length, back):
    """Return which site a sweep visits."""
    return tl.where(back, length - 1 - visited, visited)


@triton.jit
def _chain_sites(d_ptr, beta_ptr, first, lane, length, back, SITES: tl.constexpr):
    """Return d, −β to the site before and whether that is zero, for the sites of each lane."""
    sites = ()
    for k in tl.static_range(SITES):
        visited = first + lane * SITES + k
        inside = visited < length
        at = _at(visited, length, back)
        d = _pair(d_ptr, at, inside, 1.0)
        beta = _pair(beta_ptr, tl.where(back, at, at - 1), inside & (visited > 0), 0.0)
        sites += ((d, (-beta[0], -beta[1]), (beta[0] == 0.0) & (beta[1] == 0.0)),)
    return sites


@triton.jit
def _products(sites, carried, lane, SITES: tl.constexpr):
    """Return the product of each lane and of all before it in the block, the first lane's times what is carried."""
    zero = tl.zeros_like(sites[0][0][0])
    nothing, one = (zero, zero), (zero + 1.0, zero)
    a, b = _where(lane == 0, carried[0:2], one), _where(lane == 0, carried[2:4], nothing)
    c, d = _where(lane == 0, carried[4:6], nothing), _where(lane == 0, carried[6:8], one)
    forgets = tl.where(lane == 0, carried[8], 0.0)
    for k in tl.static_range(SITES):
        energy, minus_beta, cut = sites[k]
        upper = _mixed(energy, a, minus_beta, c), _mixed(energy, b, minus_beta, d)
        c, d = _where(cut, one, a), _where(cut, nothing, b)
        a, b = _where(cut, energy, upper[0]), _where(cut, nothing, upper[1])
        forgets = tl.where(cut, 1.0, forgets)
    a, b, c, d = _normalised(a, b, c, d)
    own = (a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1], forgets)
    return tl.associative_scan(own, 0, _after)


@triton.jit
def reduce_ratios_kernel(
    d_ptr, beta_ptr, product_ptr, chains, length, parts, span, backwards, SITES: tl.constexpr, LANES: tl.constexpr
):
    """Write the product of the matrices of one part (never the last), and whether it forgets what enters."""
    _, chain, part, back, out = _place(parts - 1, chains, parts, backwards)
    d_ptr += chain.to(tl.int64) * length * 2
    beta_ptr += chain.to(tl.int64) * length * 2
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float64)
    one = _last(zero + 1.0, lane, LANES)
    nothing = one - one
    carried = (one, nothing, nothing, nothing, nothing, nothing, one, nothing, nothing)
    for block in range(0, span, LANES * SITES):
        sites = _chain_sites(d_ptr, beta_ptr, part * span + block, lane, length, back, SITES)
        product = _products(sites, carried, lane, SITES)
        carried = (
            _last(product[0], lane, LANES), _last(product[1], lane, LANES), _last(product[2], lane, LANES),
            _last(product[3], lane, LANES), _last(product[4], lane, LANES), _last(product[5], lane, LANES),
            _last(product[6], lane, LANES), _last(product[7], lane, LANES), _last(product[8], lane, LANES),
        )  # fmt: skip
    for k in tl.static_range(9):
        tl.store(product_ptr + out * 9 + k, carried[k])


@triton.jit
def ratios_kernel(
    d_ptr, beta_ptr, product_ptr, ratio_ptr, chains, length, parts, span, backwards,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, SITES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the ratios of one part."""
    sweep, chain, part, back, out = _place(parts, chains, parts, backwards)
    d_ptr += chain.to(tl.int64) * length * 2
    beta_ptr += chain.to(tl.int64) * length * 2
    ratio_ptr += (sweep.to(tl.int64) * chains + chain) * length * 2
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float64)
    one = _last(zero + 1.0, lane, LANES)
    nothing = one - one
    u, v = (one, nothing), (nothing, nothing)
    if SPLIT:
        each = tl.arange(0, PARTS)
        at, earlier = product_ptr + (out - part + each) * 9, each < part
        matrix = ()
        for k in tl.static_range(9):
            matrix += (tl.load(at + k, mask=earlier, other=1.0 if (k == 0) or (k == 6) else 0.0),)
        matrix = tl.associative_scan(matrix, 0, _after)
        u = _last(matrix[0], each, PARTS), _last(matrix[1], each, PARTS)
        v = _last(matrix[4], each, PARTS), _last(matrix[5], each, PARTS)
    for block in range(0, span, LANES * SITES):
        first = part * span + block
        sites = _chain_sites(d_ptr, beta_ptr, first, lane, length, back, SITES)
        carried = (u[0], u[1], nothing, nothing, v[0], v[1], nothing, nothing, one)
        product = _products(sites, carried, lane, SITES)
        above = _entering(product[0], u[0], lane), _entering(product[1], u[1], lane)
        below = _entering(product[4], v[0], lane), _entering(product[5], v[1], lane)
        before = _over(below, above)
        x = before
        for k in tl.static_range(SITES):
            energy, minus_beta, cut = sites[k]
            x = _where(cut, energy, _times_plus(minus_beta, before, energy))
            visited = first + lane * SITES + k
            _put(ratio_ptr, _at(visited, length, back), x, visited < length)
            before = _over((zero + 1.0, zero), x)
        u, v = (_last(x[0], lane, LANES), _last(x[1], lane, LANES)), (one, nothing)


@triton.jit
def _scan_sites(m_ptr, s_ptr, first, lane, length, back, SITES: tl.constexpr):
    """Return m, s and whether m is zero, as it is at the first site, for the sites of each lane."""
    sites = ()
    for k in tl.static_range(SITES):
        visited = first + lane * SITES + k
        inside = visited < length
        at = _at(visited, length, back)
        m = _pair(m_ptr, at, inside & (visited > 0), 0.0)
        sites += ((m, _pair(s_ptr, at, inside, 0.0), (m[0] == 0.0) & (m[1] == 0.0)),)
    return sites


@triton.jit
def _sums(sites, carried, lane, SITES: tl.constexpr):
    """Return the map of each lane and all before it in the block, the first lane's after what is carried."""
    zero = tl.zeros_like(sites[0][0][0])
    nothing = zero, zero
    factor, x = _where(lane == 0, carried[0:2], (zero + 1.0, zero)), _where(lane == 0, carried[2:4], nothing)
    forgets = tl.where(lane == 0, carried[4], 0.0)
    for k in tl.static_range(SITES):
        m, s, cut = sites[k]
        factor = _where(cut, nothing, _times_plus(m, factor, nothing))
        x = _where(cut, s, _times_plus(m, x, s))
        forgets = tl.where(cut, 1.0, forgets)
    return tl.associative_scan((factor[0], factor[1], x[0], x[1], forgets), 0, _then)


@triton.jit
def reduce_scan_kernel(
    m_ptr, s_ptr, product_ptr, chains, length, parts, span, backwards, SITES: tl.constexpr, LANES: tl.constexpr
):
    """Write A and x, such that one part (never the last) sends X to A X + x, and whether it forgets X."""
    sweep, chain, part, back, out = _place(parts - 1, chains, parts, backwards)
    m_ptr += (sweep.to(tl.int64) * chains + chain) * length * 2
    s_ptr += (sweep.to(tl.int64) * chains + chain) * length * 2
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float64)
    one = _last(zero + 1.0, lane, LANES)
    nothing = one - one
    carried = (one, nothing, nothing, nothing, nothing)
    for block in range(0, span, LANES * SITES):
        sites = _scan_sites(m_ptr, s_ptr, part * span + block, lane, length, back, SITES)
        found = _sums(sites, carried, lane, SITES)
        carried = (
            _last(found[0], lane, LANES), _last(found[1], lane, LANES), _last(found[2], lane, LANES),
            _last(found[3], lane, LANES), _last(found[4], lane, LANES),
        )  # fmt: skip
    for k in tl.static_range(5):
        tl.store(product_ptr + out * 5 + k, carried[k])


@triton.jit
def scan_kernel(
    m_ptr, s_ptr, product_ptr, x_ptr, chains, length, parts, span, backwards,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, SITES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the results of one part."""
    sweep, chain, part, back, out = _place(parts, chains, parts, backwards)
    own = (sweep.to(tl.int64) * chains + chain) * length * 2
    lane = tl.arange(0, LANES)
    zero = tl.zeros([LANES], tl.float64)
    one = _last(zero + 1.0, lane, LANES)
    nothing = one - one
    enters = nothing, nothing
    if SPLIT:
        each = tl.arange(0, PARTS)
        at, earlier = product_ptr + (out - part + each) * 5, each < part
        maps = ()
        for k in tl.static_range(5):
            maps += (tl.load(at + k, mask=earlier, other=1.0 if k == 0 else 0.0),)
        maps = tl.associative_scan(maps, 0, _then)
        enters = _last(maps[2], each, PARTS), _last(maps[3], each, PARTS)
    for block in range(0, span, LANES * SITES):
        first = part * span + block
        sites = _scan_sites(m_ptr + own, s_ptr + own, first, lane, length, back, SITES)
        found = _sums(sites, (nothing, nothing, enters[0], enters[1], one), lane, SITES)
        x = _entering(found[2], enters[0], lane), _entering(found[3], enters[1], lane)
        for k in tl.static_range(SITES):
            m, s, cut = sites[k]
            x = _where(cut, s, _times_plus(m, x, s))
            visited = first + lane * SITES + k
            _put(x_ptr + own, _at(visited, length, back), x, visited < length)
        enters = _last(x[0], lane, LANES), _last(x[1], lane, LANES)


def ratios(
    d: Tensor, beta: Tensor, reverse: Sequence[bool], parts: int | None = None, lanes: int | None = None
) -> Tensor:
    """Return the ratios (S, B, N) of d and β (B, N), complex, in the dtype of β.

    Args:
        d: h − z, of the dtype of β or in double precision, any strides.
        beta: β_i couples i and i + 1; the last entry is not read.
        reverse: for each sweep whether it runs from the last site to the first.
        parts: into how many parts a chain is cut at most; as many as fill the device by default.
        lanes: lanes of a block; by default the fewest that hold a chain.
    """
    found = torch.empty((len(reverse), *beta.shape), dtype=beta.dtype, device=beta.device)
    _run(
        (reduce_ratios_kernel, ratios_kernel),
        {"d_ptr": _pairs(d), "beta_ptr": _pairs(beta)},
        ("ratio_ptr", found),
        reverse,
        9,
        (parts, lanes),
    )
    return found


def linear_scan(
    m: Tensor, s: Tensor, reverse: Sequence[bool], parts: int | None = None, lanes: int | None = None
) -> Tensor:
    """Return x_i = s_i + m_i x_before (S, B, N); m = 0 starts afresh, and so does a sweep's first m.

    Args:
        m: multipliers, complex, any strides.
        s: sources.
        reverse: for each sweep whether it runs from the last site to the first.
        parts: as in ``ratios``.
        lanes: as in ``ratios``.
    """
    found = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    _run(
        (reduce_scan_kernel, scan_kernel),
        {"m_ptr": _pairs(m), "s_ptr": _pairs(s)},
        ("x_ptr", found),
        reverse,
        5,
        (parts, lanes),
    )
    return found


def _run(
    kernels: tuple[Any, Any],
    inputs: Mapping[str, Tensor],
    output: tuple[str, Tensor],
    reverse: Sequence[bool],
    numbers: int,
    cut: tuple[int | None, int | None],
) -> None:
    """Start the kernel that writes the output, and before it the one that reduces parts where there are some."""
    name, found = output
    sweeps, chains, length = found.shape
    if found.numel() == 0:
        return
    lanes = cut[1] or next((n for n in TILES if n * SITES >= length), max(TILES))
    blocks = -(-length // (lanes * SITES))
    span = -(-blocks // _parts(sweeps * chains, blocks, cut[0])) * lanes * SITES
    parts = -(-length // span)
    product = torch.empty((sweeps * chains, parts, numbers), dtype=torch.float64, device=found.device)
    shared = {
        **inputs, "product_ptr": product, "chains": chains, "length": length, "parts": parts, "span": span,
        "backwards": sum(int(backwards) << sweep for sweep, backwards in enumerate(reverse)), "SITES": SITES,
    }  # fmt: skip
    reduce_kernel, kernel = kernels
    if parts > 1:
        launch(reduce_kernel, TILES[lanes], lambda _: (sweeps * chains * (parts - 1),), shared)
    split = {"SPLIT": parts > 1, "PARTS": MOST_PARTS if parts > 1 else 1}
    launch(kernel, TILES[lanes], lambda _: (sweeps * chains * parts,), {**shared, name: _pairs(found), **split})


def _parts(rows: int, blocks: int, wanted: int | None) -> int:
    """Return into how many parts the blocks of a chain are cut."""
    if wanted is None:
        wanted = -(-PROGRAMS // rows)
        if min(wanted, blocks) < FEWEST_PARTS:
            return 1
    return min(wanted, blocks, MOST_PARTS)


def _pairs(x: Tensor) -> Tensor:
    """Return complex numbers as contiguous pairs of real ones."""
    return torch.view_as_real(x.resolve_conj().contiguous())
