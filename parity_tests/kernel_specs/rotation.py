"""The Triton kernels of the room ``rotation``."""

from __future__ import annotations

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.ops.rotation import kernels


def rotation_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``rotation``."""
    sizes = {"rows": "i32", "blocks": "i32", "rotation_stride": "i32:16"}
    plain = {"INTERPRETED": False}
    return (
        KernelSpec(
            room="rotation",
            kernel=kernels.forward_kernel,
            tiles=kernels.FORWARD_TILES,
            signature={"rotation_ptr": "*fp32", "x_ptr": "*", "y_ptr": "*", **sizes},
            constants=plain,
        ),
        KernelSpec(
            room="rotation",
            kernel=kernels.backward_kernel,
            tiles=kernels.BACKWARD_TILES,
            signature={
                "rotation_ptr": "*fp32",
                "x_ptr": "*",
                "dy_ptr": "*",
                "dx_ptr": "*",
                "partial_ptr": "*fp32",
                **sizes,
            },
            constants=plain,
            wide_loads=2,
        ),
    )
