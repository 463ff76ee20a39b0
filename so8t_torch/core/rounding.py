"""Device code that casts to the nearest value of a dtype, for every kernel that stores half precision."""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# Triton reads annotations and knows tl.constexpr only, so that device functions cannot carry ordinary types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Cast to the nearest value of ``dtype``, ties to even; the interpreter truncates bfloat16 by itself."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)
