"""What the functions of this room ask of their arguments: shapes that fit, real numbers, signs, a working dtype."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.core.readable import readable
from so8t_torch.core.tensors import expect_tensors

Diagnostics = dict[str, Tensor]

_AXIS = re.compile(r"(\d*)([a-z]+)([+-]\d+)?")


def monitors(**values: Tensor) -> Diagnostics:
    """Return the values by name, held constant in every gradient."""
    return {name: value.detach() for name, value in values.items()}


def match(op: str, **arguments: tuple[Tensor | None, str]) -> None:
    """Raise unless the shapes fit their patterns with one size ≥ 1 for every letter.

    Args:
        op: name for the error text.
        **arguments: name → (tensor or None, pattern). A pattern names the axes, e.g. ``"... l+1 2d"``: leading axes
            that broadcast with those of the others, one more than l, an even number.

    Raises:
        ShapeError: a pattern does not fit.
    """
    given = {name: (tensor, pattern) for name, (tensor, pattern) in arguments.items() if tensor is not None}
    expect_tensors(f"physics.{op}", **{name: tensor for name, (tensor, _) in given.items()})
    sizes: dict[str, int] = {}
    fits = all(_fits(tensor.shape, pattern.split(), sizes) for tensor, pattern in given.values())
    if not fits or not _broadcast([_leading(tensor.shape, pattern) for tensor, pattern in given.values()]):
        expected = ", ".join(f"{name} ({pattern.replace(' ', ', ')})" for name, (_, pattern) in given.items())
        got = ", ".join(str(tuple(tensor.shape)) for tensor, _ in given.values())
        raise ShapeError(f"physics.{op}: expected {expected} with every letter at least 1, got {got}.")


def widened(op: str, *tensors: Tensor) -> list[Tensor]:
    """Return the tensors in the accumulation dtype of the first.

    Raises:
        DomainError: one is not real floating-point, or not on the device of the first.
    """
    first = tensors[0]
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise DomainError(f"physics.{op}: expected real floating-point arguments, got {tensor.dtype}; convert it.")
        if tensor.device != first.device:
            raise DomainError(f"physics.{op}: arguments are on {first.device} and {tensor.device}; move one of them.")
    return [tensor.to(accumulation_dtype(first.dtype)) for tensor in tensors]


def not_negative(op: str, **tensors: Tensor) -> None:
    """Raise DomainError where an entry is negative; read on the CPU only, elsewhere it would wait for the device."""
    for name, tensor in tensors.items():
        if readable(tensor) and bool((tensor < 0).any()):
            raise DomainError(f"physics.{op}: expected {name} ≥ 0, got {tensor.min():g}; map it by softplus.")


def positive(op: str, **tensors: Tensor) -> None:
    """Raise DomainError where an entry is zero or negative; read on the CPU only."""
    for name, tensor in tensors.items():
        if readable(tensor) and bool((tensor <= 0).any()):
            raise DomainError(
                f"physics.{op}: expected {name} > 0, got {tensor.min():g}; map it by softplus plus a floor."
            )


def check_numbers(op: str, *, eps: float = 1.0, step: float = 1.0, damping: float = 0.0) -> None:
    """Raise ConfigError unless ε > 0 is finite, h is finite and not zero, and γ ≥ 0."""
    if not 0 < eps < math.inf:
        raise ConfigError(f"physics.{op}: expected a finite eps > 0, got {eps!r}.")
    # Comparisons alone: torch.compile follows them where numbers are dynamic.
    if not 0 < abs(step) < math.inf:
        raise ConfigError(f"physics.{op}: expected a finite step other than 0, got {step!r}.")
    if not 0 <= damping < math.inf:
        raise ConfigError(f"physics.{op}: expected damping ≥ 0, got {damping!r}.")


def check_duration(op: str, step: float) -> None:
    """Raise ConfigError unless h is positive and finite: time runs forwards between two layers."""
    if not 0 < step < math.inf:
        raise ConfigError(f"physics.{op}: expected a finite step > 0, got {step!r}.")


def _fits(shape: torch.Size, axes: list[str], sizes: dict[str, int]) -> bool:
    """Whether the last axes fit, noting the size of every letter."""
    open_ended = axes[:1] == ["..."]
    axes = axes[open_ended:]
    if len(shape) < len(axes) or (len(shape) > len(axes) and not open_ended):
        return False
    for length, axis in zip(shape[len(shape) - len(axes) :], axes, strict=True):
        found = _AXIS.fullmatch(axis)
        assert found is not None
        times, offset = int(found[1] or 1), int(found[3] or 0)
        # Not divmod, which torch.compile does not follow for a dynamic length.
        size, rest = (length - offset) // times, (length - offset) % times
        if rest or size < 1 or sizes.setdefault(found[2], size) != size:
            return False
    return True


def _leading(shape: torch.Size, pattern: str) -> torch.Size:
    """Return the axes before those that the pattern names."""
    return shape[: len(shape) - len(pattern.replace("...", "").split())]


def _broadcast(shapes: list[torch.Size]) -> bool:
    """Whether shapes broadcast."""
    longest = max(map(len, shapes))
    columns = zip(*((1,) * (longest - len(shape)) + tuple(shape) for shape in shapes), strict=True)
    return all(len(set(column) - {1}) <= 1 for column in columns)
