"""What a run began with, kept in host memory: where it goes back to while there is no checkpoint.

A process that begins the same run anew builds the same numbers from the seed, so nothing of this is written to disk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from so8t_torch.train.checkpoint_state import apart, generators, like, set_generators
from so8t_torch.train.detection import trainable


class Start:
    """Copies of the trained numbers and the buffers, and the states of the random number generators.

    Args:
        model: as it was built, its weights whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self.numbers = {name: apart(value) for name, value in _held(model).items()}
        self._generators = generators()

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put everything back in place; the weights may be in shards by now."""
        for name, value in _held(model).items():
            value.copy_(like(value, self.numbers[name]))
        set_generators(self._generators)


def _held(model: nn.Module) -> dict[str, Tensor]:
    return {**trainable(model), **dict(model.named_buffers())}
