"""Triton kernels of tensor-train rows, two and three cores, and their launchers.

    forward   y[t, a, b] = Σ_ρ c₁[i₁, ρ, a] c₂[i₂, ρ, b]
              y[t, a, b, c] = Σ_ρσ c₁[i₁, ρ, a] c₂[i₂, ρ, σ, b] c₃[i₃, σ, c]
    backward  dc_k[i, …] = Σ_{t: i_k(t) = i} ∂⟨dy_t, y_t⟩/∂c_k[i, …]

(i₁, i₂, …): parts of an id; ρ, σ: ranks; (a, b, c): parts of a feature, the last fastest, cropped to d_model. Nothing
is allocated but the output: slices of the cores are read where they lie, and sums over ranks stay in the program.

The backward sorts the ids once per core. A program owns CHUNK places of the sorted order inside one segment of equal
i_k: it sums dy over equal ids, contracts that sum once, and writes one partial gradient; a second kernel adds the
partials of a segment in order. So a frequent id is shared by many programs, no atomics are needed, and equal inputs
give equal bits. The atomic mode skips the sort and adds to the gradient as the hardware comes to it.

Half-precision slices go to the tensor cores as they are; products with a float32 intermediate are taken in three TF32
parts (exact for the half-precision factor, about 2⁻²¹ relative for the other). float32 is IEEE throughout.
Derivation: docs/math/tensor_train.md
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc, operator"
# Triton reads annotations and knows tl.constexpr only, so that kernels cannot carry ordinary types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import Tile, launch
from so8t_torch.core.rounding import rounded

CHUNK = 16
"""Places of the sorted order per program of the backward; more would serialise, fewer would write more partials."""


def _tile(warps: int, **sizes: int) -> Tile:
    return Tile(warps=warps, constants=sizes)


PAIR_ROWS_TILES = (
    _tile(4, TOKENS=4, A=16, B=64, R=16),
    _tile(4, TOKENS=2, A=64, B=64, R=16),
    _tile(4, TOKENS=4, A=32, B=32, R=32),
)
TRIPLE_ROWS_TILES = (
    _tile(4, TOKENS=1, A=16, B=16, C=16, R=16),
    _tile(8, TOKENS=2, A=16, B=16, C=16, R=16),
)
PAIR_GRADIENT_TILES = {
    2: (_tile(4, OWN=16, OTHER=64, R=16), _tile(4, OWN=64, OTHER=16, R=16)),
    4: (_tile(8, OWN=32, OTHER=64, R=16), _tile(4, OWN=64, OTHER=32, R=16)),
}
"""Bytes per element → tiles."""
END_GRADIENT_TILES = {
    2: (_tile(4, OWN=16, MIDDLE=8, FAR=16, R=16, Q=16),),
    4: (_tile(4, OWN=16, MIDDLE=16, FAR=16, R=16, Q=16),),
}
MIDDLE_GRADIENT_TILES = {size: (_tile(8, A=16, B=16, C=16, R=16, Q=16),) for size in (2, 4)}
REDUCE_TILES = (_tile(4, ROWS=4, BLOCK=512),)
"""One entry: another number of rows would add in another order."""
PARTNERS = {2: ((1,), (0,)), 3: ((1, 2), (0, 2), (1, 0))}
"""Number of cores → core → the others in the order in which a key carries their parts."""


@triton.jit
def fetch(at, in_range, INTERPRETED: tl.constexpr):
    """Load with zeros outside; float32 in the interpreter, whose bfloat16 arithmetic is not to be used."""
    x = tl.load(at, mask=in_range, other=0.0)
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def product(x, y, total, dtype: tl.constexpr):
    """Return total + x y in float32; two operands of the half type ``dtype`` stay what they are."""
    if x.dtype == y.dtype and x.dtype != tl.float32:
        total = tl.dot(x, y, total)
    elif dtype == tl.float32:
        total = tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="tf32x3")
    return total


@triton.jit
def pair_rows_kernel(
    i1_ptr, i2_ptr, c1_ptr, c2_ptr, y_ptr, count, v1, rank, d1, d2, d_model,
    TOKENS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[t, a, b] for TOKENS tokens and A × B features; i₁ = −1 is a row of zeros, others outside [0, v₁) are NaN."""
    dtype: tl.constexpr = c1_ptr.dtype.element_ty
    a = tl.program_id(1) * A + tl.arange(0, A)[:, None]
    b = tl.program_id(2) * B + tl.arange(0, B)[None, :]
    feature = a * d2 + b
    kept = (a < d1) & (b < d2) & (feature < d_model)
    for n in range(TOKENS):
        t = tl.program_id(0) * TOKENS + n
        in_range = t < count
        i1 = tl.load(i1_ptr + t, mask=in_range, other=-1).to(tl.int64)
        i2 = tl.load(i2_ptr + t, mask=in_range, other=0).to(tl.int64)
        known = (i1 >= 0) & (i1 < v1)
        y = tl.zeros([A, B], tl.float32)
        for first in range(0, rank, R):
            r = first + tl.arange(0, R)
            at1 = c1_ptr + (i1 * rank + r[None, :]) * d1 + a
            at2 = c2_ptr + (i2 * rank + r[:, None]) * d2 + b
            x1 = fetch(at1, (a < d1) & (r < rank)[None, :] & known, INTERPRETED)
            x2 = fetch(at2, (b < d2) & (r < rank)[:, None] & known, INTERPRETED)
            y = product(x1, x2, y, dtype)
        y = tl.where(known | (i1 == -1), y, float("nan"))
        tl.store(y_ptr + t.to(tl.int64) * d_model + feature, rounded(y, dtype, INTERPRETED), mask=kept & in_range)


@triton.jit
def triple_rows_kernel(
    i1_ptr, i2_ptr, i3_ptr, c1_ptr, c2_ptr, c3_ptr, y_ptr, count, v1, r1, r2, d1, d2, d3, d_model,
    TOKENS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[t, a, b, c] for TOKENS tokens and A × B × C features, by (c₁ᵀ c₂)[(a b), σ] c₃[σ, c]."""
    dtype: tl.constexpr = c1_ptr.dtype.element_ty
    a0 = tl.program_id(1) * A
    b0 = (tl.program_id(2) % tl.cdiv(d2, B)) * B
    c = (tl.program_id(2) // tl.cdiv(d2, B)) * C + tl.arange(0, C)[None, :]
    a = (a0 + tl.arange(0, A * B) // B)[:, None]
    b = (b0 + tl.arange(0, A * B) % B)[:, None]
    feature = (a * d2 + b) * d3 + c
    kept = (a < d1) & (b < d2) & (c < d3) & (feature < d_model)
    a1 = a0 + tl.arange(0, A)[:, None]
    b2 = (b0 + tl.arange(0, B * R) % B)[None, :]
    for n in range(TOKENS):
        t = tl.program_id(0) * TOKENS + n
        in_range = t < count
        i1 = tl.load(i1_ptr + t, mask=in_range, other=-1).to(tl.int64)
        i2 = tl.load(i2_ptr + t, mask=in_range, other=0).to(tl.int64)
        i3 = tl.load(i3_ptr + t, mask=in_range, other=0).to(tl.int64)
        known = (i1 >= 0) & (i1 < v1)
        y = tl.zeros([A * B, C], tl.float32)
        for s0 in range(0, r2, R):
            s2 = s0 + (tl.arange(0, B * R) // B)[None, :]
            left = tl.zeros([A, B * R], tl.float32)
            for first in range(0, r1, R):
                r = first + tl.arange(0, R)
                at1 = c1_ptr + (i1 * r1 + r[None, :]) * d1 + a1
                at2 = c2_ptr + ((i2 * r1 + r[:, None]) * r2 + s2) * d2 + b2
                x1 = fetch(at1, (a1 < d1) & (r < r1)[None, :] & known, INTERPRETED)
                x2 = fetch(at2, (b2 < d2) & (s2 < r2) & (r < r1)[:, None] & known, INTERPRETED)
                left = product(x1, x2, left, dtype)
            s = (s0 + tl.arange(0, R))[:, None]
            x3 = fetch(c3_ptr + (i3 * r2 + s) * d3 + c, (c < d3) & (s < r2) & known, INTERPRETED)
            left = tl.permute(tl.reshape(left, [A, R, B]), (0, 2, 1))
            y = product(tl.reshape(left, [A * B, R]), x3, y, dtype)
        y = tl.where(known | (i1 == -1), y, float("nan"))
        tl.store(y_ptr + t.to(tl.int64) * d_model + feature, rounded(y, dtype, INTERPRETED), mask=kept & in_range)


@triton.jit
def _places(starts_ptr, count, segments, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, ATOMIC: tl.constexpr):
    """Return the first place and the end of this program's chunk, end ≤ first where it has none.

    The chunks of segment i begin at index start_i // CHUNK + i: there is room for each, and no scan is needed to know.
    """
    chunk = tl.program_id(0)
    if ATOMIC:
        begin = chunk * CHUNK
        end = tl.minimum(begin + CHUNK, count)
    else:
        i = tl.arange(0, SEGMENTS)
        start = tl.load(starts_ptr + i, mask=i < segments, other=0)
        owner = tl.sum(((start // CHUNK + i <= chunk) & (i < segments)).to(tl.int32), 0) - 1
        start = tl.load(starts_ptr + owner)
        begin = start + (chunk - start // CHUNK - owner) * CHUNK
        end = tl.minimum(begin + CHUNK, tl.load(starts_ptr + owner + 1))
    return begin, end


@triton.jit
def _run(keys_ptr, place, end, CHUNK: tl.constexpr, ATOMIC: tl.constexpr):
    """Return the key at a place and where its run of equal keys ends."""
    key = tl.load(keys_ptr + place)
    stop = place + 1
    if not ATOMIC:
        q = place + tl.arange(0, CHUNK)
        stop = place + tl.sum((tl.load(keys_ptr + q, mask=q < end, other=-1) == key).to(tl.int32), 0)
    return key, stop


@triton.jit
def _gathered(dy_ptr, order_ptr, place, stop, d_model, feature, kept, ATOMIC: tl.constexpr):
    """Return Σ dy[t, feature] in float32 over the tokens at the places of one run."""
    total = tl.zeros(feature.shape, tl.float32)
    if ATOMIC:
        total += tl.load(dy_ptr + place.to(tl.int64) * d_model + feature, mask=kept, other=0.0).to(tl.float32)
    else:
        for q in range(place, stop):
            t = tl.load(order_ptr + q)
            total += tl.load(dy_ptr + t * d_model + feature, mask=kept, other=0.0).to(tl.float32)
    return total


@triton.jit
def _deliver(out_ptr, owner, size, offsets, share, in_range, ATOMIC: tl.constexpr):
    """Add to the owner's gradient in the atomic mode, else write this program's partial."""
    if ATOMIC:
        tl.atomic_add(out_ptr + owner * size + offsets, share, mask=in_range & (owner >= 0), sem="relaxed")
    else:
        tl.store(out_ptr + tl.program_id(0).to(tl.int64) * size + offsets, share, mask=in_range)


@triton.jit
def pair_gradient_kernel(
    keys_ptr, order_ptr, starts_ptr, dy_ptr, other_ptr, out_ptr, count, segments, partners,
    rank, own, other, stride_own, stride_other, d_model,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, ATOMIC: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, R: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A chunk's share of dc[i, ρ, o] = Σ_t Σ_w c'[i', ρ, w] dy[t, o, w], c' the other core."""
    dtype: tl.constexpr = other_ptr.dtype.element_ty
    place, end = _places(starts_ptr, count, segments, CHUNK, SEGMENTS, ATOMIC)
    if place >= end:
        return
    o = tl.program_id(1) * OWN + tl.arange(0, OWN)[None, :]
    r = tl.program_id(2) * R + tl.arange(0, R)[:, None]
    inside = (o < own) & (r < rank)
    share = tl.zeros([R, OWN], tl.float32)
    while place < end:
        key, stop = _run(keys_ptr, place, end, CHUNK, ATOMIC)
        for first in range(0, other, OTHER):
            w = first + tl.arange(0, OTHER)
            feature = o * stride_own + w[:, None] * stride_other
            kept = (o < own) & (w < other)[:, None] & (feature < d_model) & (key >= 0)
            dy = _gathered(dy_ptr, order_ptr, place, stop, d_model, feature, kept, ATOMIC)
            at = other_ptr + ((key % partners) * rank + r) * other + w[None, :]
            x = fetch(at, (r < rank) & (w < other)[None, :] & (key >= 0), INTERPRETED)
            share = product(x, dy, share, dtype)
        if ATOMIC:
            _deliver(out_ptr, key // partners, rank * own, r * own + o, share, inside & (key >= 0), ATOMIC)
            share = tl.zeros([R, OWN], tl.float32)
        place = stop
    if not ATOMIC:
        _deliver(out_ptr, 0, rank * own, r * own + o, share, inside, ATOMIC)


@triton.jit
def end_gradient_kernel(
    keys_ptr, order_ptr, starts_ptr, dy_ptr, middle_ptr, far_ptr, out_ptr, count, segments, near, distant,
    rank, far_rank, own, middle, far, stride_rank, stride_far_rank, stride_own, stride_middle, stride_far, d_model,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, ATOMIC: tl.constexpr,
    OWN: tl.constexpr, MIDDLE: tl.constexpr, FAR: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A chunk's share of dc[i, ρ, o] = Σ_t Σ_mf (Σ_σ c₂[i₂, ρ, σ, m] c'[i', σ, f]) dy[t, o, m, f], c' the far core.

    The first and the last core are the same case read from either end. Keys are (i, i₂, i') in mixed base.
    """
    dtype: tl.constexpr = far_ptr.dtype.element_ty
    place, end = _places(starts_ptr, count, segments, CHUNK, SEGMENTS, ATOMIC)
    if place >= end:
        return
    o = tl.program_id(1) * OWN + tl.arange(0, OWN)[None, :]
    r = tl.program_id(2) * R + tl.arange(0, R)[:, None]
    inside = (o < own) & (r < rank)
    r_row = (tl.program_id(2) * R + tl.arange(0, R * MIDDLE) // MIDDLE)[:, None]
    share = tl.zeros([R, OWN], tl.float32)
    while place < end:
        key, stop = _run(keys_ptr, place, end, CHUNK, ATOMIC)
        i2 = (key // distant) % near
        for step in range(tl.cdiv(middle, MIDDLE) * tl.cdiv(far, FAR)):
            m0 = (step // tl.cdiv(far, FAR)) * MIDDLE
            f0 = (step % tl.cdiv(far, FAR)) * FAR
            m_row = (m0 + tl.arange(0, R * MIDDLE) % MIDDLE)[:, None]
            f = (f0 + tl.arange(0, FAR))[None, :]
            tail = tl.zeros([R * MIDDLE, FAR], tl.float32)
            for first in range(0, far_rank, Q):
                s = first + tl.arange(0, Q)
                at2 = middle_ptr + i2 * rank * far_rank * middle
                at2 += r_row * stride_rank + s[None, :] * stride_far_rank + m_row
                x2 = fetch(at2, (r_row < rank) & (s < far_rank)[None, :] & (m_row < middle) & (key >= 0), INTERPRETED)
                at3 = far_ptr + ((key % distant) * far_rank + s[:, None]) * far + f
                x3 = fetch(at3, (s < far_rank)[:, None] & (f < far) & (key >= 0), INTERPRETED)
                tail = product(x2, x3, tail, dtype)
            m = (m0 + tl.arange(0, MIDDLE * FAR) // FAR)[:, None]
            f = (f0 + tl.arange(0, MIDDLE * FAR) % FAR)[:, None]
            feature = o * stride_own + m * stride_middle + f * stride_far
            kept = (o < own) & (m < middle) & (f < far) & (feature < d_model) & (key >= 0)
            dy = _gathered(dy_ptr, order_ptr, place, stop, d_model, feature, kept, ATOMIC)
            share = product(tl.reshape(tail, [R, MIDDLE * FAR]), dy, share, dtype)
        if ATOMIC:
            owner = key // (near * distant)
            _deliver(out_ptr, owner, rank * own, r * own + o, share, inside & (key >= 0), ATOMIC)
            share = tl.zeros([R, OWN], tl.float32)
        place = stop
    if not ATOMIC:
        _deliver(out_ptr, 0, rank * own, r * own + o, share, inside, ATOMIC)


@triton.jit
def middle_gradient_kernel(
    keys_ptr, order_ptr, starts_ptr, dy_ptr, c1_ptr, c3_ptr, out_ptr, count, segments, v1, v3,
    r1, r2, d1, d2, d3, d_model,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, ATOMIC: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A chunk's share of dc₂[i, ρ, σ, b] = Σ_t Σ_c (Σ_a c₁[i₁, ρ, a] dy[t, a, b, c]) c₃[i₃, σ, c].

    Keys are (i, i₁, i₃) in mixed base.
    """
    dtype: tl.constexpr = c1_ptr.dtype.element_ty
    place, end = _places(starts_ptr, count, segments, CHUNK, SEGMENTS, ATOMIC)
    if place >= end:
        return
    b0 = tl.program_id(1) * B
    r0 = (tl.program_id(2) % tl.cdiv(r1, R)) * R
    s = (tl.program_id(2) // tl.cdiv(r1, R)) * Q + tl.arange(0, Q)[None, :]
    r_row = (r0 + tl.arange(0, R * B) // B)[:, None]
    b_row = (b0 + tl.arange(0, R * B) % B)[:, None]
    inside = (r_row < r1) & (b_row < d2) & (s < r2)
    offsets = (r_row * r2 + s) * d2 + b_row
    share = tl.zeros([R * B, Q], tl.float32)
    while place < end:
        key, stop = _run(keys_ptr, place, end, CHUNK, ATOMIC)
        i1 = (key // v3) % v1
        for c0 in range(0, d3, C):
            b = (b0 + tl.arange(0, B * C) // C)[None, :]
            c = (c0 + tl.arange(0, B * C) % C)[None, :]
            head = tl.zeros([R, B * C], tl.float32)
            for a0 in range(0, d1, A):
                a = a0 + tl.arange(0, A)
                feature = (a[:, None] * d2 + b) * d3 + c
                kept = (a < d1)[:, None] & (b < d2) & (c < d3) & (feature < d_model) & (key >= 0)
                dy = _gathered(dy_ptr, order_ptr, place, stop, d_model, feature, kept, ATOMIC)
                r = r0 + tl.arange(0, R)[:, None]
                x1 = fetch(
                    c1_ptr + (i1 * r1 + r) * d1 + a[None, :], (r < r1) & (a < d1)[None, :] & (key >= 0), INTERPRETED
                )
                head = product(x1, dy, head, dtype)
            c = (c0 + tl.arange(0, C))[:, None]
            at3 = c3_ptr + ((key % v3) * r2 + s) * d3 + c
            x3 = fetch(at3, (s < r2) & (c < d3) & (key >= 0), INTERPRETED)
            share = product(tl.reshape(head, [R * B, C]), x3, share, dtype)
        if ATOMIC:
            _deliver(out_ptr, key // (v1 * v3), r1 * r2 * d2, offsets, share, inside & (key >= 0), ATOMIC)
            share = tl.zeros([R * B, Q], tl.float32)
        place = stop
    if not ATOMIC:
        _deliver(out_ptr, 0, r1 * r2 * d2, offsets, share, inside, ATOMIC)


@triton.jit
def reduce_kernel(partial_ptr, starts_ptr, out_ptr, size, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ of the partials of segment i, in order; zero where there are none."""
    i = tl.program_id(0)
    start = tl.load(starts_ptr + i)
    first = start // CHUNK + i
    chunks = tl.cdiv(tl.load(starts_ptr + i + 1) - start, CHUNK)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for n in range(0, chunks, ROWS):
        row = n + tl.arange(0, ROWS)[:, None]
        offsets = (first + row).to(tl.int64) * size + at
        total += tl.load(partial_ptr + offsets, mask=(row < chunks) & (at < size), other=0.0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i.to(tl.int64) * size + at, tl.sum(total, 0), mask=at < size)


def rows(ids_parts: tuple[Tensor, ...], cores: tuple[Tensor, ...], d_model: int) -> Tensor:
    """Return rows (T, d_model) in the dtype of the cores.

    Args:
        ids_parts: i_k (T,) per core, integers; i₁ = −1 asks for a row of zeros, others outside [0, v₁) give NaN.
        cores: two or three real cores (v_k, r_{k−1}, r_k, d_k) of one dtype: float32, bfloat16 or float16.
        d_model: features kept.
    """
    parts = [part.contiguous() for part in ids_parts]
    cores = tuple(core.contiguous() for core in cores)
    count = parts[0].shape[0]
    y = torch.empty((count, d_model), dtype=cores[0].dtype, device=cores[0].device)
    if not y.numel():
        return y
    d = [core.shape[3] for core in cores]
    tensors = {f"i{k}_ptr": part for k, part in enumerate(parts, 1)}
    tensors |= {f"c{k}_ptr": core for k, core in enumerate(cores, 1)}
    sizes = {
        "count": count,
        "v1": cores[0].shape[0],
        "d1": d[0],
        "d2": d[1],
        "d_model": d_model,
        "INTERPRETED": interpreting(),
    }
    if len(cores) == 2:
        launch(
            pair_rows_kernel,
            PAIR_ROWS_TILES,
            lambda tile: (
                triton.cdiv(count, tile["TOKENS"]),
                triton.cdiv(d[0], tile["A"]),
                triton.cdiv(d[1], tile["B"]),
            ),
            {**tensors, "y_ptr": y, **sizes, "rank": cores[0].shape[2]},
            tune_on=("count", "rank", "d1", "d2"),
        )
        return y
    launch(
        triple_rows_kernel,
        TRIPLE_ROWS_TILES,
        lambda tile: (
            triton.cdiv(count, tile["TOKENS"]),
            triton.cdiv(d[0], tile["A"]),
            triton.cdiv(d[1], tile["B"]) * triton.cdiv(d[2], tile["C"]),
        ),
        {**tensors, "y_ptr": y, **sizes, "d3": d[2], "r1": cores[0].shape[2], "r2": cores[1].shape[2]},
        tune_on=("count", "r1", "r2", "d1", "d2", "d3"),
    )
    return y


def rows_backward(
    dy: Tensor, ids_parts: tuple[Tensor, ...], cores: tuple[Tensor, ...], atomic: bool = False
) -> tuple[Tensor, ...]:
    """Return the float32 gradients of the cores.

    Args:
        dy: gradient of the rows (T, d_model), in the dtype of the cores or float32.
        ids_parts: as in ``rows``; tokens whose i₁ is outside [0, v₁) give no gradient.
        cores: as in ``rows``.
        atomic: add without sorting; faster, and the last bits depend on the order in which programs finish.
    """
    dy, cores = dy.contiguous(), tuple(core.contiguous() for core in cores)
    return tuple(_core_gradient(k, dy, ids_parts, cores, atomic) for k in range(len(cores)))


def _core_gradient(
    k: int, dy: Tensor, ids_parts: tuple[Tensor, ...], cores: tuple[Tensor, ...], atomic: bool
) -> Tensor:
    """Return the gradient of core k, by partials and their ordered sums or by atomics."""
    core, count = cores[k], dy.shape[0]
    owners, size = core.shape[0], core[0].numel()
    if not (count and size and owners):
        return torch.zeros(core.shape, dtype=torch.float32, device=core.device)
    gradient = (torch.zeros if atomic else torch.empty)(core.shape, dtype=torch.float32, device=core.device)
    keys, partners = _keys(k, ids_parts, cores)
    plan: dict[str, Any] = {"keys_ptr": keys, "order_ptr": keys, "starts_ptr": keys, "out_ptr": gradient}
    programs = triton.cdiv(count, CHUNK)
    if not atomic:
        keys, order = torch.sort(torch.where(keys < 0, owners * partners, keys), stable=True)
        bounds = torch.arange(owners + 1, device=keys.device) * partners
        starts = torch.searchsorted(keys, bounds, out_int32=True)
        programs = count // CHUNK + owners
        partial = torch.empty((programs, size), dtype=torch.float32, device=core.device)
        plan = {"keys_ptr": keys, "order_ptr": order, "starts_ptr": starts, "out_ptr": partial}
    plan |= {
        "dy_ptr": dy, "count": count, "segments": owners, "d_model": dy.shape[1], "CHUNK": CHUNK,
        "SEGMENTS": triton.next_power_of_2(owners), "ATOMIC": atomic, "INTERPRETED": interpreting(),
    }  # fmt: skip
    _launch_gradient(k, cores, programs, plan)
    if not atomic:
        launch(
            reduce_kernel,
            REDUCE_TILES,
            lambda tile: (owners, triton.cdiv(size, tile["BLOCK"])),
            {"partial_ptr": partial, "starts_ptr": starts, "out_ptr": gradient, "size": size, "CHUNK": CHUNK},
        )
    return gradient


def _keys(k: int, ids_parts: tuple[Tensor, ...], cores: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """Return one number per token, i_k first and the other parts after it, −1 for no id; and the partners per i_k."""
    keys, partners = ids_parts[k].to(torch.int64), 1
    for j in PARTNERS[len(cores)][k]:
        keys, partners = keys * cores[j].shape[0] + ids_parts[j], partners * cores[j].shape[0]
    known = (ids_parts[0] >= 0) & (ids_parts[0] < cores[0].shape[0])
    return torch.where(known, keys, -1), partners


def _launch_gradient(k: int, cores: tuple[Tensor, ...], programs: int, plan: dict[str, Any]) -> None:
    """Start the kernel of core k."""
    v, d = [core.shape[0] for core in cores], [core.shape[3] for core in cores]
    size, restore = cores[0].element_size(), ("out_ptr",) if plan["ATOMIC"] else ()
    if len(cores) == 2:
        rank, other = cores[0].shape[2], 1 - k
        sizes = {
            "other_ptr": cores[other], "partners": v[other], "rank": rank, "own": d[k], "other": d[other],
            "stride_own": d[1] if k == 0 else 1, "stride_other": 1 if k == 0 else d[1],
        }  # fmt: skip
        launch(
            pair_gradient_kernel,
            PAIR_GRADIENT_TILES[size],
            lambda tile: (programs, triton.cdiv(d[k], tile["OWN"]), triton.cdiv(rank, tile["R"])),
            {**plan, **sizes},
            tune_on=("count", "rank", "own", "other"),
            restore=restore,
        )
        return
    r1, r2 = cores[0].shape[2], cores[1].shape[2]
    if k == 1:
        sizes = {
            "c1_ptr": cores[0], "c3_ptr": cores[2], "v1": v[0], "v3": v[2], "r1": r1, "r2": r2,
            "d1": d[0], "d2": d[1], "d3": d[2],
        }  # fmt: skip
        launch(
            middle_gradient_kernel,
            MIDDLE_GRADIENT_TILES[size],
            lambda tile: (
                programs,
                triton.cdiv(d[1], tile["B"]),
                triton.cdiv(r1, tile["R"]) * triton.cdiv(r2, tile["Q"]),
            ),
            {**plan, **sizes},
            tune_on=("count", "r1", "r2", "d1", "d2", "d3"),
            restore=restore,
        )
        return
    rank, far_rank = (r1, r2) if k == 0 else (r2, r1)
    strides, far = ((r2 * d[1], d[1]), 2) if k == 0 else ((d[1], r2 * d[1]), 0)
    sizes = {
        "middle_ptr": cores[1], "far_ptr": cores[far], "near": v[1], "distant": v[far], "rank": rank,
        "far_rank": far_rank, "own": d[k], "middle": d[1], "far": d[far], "stride_rank": strides[0],
        "stride_far_rank": strides[1], "stride_own": d[1] * d[2] if k == 0 else 1, "stride_middle": d[2],
        "stride_far": 1 if k == 0 else d[1] * d[2],
    }  # fmt: skip
    launch(
        end_gradient_kernel,
        END_GRADIENT_TILES[size],
        lambda tile: (programs, triton.cdiv(d[k], tile["OWN"]), triton.cdiv(rank, tile["R"])),
        {**plan, **sizes},
        tune_on=("count", "rank", "far_rank", "own", "middle", "far"),
        restore=restore,
    )
