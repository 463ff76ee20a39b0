"""Triton kernels of the second difference: each program walks down a strip of tokens, keeping the stencil in registers.

    forward   partial[b, k, j] = Σ_{t in strip k, d in columns j} v_t ρ(h_{t+1} − 2h_t + h_{t−1})
    backward  dh_s = 2 grad_b (c_{s−1} − 2c_s + c_{s+1}),   c_t = v_t clip(u_t, −δ, δ)

Every token of a strip is read once, two (forward) or four (backward) more at its ends; no temporary is written. The
partial sums are added by a second, ordered reduction, so the result does not depend on scheduling.
"""

# Triton reads a kernel's annotations itself: only ``tl.constexpr`` may stand there.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import Tile, launch
from so8t_torch.core.precision import accumulation_dtype


def _tile(rows: int, warps: int, itemsize: int) -> Tile:
    """Return a strip of so many tokens in which a thread holds sixteen bytes of each: one load or store."""
    return Tile(warps=warps, constants={"ROWS": rows, "BLOCK": 512 * warps // itemsize})


ENERGY_TILES = {size: (_tile(16, 4, size),) for size in (2, 4, 8)}
"""Bytes per element → tiles. A strip is one partial sum, so there is one tile: another would round otherwise."""
GRADIENT_TILES = {size: (_tile(16, 4, size), _tile(8, 8, size)) for size in (2, 4, 8)}
"""Bytes per element → tiles. An element of the gradient is the same expression in each."""


@triton.jit
def _row(h_ptr, t, length, stride_t, in_range, dtype: tl.constexpr):
    """Return the channels of token t in the accumulation dtype, 0 outside the sequence."""
    x = tl.load(h_ptr + t.to(tl.int64) * stride_t, mask=in_range & (t >= 0) & (t < length), other=0.0)
    return x.to(dtype)


@triton.jit
def _clip(u, DELTA: tl.constexpr):
    """Return clip(u, −δ, δ), u itself for δ = 0; NaN stays NaN because comparisons with it are false."""
    if DELTA > 0.0:
        limit = tl.full(u.shape, DELTA, u.dtype)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    return u


@triton.jit
def _centre(valid_ptr, t, length, u):
    """Return u where token t is a centre, else 0, whatever u is."""
    valid = tl.load(valid_ptr + t, mask=(t >= 0) & (t < length), other=0)
    return tl.where(valid != 0, u, tl.zeros_like(u))


@triton.jit
def energy_kernel(
    h_ptr,
    valid_ptr,
    partial_ptr,
    length,
    width,
    stride_b,
    stride_t,
    stride_d,
    DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum ρ(Δ²h) over ROWS centres and BLOCK channels of one sequence."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    strips = tl.cdiv(length - 2, ROWS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS + 1
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < width
    h_ptr += b * stride_b + columns * stride_d
    valid_ptr += b * length
    before = _row(h_ptr, first - 1, length, stride_t, in_range, dtype)
    here = _row(h_ptr, first, length, stride_t, in_range, dtype)
    total = tl.zeros([BLOCK], dtype)
    for i in tl.static_range(ROWS):
        after = _row(h_ptr, first + i + 1, length, stride_t, in_range, dtype)
        u = after - 2.0 * here + before
        c = _clip(u, DELTA)
        total += _centre(valid_ptr, first + i, length, c * (2.0 * u - c))
        before = here
        here = after
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def gradient_kernel(
    grad_ptr,
    h_ptr,
    valid_ptr,
    dh_ptr,
    length,
    width,
    stride_g,
    stride_b,
    stride_t,
    stride_d,
    FLOAT64: tl.constexpr,
    DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dh = 2 grad Δ²(v c) for ROWS tokens and BLOCK channels of one sequence."""
    dtype: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    strips = tl.cdiv(length, ROWS)
    b = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < width
    scale = (2.0 * tl.load(grad_ptr + b * stride_g)).to(dtype)
    h_ptr += b * stride_b + columns * stride_d
    dh_ptr += b * length * width + columns
    valid_ptr += b * length
    left = _row(h_ptr, first - 1, length, stride_t, in_range, dtype)
    here = _row(h_ptr, first, length, stride_t, in_range, dtype)
    right = _row(h_ptr, first + 1, length, stride_t, in_range, dtype)
    u = here - 2.0 * left + _row(h_ptr, first - 2, length, stride_t, in_range, dtype)
    c_left = _centre(valid_ptr, first - 1, length, _clip(u, DELTA))
    c_here = _centre(valid_ptr, first, length, _clip(right - 2.0 * here + left, DELTA))
    for i in tl.static_range(ROWS):
        s = first + i
        after = _row(h_ptr, s + 2, length, stride_t, in_range, dtype)
        c_right = _centre(valid_ptr, s + 1, length, _clip(after - 2.0 * right + here, DELTA))
        dh = scale * (c_right - 2.0 * c_here + c_left)
        tl.store(dh_ptr + s.to(tl.int64) * width, dh.to(dh_ptr.dtype.element_ty), mask=in_range & (s < length))
        here = right
        right = after
        c_left = c_here
        c_here = c_right


def energy(h: Tensor, valid: Tensor, delta: float) -> Tensor:
    """Return E (B,) in float64 of h (B, T, D), any strides."""
    batch, length, width = h.shape
    tiles = ENERGY_TILES[h.element_size()]
    strips = triton.cdiv(max(length - 2, 0), tiles[0].constants["ROWS"])
    columns = triton.cdiv(width, tiles[0].constants["BLOCK"])
    partial = torch.empty((batch, strips, columns), dtype=accumulation_dtype(h.dtype), device=h.device)
    if partial.numel():
        arguments = {
            "h_ptr": h, "valid_ptr": _flags(valid), "partial_ptr": partial, "length": length, "width": width,
            **_strides(h), "DELTA": delta,
        }  # fmt: skip
        launch(energy_kernel, tiles, lambda _: (batch * strips, columns), arguments)
    return partial.sum((1, 2), dtype=torch.float64)


def gradient(grad: Tensor, h: Tensor, valid: Tensor, delta: float) -> Tensor:
    """Return grad_b · ∂E_b/∂h (B, T, D), contiguous."""
    batch, length, width = h.shape
    # The interpreter truncates when it stores bfloat16; let PyTorch round there.
    stored = accumulation_dtype(h.dtype) if interpreting() else h.dtype
    dh = torch.empty(h.shape, dtype=stored, device=h.device)
    if dh.numel():
        arguments = {
            "grad_ptr": grad, "h_ptr": h, "valid_ptr": _flags(valid), "dh_ptr": dh, "length": length, "width": width,
            "stride_g": grad.stride(0), **_strides(h), "FLOAT64": h.dtype == torch.float64, "DELTA": delta,
        }  # fmt: skip
        launch(
            gradient_kernel,
            GRADIENT_TILES[h.element_size()],
            lambda tile: (batch * triton.cdiv(length, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"])),
            arguments,
            tune_on=("length", "width"),
        )
    return dh.to(h.dtype)


def _strides(h: Tensor) -> dict[str, int]:
    """Return the strides of (B, T, D) by the kernels' names."""
    return dict(zip(("stride_b", "stride_t", "stride_d"), h.stride(), strict=True))


def _flags(valid: Tensor) -> Tensor:
    """Return the centres as contiguous bytes."""
    return valid.contiguous().view(torch.uint8)
