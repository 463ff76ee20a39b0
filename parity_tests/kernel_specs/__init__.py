"""Every Triton kernel of the library, one file per room."""

from __future__ import annotations

from parity_tests.kernel_specs.hebbian import hebbian_specs
from parity_tests.kernel_specs.linear_recurrence import linear_recurrence_specs
from parity_tests.kernel_specs.lns import lns_specs
from parity_tests.kernel_specs.rotation import rotation_specs
from parity_tests.kernel_specs.second_difference import second_difference_specs
from parity_tests.kernel_specs.spec import KernelSpec
from parity_tests.kernel_specs.tensor_train import tensor_train_specs
from parity_tests.kernel_specs.tridiagonal import tridiagonal_specs

__all__ = ["KernelSpec", "specs"]


def specs() -> tuple[KernelSpec, ...]:
    """Return every kernel of the library."""
    rooms = (
        hebbian_specs,
        linear_recurrence_specs,
        lns_specs,
        rotation_specs,
        second_difference_specs,
        tensor_train_specs,
        tridiagonal_specs,
    )
    return tuple(spec for room in rooms for spec in room())
