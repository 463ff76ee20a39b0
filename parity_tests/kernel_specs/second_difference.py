"""The Triton kernels of the room ``second_difference``."""

from __future__ import annotations

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.ops.second_difference import kernels


def second_difference_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``second_difference``; their tiles depend on the bytes of an element."""
    sizes = {"length": "i32", "width": "i32:16", "stride_b": "i32:16", "stride_t": "i32:16"}
    plain = {"stride_d": 1, "DELTA": 0.0}
    by_size = ((2, ("bf16",), "fp32"), (4, ("fp32",), "fp32"), (8, ("fp64",), "fp64"))
    forward = [
        KernelSpec(
            room="second_difference",
            kernel=kernels.energy_kernel,
            tiles=kernels.ENERGY_TILES[size],
            signature={"h_ptr": "*", "valid_ptr": "*u8", "partial_ptr": f"*{accumulated}", **sizes},
            constants=plain,
            elements=elements,
            wide_stores=0,
        )
        for size, elements, accumulated in by_size
    ]
    backward = [
        KernelSpec(
            room="second_difference",
            kernel=kernels.gradient_kernel,
            tiles=kernels.GRADIENT_TILES[size],
            signature={
                "grad_ptr": "*fp64", "h_ptr": "*", "valid_ptr": "*u8", "dh_ptr": "*", "stride_g": "i32", **sizes,
            },
            constants={**plain, "FLOAT64": size == 8},
            elements=elements,
        )
        for size, elements, _ in by_size
    ]  # fmt: skip
    return (*forward, *backward)
