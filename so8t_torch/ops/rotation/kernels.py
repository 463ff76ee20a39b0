"""Triton kernels of the rotation and their launchers.

A program owns BLOCKS consecutive blocks of eight channels and walks over rows with its rotations in registers, so
that one 8-vector of a 2-byte dtype is one 16-byte load, 64 multiply-adds and one 16-byte store. Column j of a tile is
isolated by a select and an in-thread sum: a select, not a product with zero, so that a non-finite value stays in its
own block. The gradient of the rotations is summed in float32 in a fixed order: per thread, across the warps of a
program, then across programs by one small reduction. No atomics, so that equal inputs give equal bits.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# Triton reads annotations and knows tl.constexpr only, so that kernels cannot carry ordinary types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import Tile, launch
from so8t_torch.core.rounding import rounded

FORWARD_TILES = (
    Tile(warps=4, constants={"ROWS": 4, "BLOCKS": 32}),
    Tile(warps=4, constants={"ROWS": 8, "BLOCKS": 32}),
    Tile(warps=1, constants={"ROWS": 1, "BLOCKS": 32}),
    Tile(warps=1, constants={"ROWS": 2, "BLOCKS": 32}),
)
BACKWARD_TILES = (
    Tile(warps=4, constants={"ROWS": 4, "BLOCKS": 32}),
    Tile(warps=8, constants={"ROWS": 8, "BLOCKS": 32}),
    Tile(warps=2, constants={"ROWS": 2, "BLOCKS": 32}),
)
PROGRAMS_PER_PROCESSOR = 4
"""Programs of four warps that fit on one multiprocessor at the kernels' 100 to 170 registers per thread."""


@triton.jit
def _column(tile, j: tl.constexpr):
    """Return column j of [rows, blocks, 8] with a last axis of one."""
    return tl.sum(tl.where(tl.arange(0, 8)[None, None, :] == j, tile, 0.0), axis=2, keep_dims=True)


@triton.jit
def forward_kernel(
    rotation_ptr, x_ptr, y_ptr, rows, blocks, rotation_stride,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[t, k, i] = Σ_j R[k, i, j] x[t, k, j]."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    i = tl.arange(0, 8)[None, None, :]
    block_in_range = block < blocks
    columns = ()
    for j in tl.static_range(8):
        at = rotation_ptr + block * rotation_stride + i * 8 + j
        columns = columns + (tl.load(at, mask=block_in_range, other=0.0),)  # noqa: RUF005
    for start in range(tl.program_id(1) * ROWS, rows, ROWS * tl.num_programs(1)):
        row = start + tl.arange(0, ROWS)[:, None, None]
        offsets = (row.to(tl.int64) * blocks + block) * 8 + i
        in_range = (row < rows) & block_in_range
        x = tl.load(x_ptr + offsets, mask=in_range, other=0.0).to(tl.float32)
        y = columns[0] * _column(x, 0)
        for j in tl.static_range(1, 8):
            y += columns[j] * _column(x, j)
        tl.store(y_ptr + offsets, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), mask=in_range)


@triton.jit
def backward_kernel(
    rotation_ptr, x_ptr, dy_ptr, dx_ptr, partial_ptr, rows, blocks,
    rotation_stride, ROWS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dx[t, k, j] = Σ_i R[k, i, j] dy[t, k, i] and this program's share of dR[k, i, j] = Σ_t dy[t, k, i] x[t, k, j]."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    j = tl.arange(0, 8)[None, None, :]
    block_in_range = block < blocks
    rotation_rows = ()
    sums = ()
    for i in tl.static_range(8):
        at = rotation_ptr + block * rotation_stride + i * 8 + j
        rotation_rows = rotation_rows + (tl.load(at, mask=block_in_range, other=0.0),)  # noqa: RUF005
        sums = sums + (tl.zeros([ROWS, BLOCKS, 8], tl.float32),)  # noqa: RUF005
    for start in range(tl.program_id(1) * ROWS, rows, ROWS * tl.num_programs(1)):
        row = start + tl.arange(0, ROWS)[:, None, None]
        offsets = (row.to(tl.int64) * blocks + block) * 8 + j
        in_range = (row < rows) & block_in_range
        x = tl.load(x_ptr + offsets, mask=in_range, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=in_range, other=0.0).to(tl.float32)
        dx = tl.zeros([ROWS, BLOCKS, 8], tl.float32)
        grown = ()
        for i in tl.static_range(8):
            dy_i = _column(dy, i)
            dx += rotation_rows[i] * dy_i
            grown = grown + (sums[i] + dy_i * x,)  # noqa: RUF005
        sums = grown
        tl.store(dx_ptr + offsets, rounded(dx, dx_ptr.dtype.element_ty, INTERPRETED), mask=in_range)
    first = (tl.program_id(1).to(tl.int64) * blocks + block) * 64 + j
    for i in tl.static_range(8):
        share = tl.sum(sums[i], axis=0, keep_dims=True)
        tl.store(partial_ptr + first + i * 8, share, mask=block_in_range)


def _slices(rows: int, blocks: int, device: torch.device) -> int:
    """Return over how many programs the rows are dealt: enough to fill the device, at most one per row."""
    if device.type != "cuda":
        return min(rows, 2)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(rows, 4), triton.cdiv(processors * PROGRAMS_PER_PROCESSOR, triton.cdiv(blocks, 32))))


def _rotations(rotation: Tensor) -> tuple[Tensor, int]:
    """Return float32 row-major rotations and the stride between blocks, 0 when one is shared by all."""
    R = rotation.to(torch.float32).contiguous()
    return R, 64 if R.shape[0] > 1 else 0


def rotate(rotation: Tensor, x: Tensor) -> Tensor:
    """Return R x per block, x of shape (…, 8n)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    blocks = x.shape[-1] // 8
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    if rows == 0:
        return y
    R, stride = _rotations(rotation)
    slices = _slices(rows, blocks, x.device)
    arguments = {
        "rotation_ptr": R, "x_ptr": x, "y_ptr": y, "rows": rows, "blocks": blocks, "rotation_stride": stride,
        "INTERPRETED": interpreting(),
    }  # fmt: skip
    launch(
        forward_kernel,
        FORWARD_TILES,
        lambda tile: (triton.cdiv(blocks, tile["BLOCKS"]), slices),
        arguments,
        ("blocks",),
    )
    return y


def rotate_backward(dy: Tensor, rotation: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dR in float32, dx) in one pass over dy and x."""
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    blocks = x.shape[-1] // 8
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    if rows == 0:
        return torch.zeros(rotation.shape, dtype=torch.float32, device=x.device), dx
    R, stride = _rotations(rotation)
    slices = _slices(rows, blocks, x.device)
    partial = torch.empty(slices, blocks, 8, 8, dtype=torch.float32, device=x.device)
    arguments = {
        "rotation_ptr": R, "x_ptr": x, "dy_ptr": dy, "dx_ptr": dx, "partial_ptr": partial, "rows": rows,
        "blocks": blocks, "rotation_stride": stride, "INTERPRETED": interpreting(),
    }  # fmt: skip
    launch(
        backward_kernel,
        BACKWARD_TILES,
        lambda tile: (triton.cdiv(blocks, tile["BLOCKS"]), slices),
        arguments,
        ("blocks",),
    )
    dR = partial.sum(0)
    return (dR.sum(0, keepdim=True) if rotation.shape[0] == 1 else dR), dx
