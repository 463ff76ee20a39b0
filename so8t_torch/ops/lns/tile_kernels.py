"""Arithmetic of one tile that the sign–log kernels share: where it lies, how signs and logs are read, exact sums."""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# Triton reads annotations and knows tl.constexpr only, so that kernels cannot carry ordinary types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def corner(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return the matrix of the batch and the first row and column of this program; eight tiles of rows go together."""
    down = tl.cdiv(rows, BLOCK_ROWS)
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    matrix = (tl.program_id(0) // (down * across)).to(tl.int64)
    at = tl.program_id(0) % (down * across)
    group = at // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    within = at % (8 * across)
    return matrix, (group * 8 + within % height) * BLOCK_ROWS, (within // height) * BLOCK_COLUMNS


@triton.jit
def factor(sign_ptr, log_ptr, first, at, in_range, shift, dtype: tl.constexpr):
    """Return s e^{ℓ − shift} of a tile, 0 outside."""
    log = tl.load(log_ptr + first + at, mask=in_range, other=float("-inf")).to(dtype)
    value = tl.exp(log - finite(shift))
    if sign_ptr is not None:
        sign = tl.load(sign_ptr + first + at, mask=in_range, other=0)
        value = tl.where(sign > 0, value, tl.where(sign < 0, -value, 0.0))
    return value


@triton.jit
def counted(sign_ptr, log_ptr, at, in_range, dtype: tl.constexpr):
    """Return signs (or +1) and logs: −∞ where the sign is 0 and outside."""
    log = tl.load(log_ptr + at, mask=in_range, other=float("-inf")).to(dtype)
    if sign_ptr is None:
        sign = tl.full(log.shape, 1.0, dtype)
    else:
        sign = tl.load(sign_ptr + at, mask=in_range, other=0).to(dtype)
        log = tl.where(sign == 0.0, float("-inf"), log)
    return sign, log


@triton.jit
def finite(shift):
    """Return the shift, 0 in place of −∞, so that −∞ − shift stays −∞."""
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def two_sum(x, y):
    """Return x + y as rounded, and what rounding left out."""
    total = x + y
    y_part = total - x
    return total, (x - (total - y_part)) + (y - y_part)


@triton.jit
def usual(low):
    """Return the low part, 0 where the high part is not finite."""
    return tl.where(low - low == 0.0, low, 0.0)


@triton.jit
def signed(sign, magnitude):
    """Return s·e, exactly 0 for s = 0."""
    return tl.where(sign > 0.0, magnitude, tl.where(sign < 0.0, -magnitude, 0.0))


@triton.jit
def sign_of(x):
    """Return −1, 0 or +1 as int8; +1 for NaN."""
    return tl.where(x == 0.0, 0, tl.where(x < 0.0, -1, 1)).to(tl.int8)
