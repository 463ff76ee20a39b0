"""The production op, run on tensors in the dtype under test: outputs, and gradients for a given cotangent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parity_tests.harness.comparison import ParityError
from parity_tests.harness.inputs import Inputs, dtype_at, is_array, result_dtype, to_numpy, to_torch
from parity_tests.harness.pair import OpPair
from parity_tests.harness.reference import present
from parity_tests.harness.tree import flatten, map_leaves

Layout = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """Outputs of one call, and position → gradient (``None`` where autograd gave none)."""

    structure: str
    outputs: list[Any]
    gradients: dict[int, torch.Tensor | None]


def bound(pair: OpPair, backend: str | None = None) -> Callable[..., Any]:
    """Return the production function with the declared keywords and, if named, a backend.

    The function is a fresh object on every call, so that ``torch.compile`` never meets its recompile limit.
    """
    keywords = dict(pair.keywords) if backend is None else {**pair.keywords, "backend": backend}

    def call(*arguments: Any) -> Any:
        return pair.production(*arguments, **keywords)

    return call


def tensors(pair: OpPair, inputs: Inputs, dtype: str, device: str = "cpu") -> list[Any]:
    """Return the arguments as production takes them."""
    return [to_torch(a, dtype_at(pair, i, dtype), device) for i, a in enumerate(inputs.arguments)]


def run(
    pair: OpPair,
    inputs: Inputs,
    dtype: str,
    cotangents: tuple[np.ndarray, ...] | None = None,
    *,
    function: Callable[..., Any] | None = None,
    layout: Layout | None = None,
    cotangent_layout: Layout | None = None,
    device: str = "cpu",
) -> Run:
    """Run production forward and, with cotangents, backward.

    Args:
        pair: the declaration.
        inputs: arguments, already rounded to ``dtype``.
        dtype: dtype under test.
        cotangents: one per inexact output; ``None`` runs forward only.
        function: what to call; the bound production op by default.
        layout: how each input tensor is laid out in memory.
        cotangent_layout: the same for the cotangents.
        device: where to run.

    Raises:
        ParityError: a gradient was asked for and the outputs do not depend on any argument.
    """
    function = function or bound(pair)
    arguments = tensors(pair, inputs, dtype, device)
    if layout is not None:
        arguments = [layout(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    wrt = present(pair, inputs) if cotangents is not None else ()
    for position in wrt:
        arguments[position].requires_grad_()
    structure, outputs = flatten(function(*arguments))
    if cotangents is None:
        return Run(structure, outputs, {})
    smooth = [leaf for leaf in outputs if _inexact(leaf)]
    pulled = [to_torch(c, result_dtype(pair, dtype), device) for c in cotangents]
    # PyTorch's gradient of a complex function is the conjugate of JAX's transpose
    pulled = [(c.conj().resolve_conj() if c.is_complex() else c) for c in pulled]
    if cotangent_layout is not None:
        pulled = [cotangent_layout(c) for c in pulled]
    return Run(structure, outputs, _pull([arguments[p] for p in wrt], wrt, smooth, pulled))


def _pull(
    arguments: list[torch.Tensor], wrt: tuple[int, ...], outputs: list[torch.Tensor], pulled: list[torch.Tensor]
) -> dict[int, torch.Tensor | None]:
    if len(outputs) != len(pulled):
        raise ParityError(f"expected {len(pulled)} differentiable outputs, got {len(outputs)}")
    attached = [(o, c) for o, c in zip(outputs, pulled, strict=True) if o.requires_grad]
    if not attached:
        raise ParityError(f"expected gradients of arguments {wrt}, but no output depends on any of them")
    for output, cotangent in attached:
        if output.shape != cotangent.shape or output.dtype != cotangent.dtype:
            raise ParityError(
                f"expected an output of shape {tuple(cotangent.shape)} and {cotangent.dtype}, "
                f"got {tuple(output.shape)} and {output.dtype}"
            )
    grads = torch.autograd.grad(
        [o for o, _ in attached], arguments, grad_outputs=[c for _, c in attached], allow_unused=True
    )
    conjugated = [g.conj().resolve_conj() if g is not None and g.is_complex() else g for g in grads]
    return dict(zip(wrt, conjugated, strict=True))


def _inexact(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def through_numpy(pair: OpPair, example: tuple[Any, ...]) -> Any:
    """Return production's outputs on one example in float64, as nested numpy arrays (used by laws)."""
    arguments = [to_torch(np.asarray(a) if is_array(a) or hasattr(a, "__array__") else a, "float64") for a in example]
    return map_leaves(to_numpy, bound(pair)(*arguments))
