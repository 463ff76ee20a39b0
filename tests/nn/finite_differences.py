"""The gradient of every parameter of a layer beside finite differences along a drawn direction."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_every_parameter(module: nn.Module, loss: Callable[[], Tensor], *, rtol: float, atol: float) -> None:
    """Fail unless every row of every parameter has a finite gradient, none is all zeros, and slopes are differences.

    Args:
        module: in float64.
        loss: a number that depends on the parameters, the same at every call.
        rtol: of the slope along the direction, beside atol.
        atol: see there.
    """
    parameters = dict(module.named_parameters())
    slopes = torch.autograd.grad(loss(), list(parameters.values()))
    generator = torch.Generator().manual_seed(4)
    for (name, parameter), slope in zip(parameters.items(), slopes, strict=True):
        assert slope.isfinite().all(), name
        rows = slope.flatten(1) if slope.ndim > 1 else slope.reshape(-1, 1)
        assert rows.any(-1).all(), f"{name} gets no gradient in {(~rows.any(-1)).nonzero().flatten().tolist()}"
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        with torch.no_grad():
            ends = []
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                ends.append(loss())
                parameter.sub_(direction, alpha=step)
        found = (ends[0] - ends[1]) / 2e-6
        assert torch.allclose(found, (slope * direction).sum(), rtol=rtol, atol=atol), name
