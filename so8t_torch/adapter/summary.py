"""What the gates of a model look like: rotation angles, commutator of the two factors, orthogonality error.

    R = R_cmd R_safe turns four planes of each block by 0 ≤ θ ≤ π;   sin²(θ/2) = eigenvalues of (I − (R + Rᵀ)/2)/2

These are monitors for logging, never losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from so8t_torch.adapter.layer import _CHART_FUNCTIONS, SO8TLayer
from so8t_torch.ops import rotation

_WRAPPING = "base_model.model."


@dataclass(frozen=True)
class GateSummary:
    """The geometry of one gate; angles in radians."""

    max_angle: float
    mean_angle: float
    commutator: float
    orthogonality_error: float


def layers(model: nn.Module) -> Iterator[tuple[str, SO8TLayer]]:
    """Yield the model's SO(8) layers with their module names."""
    for name, module in model.named_modules():
        if isinstance(module, SO8TLayer):
            yield name, module


def gated_layers(model: nn.Module) -> Iterator[tuple[str, SO8TLayer]]:
    """Yield the layers whose active adapter has a gate, with their module names."""
    for name, layer in layers(model):
        if any(adapter in layer.so8t_safe for adapter in layer.active_adapters):
            yield name, layer


def rotation_angles(matrix: Float[Tensor, "*batch 8 8"]) -> Float[Tensor, "*batch 4"]:
    """Return the four rotation angles of each matrix, in radians, ascending.

    Args:
        matrix: rotations.
    """
    matrix = matrix.double()
    eye = torch.eye(8, dtype=matrix.dtype, device=matrix.device)
    squared_sine = torch.linalg.eigvalsh((eye - (matrix + matrix.mT) / 2) / 2)
    # rounding may leave an eigenvalue of a rotation just outside [0, 1]
    return 2 * squared_sine.clamp(0, 1).sqrt().asin()[..., ::2]


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or, of one in shards over the processes, all of it; then every process has to call.

    Args:
        tensor: perhaps a ``DTensor``.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gate_summary(model: nn.Module) -> dict[str, GateSummary]:
    """Return the geometry of every active gate by module name, the same with and without PEFT's wrapping.

    On a model whose weights are in shards every process has to call it.

    Args:
        model: wrapped by PEFT, or with injected layers.
    """
    return {name.removeprefix(_WRAPPING): _summary(layer) for name, layer in gated_layers(model)}


def _summary(layer: SO8TLayer) -> GateSummary:
    name = layer.active_adapters[0]
    generators = torch.stack([whole(generator) for generator in layer.coordinates(name)])
    safe, cmd = (factor.cpu() for factor in _CHART_FUNCTIONS[layer.charts[name]](generators))
    total = rotation.compose(safe, cmd)
    angles = rotation_angles(total)
    return GateSummary(
        max_angle=float(angles.max()),
        mean_angle=float(angles.mean()),
        commutator=float(rotation.commutator_distance(safe, cmd).mean()),
        orthogonality_error=float(rotation.orthogonality_error(total).max()),
    )
