"""Registration of the energy and its gradient with ``torch.library``: one node each for ``torch.compile``.

Only h and the centres are saved. The gradient has its own backward, made of plain operations, so that derivatives of
every order exist. Forward-mode derivatives do not pass through a registered operation; the public functions take the
plain form there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.forward_mode import refuse_tangents
from so8t_torch.ops.second_difference import eager


def _energy(h: Tensor, valid: Tensor, delta: float, backend: str) -> Tensor:
    if backend == "triton":
        from so8t_torch.ops.second_difference import kernels

        return kernels.energy(h, valid, delta)
    return eager.energy_streamed(h, valid, delta)


def _gradient(grad: Tensor, h: Tensor, valid: Tensor, delta: float, backend: str) -> Tensor:
    if backend == "triton":
        from so8t_torch.ops.second_difference import kernels

        return kernels.gradient(grad, h, valid, delta)
    return eager.gradient_streamed(grad, h, valid, delta)


energy = torch.library.custom_op(
    "so8t::second_difference_energy",
    _energy,
    mutates_args=(),
    schema="(Tensor h, Tensor valid, float delta, str backend) -> Tensor",
)
gradient = torch.library.custom_op(
    "so8t::second_difference_gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor grad, Tensor h, Tensor valid, float delta, str backend) -> Tensor",
)


@energy.register_fake
def _(h: Tensor, *_: Any) -> Tensor:
    return h.new_empty((h.shape[0],), dtype=torch.float64)


@gradient.register_fake
def _(_grad: Tensor, h: Tensor, *_: Any) -> Tensor:
    return torch.empty(h.shape, dtype=h.dtype, device=h.device)


def _save_energy(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    h, valid, ctx.delta, ctx.backend = inputs
    ctx.save_for_backward(h, valid)


def _energy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gradient(grad, *ctx.saved_tensors, ctx.delta, ctx.backend), None, None, None


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    grad, h, valid, ctx.delta, _ = inputs
    ctx.save_for_backward(grad, h, valid)


def _gradient_backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
    grad, h, valid = ctx.saved_tensors
    return *eager.second_gradient(grad, h, valid, ctx.delta, direction), None, None, None


energy.register_autograd(_energy_backward, setup_context=_save_energy)
gradient.register_autograd(_gradient_backward, setup_context=_save_gradient)
refuse_tangents(energy, gradient)
