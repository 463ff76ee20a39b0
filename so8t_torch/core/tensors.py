"""Arguments that have to be tensors: what is none is named in the error."""

from __future__ import annotations

import reprlib

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
