"""The Triton kernels of the room ``tridiagonal``."""

from __future__ import annotations

from typing import Any

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.ops.tridiagonal import kernels

INTEGERS = {"chains": "i32", "length": "i32", "parts": "i32", "span": "i32:16", "backwards": "i32"}
CHAIN, SCAN = {"d_ptr": "*fp64", "beta_ptr": "*"}, {"m_ptr": "*", "s_ptr": "*"}
WHOLE, CUT = {"SPLIT": False, "PARTS": 1}, {"SPLIT": True, "PARTS": kernels.MOST_PARTS}


def tridiagonal_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``tridiagonal``; only the longest blocks are ever so many that they are cut."""
    found = []
    for lanes in kernels.TILES:
        found += [
            _spec(kernels.ratios_kernel, {**CHAIN, "ratio_ptr": "*"}, lanes, WHOLE),
            _spec(kernels.scan_kernel, {**SCAN, "x_ptr": "*"}, lanes, WHOLE),
        ]
    lanes = max(kernels.TILES)
    found += [
        _spec(kernels.ratios_kernel, {**CHAIN, "ratio_ptr": "*"}, lanes, CUT),
        _spec(kernels.scan_kernel, {**SCAN, "x_ptr": "*"}, lanes, CUT),
        _spec(kernels.reduce_ratios_kernel, CHAIN, lanes, {}),
        _spec(kernels.reduce_scan_kernel, SCAN, lanes, {}),
    ]
    return tuple(found)


def _spec(kernel: Any, pointers: dict[str, str], lanes: int, constants: dict[str, Any]) -> KernelSpec:
    """Return a kernel on real pairs: lanes lie apart in memory, no load is wide; float64 where blocks are longest."""
    return KernelSpec(
        room="tridiagonal",
        kernel=kernel,
        tiles=kernels.TILES[lanes],
        signature={**pointers, "product_ptr": "*fp64", **INTEGERS},
        constants={"SITES": kernels.SITES, **constants},
        elements=("fp32", "fp64") if lanes == max(kernels.TILES) else ("fp32",),
        wide_loads=0,
        wide_stores=0,
    )
