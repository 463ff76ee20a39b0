"""Whether a run is fit to be written down: every trained number and every optimiser moment finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return the number of tensors that hold a NaN or an infinity; of tensors in shards, of this process's part."""
    flags = [
        (~torch.isfinite(value.to_local() if isinstance(value, DTensor) else value)).any().to("cpu", torch.int64)
        for value in tensors
        if value.is_floating_point()
    ]
    return torch.stack(flags).sum() if flags else torch.tensor(0)


@torch.no_grad()
def scan(
    model: nn.Module, optimiser: torch.optim.Optimizer, over_processes: Callable[[Tensor], Tensor]
) -> tuple[bool, bool]:
    """Return whether every trained parameter is finite, and every moment.

    Args:
        model: trained here; frozen parameters are not looked at.
        optimiser: its state is looked at.
        over_processes: sums over the processes.
    """
    moments = (value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor))
    found = torch.stack([not_finite(p for p in model.parameters() if p.requires_grad), not_finite(moments)])
    parameters, others = over_processes(found).tolist()
    return parameters == 0, others == 0
