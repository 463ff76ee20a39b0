"""The Triton kernels of the room ``hebbian``."""

from __future__ import annotations

from typing import Any

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.core.launch import Tile
from so8t_torch.ops.hebbian import kernels

SIZES = {"length": "i32", "heads": "i32", "dk": "i32:16", "dv": "i32:16", "chunks": "i32"}
BY_ELEMENT = (
    ("bf16", "fp32", "tf32"),
    ("fp16", "fp32", "tf32x3"),
    ("fp32", "fp32", "tf32x3"),
    ("fp64", "fp64", "ieee"),
)
"""Element, what it is accumulated in, and how products are rounded."""
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def hebbian_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``hebbian``: the walk and the read in both directions, and the gradients."""
    return tuple(spec for case in BY_ELEMENT for spec in _kernels(*case))


def _kernels(element: str, carried: str, precision: str) -> tuple[KernelSpec, ...]:
    double = carried == "fp64"
    flags = {"FLOAT64": double, "RESETS": True, "PRECISION": precision, "C": 64}
    gates = {"log_ptr": f"*{carried}", "eta_ptr": f"*{carried}", "reset_ptr": "*u8", "states_ptr": f"*{carried}"}
    walk = {"x_ptr": "*", "z_ptr": "*", **gates, "start_ptr": f"*{carried}", "end_ptr": f"*{carried}", **SIZES}
    read = {"own_ptr": "*", "other_ptr": "*", "x_ptr": "*", "y_ptr": "*", **gates, **SIZES}
    own = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "dy_ptr"), "*"), **gates,
        **dict.fromkeys(("adjoints_ptr", "dlog_ptr", "deta_ptr"), f"*{carried}"), **SIZES,
    }  # fmt: skip
    plain, transposed = ({"stride_a": "i32:16"}, {"stride_b": 1}), ({"stride_b": "i32:16"}, {"stride_a": 1})
    walks, reads = kernels.WALK_TILES[precision], kernels.READ_TILES[precision]
    gate = kernels.GATES_TILES[BYTES[element]]
    cases: list[tuple[Any, tuple[Tile, ...], dict[str, str], dict[str, Any]]] = [
        *((kernels.walk_kernel, walks, walk, {"ADJOINT": x, "STARTED": True}) for x in (False, True)),
        *(
            (kernels.read_kernel, reads, read | stride, {"ADJOINT": x, "INTERPRETED": False, **one})
            for stride, one in (plain, transposed)
            for x in (False, True)
        ),
        (kernels.gates_kernel, gate, own, {}),
    ]
    return tuple(
        KernelSpec(
            room="hebbian",
            kernel=kernel,
            tiles=tiles,
            signature=signature,
            constants={**flags, **more},
            elements=(element,),
            wide_stores=int(kernel is kernels.walk_kernel or (kernel is kernels.read_kernel and not double)),
        )
        for kernel, tiles, signature, more in cases
    )
