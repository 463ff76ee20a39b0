"""How large the numbers of a run are, and so whether it is fit to be written down.

A maximum norm carries NaN and Inf along, so one number per tensor tells both, and one transfer all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def magnitudes(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the largest absolute value of each tensor (of this process' part of it), NaN where it holds one.

    Args:
        tensors: floating or complex, then the larger of both parts counts; an empty one counts as zero.
        device: where the result is wanted.
    """
    parts = [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors]
    parts = [torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in parts]
    found = torch.zeros(len(parts), dtype=torch.float64, device=device)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, part in enumerate(parts):
        if part.numel():
            alike.setdefault((part.device, part.dtype), []).append(place)
    # of one kind they are measured in one kernel, and moved in one
    for places in alike.values():
        norms = torch._foreach_norm([parts[place] for place in places], math.inf)
        found[places] = torch.stack(norms).to(device, torch.float64)
    return found


def measurable(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be other than finite."""
    return tensor.is_floating_point() or tensor.is_complex()


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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]
    found = torch.stack([_not_finite(held) for held in (trained, moments)])
    parameters, others = over_processes(found).tolist()
    return parameters == 0, others == 0


def _not_finite(tensors: Sequence[Tensor]) -> Tensor:
    sizes = magnitudes([value for value in tensors if measurable(value)], torch.device("cpu"))
    return (~sizes.isfinite()).sum()
