"""Operators of ``torch.library`` whose definition loads no compiler."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def define(name: str, function: Function, schema: str) -> Any:
    """Define an operator for every device, and return it.

    ``torch.library.custom_op`` would load the compiler (seconds) at the first call of a process that compiles nothing.

    Args:
        name: within the namespace ``so8t``.
        function: what it computes; it is not traced.
        schema: arguments and results as ``torch.library.define`` takes them.
    """

    def run(*arguments: Any) -> Any:
        return (_untraced(function) if "torch._dynamo" in sys.modules else function)(*arguments)

    torch.library.define(f"so8t::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"so8t::{name}", "default", run)
    return getattr(torch.ops.so8t, name).default


@functools.cache
def _untraced(function: Function) -> Function:
    return torch.compiler.disable(function)
