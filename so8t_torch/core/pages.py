"""Unwritten memory for large results on the CPU, on huge pages where the system has them.

Fresh memory is paid for by the page: 50 MB are 12,288 faults on pages of 4 KB and 24 on pages of 2 MB. The memory is
PyTorch's own, so that its tools see it; the system is only told how it may be mapped.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

_HUGE_PAGE, _MADV_HUGEPAGE = 1 << 21, 14
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return unwritten memory on the CPU.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """
    out = torch.empty(shape, dtype=dtype)
    if _LIBC is not None and out.nbytes >= _HUGE_PAGE:
        begin = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        size = (out.data_ptr() + out.nbytes) // _HUGE_PAGE * _HUGE_PAGE - begin
        if size > 0:
            _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return out
