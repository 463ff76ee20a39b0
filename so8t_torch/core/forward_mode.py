"""Registered operators and forward-mode derivatives: an operator of ``torch.library`` has none, and must say so.

PyTorch drops the tangents of its arguments, so that a Jacobian-vector product through it is zero, in silence. Public
functions look for tangents and take plain operations, but while ``torch.compile`` traces them there are none to see;
they appear in the operator, when the captured graph is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.errors import BackendError

_LIBRARY = torch.library.Library("so8t", "IMPL")


def refuse_tangents(*names: str) -> None:
    """Make operators raise BackendError where an argument carries a forward-mode tangent, compiled or not.

    Args:
        *names: of operators in the namespace ``so8t``, their derivatives already registered.
    """
    for name in names:
        _guard(name)


def _guard(name: str) -> None:
    # One kernel stands under the key of every device.
    differentiate = torch.library.get_kernel(f"so8t::{name}", "AutogradCPU")

    def refuse_or_differentiate(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
        if any(torch._VF._unpack_dual(tensor, level=0)[1] is not None for tensor in _tensors(arguments)):
            raise BackendError(
                f"so8t::{name} has no forward-mode derivative, and an argument carries a tangent; "
                "use backend='eager', which is made of plain operations."
            )
        return differentiate.call_boxed(keyset, *arguments, **keywords)

    with warnings.catch_warnings():
        # PyTorch says once that a kernel replaces another: here it wraps it.
        warnings.filterwarnings("ignore", category=UserWarning)
        _LIBRARY.impl(name, refuse_or_differentiate, "Autograd", with_keyset=True, allow_override=True)


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments and in lists of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from (entry for entry in argument if isinstance(entry, Tensor))
