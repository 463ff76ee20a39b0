"""The Triton kernels of the room ``tridiagonal``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.core.launch import Tile
from so8t_torch.ops.tridiagonal import kernels

INTEGERS = {"chains": "i32", "length": "i32", "parts": "i32", "span": "i32:16", "backwards": "i32"}


def tridiagonal_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``tridiagonal``: a sweep and the reduction of its parts, twice."""
    whole, cut = {"SPLIT": False, "PARTS": 1}, {"SPLIT": True, "PARTS": kernels.MOST_PARTS}
    found: list[KernelSpec] = []
    for lanes, tiles in kernels.TILES.items():
        # only the longest blocks are enough of them to be cut into parts
        longest = lanes == max(kernels.TILES)
        if longest:
            found += _each(kernels.reduce_ratios_kernel, {"d_ptr": "*fp64", "beta_ptr": "*"}, tiles, {})
            found += _each(kernels.reduce_scan_kernel, {"m_ptr": "*", "s_ptr": "*"}, tiles, {})
        for way in (whole, cut) if longest else (whole,):
            ratios = {"d_ptr": "*fp64", "beta_ptr": "*", "ratio_ptr": "*"}
            found += _each(kernels.ratios_kernel, ratios, tiles, way)
            found += _each(kernels.scan_kernel, {"m_ptr": "*", "s_ptr": "*", "x_ptr": "*"}, tiles, way)
    return tuple(found)


def _each(
    kernel: Any, pointers: dict[str, str], tiles: tuple[Tile, ...], constants: dict[str, Any]
) -> Iterator[KernelSpec]:
    """Yield a kernel on pairs of numbers of float32 and float64; a lane's sites lie apart from the next one's."""
    yield KernelSpec(
        room="tridiagonal",
        kernel=kernel,
        tiles=tiles,
        signature={**pointers, "product_ptr": "*fp64", **INTEGERS},
        constants={"SITES": kernels.SITES, **constants},
        elements=("fp32", "fp64"),
        wide_loads=0,
        wide_stores=0,
    )
