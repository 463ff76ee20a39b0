"""The Triton kernels of the room ``linear_recurrence``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.core.launch import Tile
from so8t_torch.ops.linear_recurrence import kernels

INTEGERS = {
    "length": "i32", "width": "i32:16", "parts": "i32", "span": "i32", "a_stride_n": "i32:16", "a_stride_t": "i32:16",
    "x_stride_n": "i32:16", "x_stride_t": "i32:16",
}  # fmt: skip
PLAIN = {"a_stride_c": 1, "x_stride_c": 1, "COMPLEX": False, "DESCENDING": False, "RESTARTS": True}
PAIRS = {**PLAIN, "a_stride_c": 2, "x_stride_c": 2, "COMPLEX": True}


def linear_recurrence_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``linear_recurrence``: real by bytes of an element, complex as real pairs."""
    found: list[KernelSpec] = []
    for size, elements in ((2, ("bf16",)), (4, ("fp32",)), (8, ("fp64",))):
        constants = {**PLAIN, "FLOAT64": size == 8}
        wide, *narrow = kernels.TILES[size]
        found += _walks((wide,), elements, constants, 1)
        found += _walks(tuple(narrow), elements, constants, 0)
        found.append(_carry(elements, constants))
    for elements in (("fp32",), ("fp64",)):
        constants = {**PAIRS, "FLOAT64": elements == ("fp64",)}
        found += _walks(kernels.COMPLEX_TILES, elements, constants, 0)
        found.append(_carry(elements, constants))
    return tuple(found)


def _walks(
    tiles: tuple[Tile, ...], elements: tuple[str, ...], constants: dict[str, Any], wide: int
) -> Iterator[KernelSpec]:
    """Yield the kernels that walk along tokens: forward, adjoint, and their reductions of parts."""
    carried = "*fp64" if constants["FLOAT64"] else "*fp32"
    inputs = {"a_ptr": "*", "x_ptr": "*", "restart_ptr": "*u8", **INTEGERS}
    ends = {"enter_ptr": carried}
    calls = (
        (kernels.forward_kernel, {"h_ptr": "*", "final_ptr": carried, **ends}, {"ENTERED": True}, wide),
        (
            kernels.adjoint_kernel,
            {"h_ptr": "*", "initial_ptr": carried, "da_ptr": "*", "dx_ptr": "*", "dinitial_ptr": carried, **ends},
            {"STARTED": True, "NEED_A": True},
            wide,
        ),
        (kernels.reduce_kernel, {"product_ptr": carried, "sum_ptr": carried}, {"ADJOINT": True}, 0),
    )
    for kernel, pointers, flags, stores in calls:
        yield KernelSpec(
            room="linear_recurrence",
            kernel=kernel,
            tiles=tiles,
            signature={**inputs, **pointers},
            constants={**constants, **flags},
            elements=elements,
            wide_loads=wide,
            wide_stores=stores,
        )


def _carry(elements: tuple[str, ...], constants: dict[str, Any]) -> KernelSpec:
    """Return the kernel that carries states from part to part."""
    carried = "*fp64" if constants["FLOAT64"] else "*fp32"
    pointers = dict.fromkeys(("initial_ptr", "product_ptr", "sum_ptr", "enter_ptr"), carried)
    return KernelSpec(
        room="linear_recurrence",
        kernel=kernels.carry_kernel,
        tiles=kernels.CARRY_TILES,
        signature={"a_ptr": "*", "x_ptr": "*", "restart_ptr": "*u8", **INTEGERS, **pointers},
        constants={**constants, "ADJOINT": False, "STARTED": True},
        elements=elements,
        wide_loads=0,
        wide_stores=0,
    )
