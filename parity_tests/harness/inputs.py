"""Inputs and cotangents: drawn once in numpy float64, rounded to the dtype under test, handed to both sides.

Both sides see the same rounded numbers, so the error that is judged is the error of the computation and never the
rounding of its inputs. Generators are never compared across libraries.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from parity_tests.harness.pair import OpPair, Size

BATCH = 12
"""Examples in a batch; as two axes it is 3 by 4."""
HALF = ("bfloat16", "float16")
NUMPY: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "complex128": np.complex128,
    "complex64": np.complex64,
}
TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NUMPY}
COMPLEX_OF = {"float64": "complex128", "float32": "complex64"}


@dataclass(frozen=True, eq=False)
class Inputs:
    """Positional arguments with their batch axes: numpy float64 arrays, integer arrays, ``None`` or Python scalars."""

    arguments: tuple[Any, ...]
    axes: tuple[int | None, ...]
    batch: int

    def example(self, row: int) -> tuple[Any, ...]:
        """Return the positional arguments of one example."""
        return tuple(a if axis is None else a[row] for a, axis in zip(self.arguments, self.axes, strict=True))

    def replace(self, arguments: tuple[Any, ...]) -> Inputs:
        """Return the same axes over other arguments."""
        return dataclasses.replace(self, arguments=arguments)


def size_label(size: Size) -> str:
    """Return ``n4xT8`` for ``{"n": 4, "T": 8}``."""
    return "x".join(f"{key}{value}" for key, value in size.items()) or "fixed"


def seed(*words: object) -> np.random.Generator:
    """Return a generator that depends on the words alone, on every machine and in every process."""
    return np.random.default_rng(zlib.crc32("/".join(map(str, words)).encode()))


def is_array(value: Any) -> bool:
    """Whether an argument is handed over as an array (``None`` and Python scalars are handed over as they are)."""
    return isinstance(value, (np.ndarray, np.generic))


def is_inexact(value: Any) -> bool:
    """Whether an argument is an array that takes the dtype under test (real or complex floating point)."""
    return is_array(value) and np.issubdtype(value.dtype, np.inexact)


def draw(pair: OpPair, strategy: str, size: Size, batch: int = BATCH, first: int = 0) -> Inputs:
    """Draw ``batch`` examples and stack every array argument that is not shared.

    Args:
        pair: the declaration.
        strategy: name of one of its input strategies.
        size: one of its sizes.
        batch: number of examples, at least one.
        first: number of the first example; other numbers are other examples.
    """
    numbers = range(first, first + batch)
    rows = [pair.inputs[strategy](seed(pair.name, strategy, size_label(size), n), size) for n in numbers]
    arguments, axes = [], []
    for position, column in enumerate(zip(*rows, strict=True)):
        batched = is_array(column[0]) and position not in pair.shared
        arguments.append(np.stack(column) if batched else _first(column[0]))
        axes.append(0 if batched else None)
    return Inputs(tuple(arguments), tuple(axes), batch)


def _first(value: Any) -> Any:
    return np.asarray(value) if is_array(value) else value


def dtype_at(pair: OpPair, position: int, dtype: str) -> str:
    """Return the dtype that an argument takes when the sweep is at ``dtype``."""
    return "float32" if position in pair.masters and dtype in HALF else dtype


def result_dtype(pair: OpPair, dtype: str) -> str:
    """Return the declared dtype of floating results when the sweep is at ``dtype``."""
    if pair.returns == "float64":
        return "float64"
    if pair.returns == "accumulation":
        return "float64" if dtype == "float64" else "float32"
    return dtype


def round_to(value: Any, dtype: str) -> Any:
    """Round an inexact array to ``dtype`` and widen it back to float64 (complex128); leave anything else alone."""
    if not is_inexact(value):
        return value
    # what is too large for the dtype becomes infinite and is judged as such
    with np.errstate(over="ignore"):
        if np.iscomplexobj(value):
            return value.astype(NUMPY[COMPLEX_OF[dtype]]).astype(np.complex128)
        return value.astype(NUMPY[dtype]).astype(np.float64)


def rounded(pair: OpPair, inputs: Inputs, dtype: str) -> Inputs:
    """Round every inexact argument to the dtype that it takes under test."""
    arguments = (round_to(a, dtype_at(pair, i, dtype)) for i, a in enumerate(inputs.arguments))
    return inputs.replace(tuple(arguments))


def to_torch(value: Any, dtype: str, device: str = "cpu") -> Any:
    """Copy an array into a tensor: inexact ones in ``dtype``, integers and booleans as they are."""
    if not is_array(value):
        return value
    tensor = torch.from_numpy(np.array(value, order="C"))
    if not is_inexact(value):
        return tensor.to(device)
    return tensor.to(device=device, dtype=TORCH[COMPLEX_OF[dtype] if np.iscomplexobj(value) else dtype])


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to numpy: floating ones to float64, complex ones to complex128, others as they are."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        return tensor.to(torch.complex128).numpy()
    return (tensor.to(torch.float64) if tensor.is_floating_point() else tensor).numpy()


def draw_cotangent(shape: tuple[int, ...], complex_valued: bool, dtype: str, *words: object) -> np.ndarray:
    """Draw the cotangent of one output: an input of the test, never the sum of the outputs.

    Args:
        shape: shape of the output.
        complex_valued: whether the output is complex.
        dtype: dtype to which it is rounded, real name.
        *words: what the draw depends on.
    """
    generator = seed("cotangent", *words)
    value = generator.standard_normal(shape)
    if complex_valued:
        value = value + 1j * generator.standard_normal(shape)
    return round_to(np.asarray(value), dtype)
