"""Which dtype a sum is carried in, and what autocast has to do with it: float32, or float64 for float64 input."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 input and float32 for every other floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which sums are carried in the dtype that the operation states.

    Args:
        device: where the operation runs; some, like meta, know no autocast.
    """
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which a linear layer under autocast would take x; nothing where it would take x as it is."""
    device = x.device.type
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if active and x.dtype != torch.float64 else None
