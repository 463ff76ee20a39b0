"""Which dtype a sum is carried in: float32, or float64 for float64 input."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 input and float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
