"""Registered operators and forward-mode derivatives: an operator of ``torch.library`` has none, and must say so.

PyTorch drops the tangents of its arguments, so that a Jacobian-vector product through it is zero, in silence. Public
functions look for tangents and take plain operations, but while ``torch.compile`` traces them there are none to see;
they appear in the operator, when the captured graph is built. The derivatives of ``torch.func`` (grad, vjp, jacrev) do
not pass through an operator either, and end in an error about something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._ops import OpOverload
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef

from so8t_torch.core.errors import BackendError

Kernel = Callable[..., Any]

_LIBRARY = torch.library.Library("so8t", "IMPL")


def reasons(*tensors: Tensor) -> tuple[str, ...]:
    """Return why a registered operation cannot run on these tensors; empty where nobody differentiates its own way."""
    if torch.compiler.is_compiling():
        return ()
    if any(unpack_dual(x).tangent is not None for x in tensors):
        return ("an argument carries a forward-mode tangent, which only plain operations propagate",)
    if any(_tracked(x) for x in tensors):
        return ("torch.func differentiates an argument, which it does through plain operations only",)
    return ()


def refuse_tangents(*operators: CustomOpDef) -> None:
    """Make operators raise BackendError where an argument carries a forward-mode tangent, compiled or not.

    Args:
        *operators: results of ``torch.library.custom_op`` in the namespace ``so8t``; their ``register_autograd`` may
            come before or after.
    """
    for operator in operators:
        kernel = _guarded(operator._opoverload, make_autograd_impl(operator._opoverload, operator))
        with warnings.catch_warnings():
            # PyTorch says once that a kernel replaces another: here it wraps it.
            said = "(?s).*Overriding a previously registered kernel"
            warnings.filterwarnings("ignore", message=said, category=UserWarning)
            _LIBRARY.impl(operator._name, kernel, "Autograd", with_keyset=True, allow_override=True)


def register_autograd(
    operator: OpOverload, backward: Kernel | None = None, setup_context: Kernel | None = None
) -> None:
    """Register the derivative of an operator as ``torch.library.register_autograd`` does, and refuse tangents.

    Args:
        operator: result of ``torch.library.define`` in the namespace ``so8t``.
        backward: as there; None for what has no derivative.
        setup_context: as there.
    """
    kernel = _guarded(operator, make_autograd_impl(operator, Info(backward, setup_context)))
    _LIBRARY.impl(operator._opname, kernel, "Autograd", with_keyset=True)


def _guarded(operator: OpOverload, differentiate: Kernel) -> Kernel:
    """Return the kernel behind a look at the tangents."""

    def refuse_or_differentiate(keyset: Any, *arguments: Any, **keywords: Any) -> Any:
        if any(torch._VF._unpack_dual(tensor, level=0)[1] is not None for tensor in _tensors(arguments)):
            raise BackendError(
                f"{operator._namespace}::{operator._opname} has no forward-mode derivative, and an argument carries a "
                "tangent; use backend='eager', which is made of plain operations."
            )
        return differentiate(keyset, *arguments, **keywords)

    return refuse_or_differentiate


def _tracked(x: Tensor) -> bool:
    """Return whether a transform of ``torch.func`` differentiates x, perhaps inside of another one that batches it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments and in lists of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from (entry for entry in argument if isinstance(entry, Tensor))
