"""Memory that the library allocates and forgets to write: ``torch.empty`` and its kin hand out NaN while judged."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

ALLOCATORS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.detach().fill_(torch.nan)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoning(allocate: Callable[..., torch.Tensor], packages: frozenset[str]) -> Callable[..., torch.Tensor]:
    def call(*arguments: Any, **keywords: Any) -> torch.Tensor:
        tensor = allocate(*arguments, **keywords)
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return _poison(tensor) if caller in packages else tensor

    return call


@contextlib.contextmanager
def poisoned(function: Callable[..., Any]) -> Iterator[None]:
    """Fill with NaN (integers: the largest value) what the library allocates unwritten.

    Args:
        function: the judged function; its top-level package counts as the library, beside ``so8t_torch``.
    """
    packages = frozenset(("so8t_torch", function.__module__.partition(".")[0]))
    originals = [(owner, name, getattr(owner, name)) for owner, name in ALLOCATORS]
    for owner, name, allocate in originals:
        setattr(owner, name, _poisoning(allocate, packages))
    try:
        yield
    finally:
        for owner, name, allocate in originals:
            setattr(owner, name, allocate)
