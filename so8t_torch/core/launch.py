"""How a Triton kernel is started: a table of tiles, tuned where a driver can time them, the first one elsewhere.

A kernel decorated with ``triton.autotune`` cannot be called under the interpreter, so that tiles are data and the
kernel stays a plain ``@triton.jit`` function. Choosing a tile never changes which sums are formed, only how fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from so8t_torch.core.backend import interpreting

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Tile:
    """One way to run a kernel.

    Attributes:
        warps: warps of 32 threads per program.
        stages: depth of software pipelining.
        constants: the kernel's ``tl.constexpr`` sizes.
    """

    warps: int
    stages: int = 1
    constants: Mapping[str, int] = field(default_factory=dict)


def launch(
    kernel: Any, tiles: tuple[Tile, ...], grid: Grid, arguments: Mapping[str, Any], tune_on: tuple[str, ...] = ()
) -> None:
    """Run ``kernel`` over ``grid``.

    Args:
        kernel: a ``@triton.jit`` function, or its interpreted form.
        tiles: candidates; the first one is a sound choice everywhere.
        grid: programs per axis as a function of the arguments and the tile's constants.
        arguments: every other argument by name.
        tune_on: names of arguments whose change calls for timing the tiles again.
    """
    first = tiles[0]
    if interpreting():
        # The interpreter computes with NumPy, which warns about infinities and NaN; a device does not.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            kernel[grid](**arguments, **first.constants)
        return
    if len(tiles) == 1:
        kernel[grid](**arguments, **first.constants, num_warps=first.warps, num_stages=first.stages)
        return
    _tuned(kernel, tiles, tune_on)[grid](**arguments)


@functools.cache
def _tuned(kernel: Any, tiles: tuple[Tile, ...], tune_on: tuple[str, ...]) -> Any:
    import triton

    configurations = [
        triton.Config(dict(tile.constants), num_warps=tile.warps, num_stages=tile.stages) for tile in tiles
    ]
    return triton.autotune(configs=configurations, key=list(tune_on))(kernel)
