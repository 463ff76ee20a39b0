"""The second-difference penalty (PET) on the residual stream, read where the gated decoder layers leave it.

    PET = mean over gated layers of Σ_{b,t} v_{b,t} mean_d ρ(Δ²h_{b,t,d}) / N,   N = Σ v over the whole optimiser step

Forward hooks hand over the layers' outputs, so no list of all hidden states is kept. Under checkpointing a layer runs
again in the backward pass; the tap is closed by then and keeps what the first run gave. N counts every micro-batch of
an accumulated step: accumulation changes nothing. The room ``second_difference`` holds the mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from so8t_torch.adapter import gated_layers as gates
from so8t_torch.core.errors import TrainingError
from so8t_torch.ops.second_difference import centres, second_difference


def gated_layers(decoder: nn.Module) -> dict[int, nn.Module]:
    """Return the decoder layers that contain a gate, by index.

    Args:
        decoder: the stack of layers (``model.layers`` of a Hugging Face decoder).

    Raises:
        TrainingError: no layer has a gate.
    """
    layers: Any = getattr(decoder, "layers", ())
    found = {i: layer for i, layer in enumerate(layers) if any(gates(layer))}
    if not found:
        raise TrainingError(
            f"The penalty reads the stream after gated layers, but none of the {len(layers)} layers of "
            f"{type(decoder).__name__} has a gate; check adapter.target_modules or switch penalty.enabled off."
        )
    return found


class ResidualTap:
    """Keeps the outputs (of several, the first) of chosen modules during one forward pass.

    Args:
        layers: the modules to listen to, by index.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._streams: dict[int, Tensor] | None = None
        self._handles = [layer.register_forward_hook(self._hook(index)) for index, layer in layers.items()]

    def _hook(self, index: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            if self._streams is not None:
                self._streams[index] = output if isinstance(output, Tensor) else output[0]

        return keep

    @contextmanager
    def open(self) -> Iterator[dict[int, Tensor]]:
        """Collect outputs into the mapping that is yielded, until the block ends."""
        self._streams = {}
        try:
            yield self._streams
        finally:
            self._streams = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def penalty(
    streams: Sequence[Float[Tensor, "b t d"]], mask: Int[Tensor, "b t"], total: Int[Tensor, ""], *, huber_delta: float
) -> Float[Tensor, ""]:
    """Return this micro-batch's part of PET; the parts of an optimiser step add up to its PET.

    Args:
        streams: output of each gated layer.
        mask: 1 for tokens, 0 for padding.
        total: number of centred triples in the whole optimiser step.
        huber_delta: Huber's threshold in units of h, 0 for the square.
    """
    share = centres(mask).sum() / total.clamp(min=1)
    parts = [second_difference(h, mask, delta=huber_delta) for h in streams]
    return torch.stack(parts).mean() * share


def triples(mask: Int[Tensor, "b t"]) -> Int[Tensor, ""]:
    """Return how many tokens of the batch have both neighbours."""
    return centres(mask).sum()
