"""Arguments that have to be tensors, and tensors that have to be finite: what is not is named in the error."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence

from torch import Tensor

from so8t_torch.core.errors import DomainError


def expect_tensors(op: str, **given: object) -> None:
    """Raise DomainError unless every argument is a tensor.

    Args:
        op: name for the error text.
        **given: name → what came.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise DomainError(
                f"{op}: expected {name} to be a tensor, got {type(value).__name__} {reprlib.repr(value)}; give a "
                "tensor, for example torch.as_tensor(...)."
            )


def expect_tensors_or_none(op: str, **given: object) -> None:
    """Raise DomainError unless every argument is a tensor or left out.

    Args:
        op: name for the error text.
        **given: name → what came.
    """
    expect_tensors(op, **{name: value for name, value in given.items() if value is not None})


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity; one without data holds neither.

    Args:
        tensors: by name, of any dtype.
    """
    able = {name: t for name, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    return [name for name, tensor in able.items() if not tensor.is_meta and not bool(tensor.detach().isfinite().all())]


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return names for an error text; of many the first ones.

    Args:
        names: to be listed.
        most: how many are written out.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
