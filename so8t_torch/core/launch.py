"""How a Triton kernel is started: a table of tiles, timed where a device can, the first one elsewhere.

A kernel decorated with ``triton.autotune`` cannot be called under the interpreter, so that tiles are data and the
kernel stays a plain ``@triton.jit`` function. Choosing a tile never changes which sums are formed, only how fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np

from so8t_torch.core.backend import interpreting
from so8t_torch.core.errors import ConfigError
from so8t_torch.core.tuning import Tile, device_tuner, key

__all__ = ["Grid", "Tile", "fixed_tile", "launch"]

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]
_FIXED: ContextVar[int | None] = ContextVar("fixed_tile", default=None)


@contextlib.contextmanager
def fixed_tile(index: int) -> Iterator[None]:
    """Run every kernel started inside with this tile of its table (the last one of a shorter table), untimed.

    Args:
        index: position in the table, 0 for the one that runs where nothing can be timed.

    Raises:
        ConfigError: the index is negative.
    """
    if index < 0:
        raise ConfigError(f"fixed_tile: expected a position in the table of tiles, 0 or more, got {index!r}.")
    token = _FIXED.set(index)
    try:
        yield
    finally:
        _FIXED.reset(token)


def launch(
    kernel: Any,
    tiles: tuple[Tile, ...],
    grid: Grid,
    arguments: Mapping[str, Any],
    tune_on: tuple[str, ...] = (),
    restore: tuple[str, ...] = (),
) -> None:
    """Run ``kernel`` over ``grid``.

    Args:
        kernel: a ``@triton.jit`` function, or its interpreted form.
        tiles: candidates; the first one is a sound choice everywhere.
        grid: programs per axis as a function of the arguments and the tile's constants.
        arguments: every other argument by name.
        tune_on: names of sizes whose next power of two calls for timing the tiles again.
        restore: names of tensors that the kernel adds to; they are put back between timings.
    """

    def run(tile: Tile) -> None:
        kernel[grid](**arguments, **tile.constants, num_warps=tile.warps, num_stages=tile.stages)

    fixed = _FIXED.get()
    tile = tiles[min(fixed or 0, len(tiles) - 1)]
    if interpreting():
        # The interpreter computes with NumPy, which warns about infinities and NaN; a device does not.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            kernel[grid](**arguments, **tile.constants)
        return
    if fixed is None and len(tiles) > 1 and (tuner := device_tuner()) is not None:
        tile = tuner.choose(key(kernel, arguments, tune_on), tiles, run, [arguments[name] for name in restore])
    run(tile)
