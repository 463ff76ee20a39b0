"""Registration of the rotation with PyTorch: one node per call, for autograd, torch.compile and every device.

Each operator and its backward are registered together; the backward is made of the same two operators, so that
derivatives of every order exist. Only x and R are kept, and x only where R is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.backend import triton_installed
from so8t_torch.core.forward_mode import refuse_tangents
from so8t_torch.ops.rotation import charts, eager

Backward = Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor]]


def _shaped_like(tensor: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else tensor.new_empty(0)


def _register_rotate(name: str, forward: Callable[[Tensor, Tensor], Tensor], backward: Backward) -> Any:
    """Register ``so8t::<name>`` and ``so8t::<name>_backward``; return the first."""
    rotate = torch.library.custom_op(
        f"so8t::{name}", forward, mutates_args=(), schema="(Tensor rotation, Tensor x) -> Tensor"
    )
    rotate_backward = torch.library.custom_op(
        f"so8t::{name}_backward",
        backward,
        mutates_args=(),
        schema="(Tensor dy, Tensor rotation, Tensor x, bool need_rotation, bool need_x) -> (Tensor, Tensor)",
    )

    @rotate.register_fake
    def _(_rotation: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @rotate_backward.register_fake
    def _(dy: Tensor, rotation: Tensor, _x: Tensor, need_rotation: bool, need_x: bool) -> tuple[Tensor, Tensor]:
        return _shaped_like(rotation, need_rotation), _shaped_like(dy, need_x)

    def keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        del output
        rotation, x = inputs
        ctx.save_for_backward(rotation, x if ctx.needs_input_grad[0] else None)

    def differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rotation, x = ctx.saved_tensors
        need_rotation, need_x = ctx.needs_input_grad
        dR, dx = rotate_backward(dy, rotation, dy if x is None else x, need_rotation, need_x)
        return dR if need_rotation else None, dx if need_x else None

    def keep_all(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Any) -> None:
        del output
        *tensors, ctx.need_rotation, ctx.need_x = inputs
        ctx.save_for_backward(*tensors)

    def differentiate_backward(ctx: Any, grad_dR: Tensor, grad_dx: Tensor) -> tuple[Tensor | None, ...]:
        """⟨V, Σ dy xᵀ⟩ + ⟨u, Rᵀ dy⟩: R u and V x go to dy, Σ dy uᵀ to R, Vᵀ dy to x."""
        dy, rotation, x = ctx.saved_tensors
        to_dy, to_rotation, to_x = torch.zeros_like(dy), None, None
        if ctx.need_x:
            to_dy = to_dy + rotate(rotation, grad_dx)
            to_rotation, _ = rotate_backward(dy, rotation, grad_dx, True, False)
        if ctx.need_rotation:
            V = grad_dR.to(rotation.dtype)
            to_dy = to_dy + rotate(V, x)
            _, to_x = rotate_backward(dy, V, x, False, True)
        return to_dy, to_rotation, to_x, None, None

    rotate.register_autograd(differentiate, setup_context=keep)
    rotate_backward.register_autograd(differentiate_backward, setup_context=keep_all)
    refuse_tangents(rotate, rotate_backward)
    return rotate


rotate_eager = _register_rotate("rotate_eager", eager.rotate, eager.rotate_backward)


def _rotate_triton(rotation: Tensor, x: Tensor) -> Tensor:
    from so8t_torch.ops.rotation import kernels

    return kernels.rotate(rotation, x)


def _rotate_triton_backward(
    dy: Tensor, rotation: Tensor, x: Tensor, need_rotation: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    from so8t_torch.ops.rotation import kernels

    dR, dx = rotation.new_empty(0), dy.new_empty(0)
    if need_rotation:
        dR, full_dx = kernels.rotate_backward(dy, rotation, x)
        return dR.to(rotation.dtype), full_dx if need_x else dx
    return dR, kernels.rotate(rotation.mT, dy) if need_x else dx


rotate_triton: Any = (
    _register_rotate("rotate_triton", _rotate_triton, _rotate_triton_backward) if triton_installed() else None
)

exponential = torch.library.custom_op(
    "so8t::exponential", charts.exponential, mutates_args=(), schema="(Tensor coordinates) -> Tensor"
)
exponential_adjoint = torch.library.custom_op(
    "so8t::exponential_adjoint",
    charts.exponential_adjoint,
    mutates_args=(),
    schema="(Tensor coordinates, Tensor grad) -> Tensor",
)


@exponential.register_fake
def _(coordinates: Tensor) -> Tensor:
    return coordinates.new_empty(*coordinates.shape[:-1], 8, 8)


@exponential_adjoint.register_fake
def _(coordinates: Tensor, _grad: Tensor) -> Tensor:
    return torch.empty_like(coordinates, memory_format=torch.contiguous_format)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _differentiate_exponential(ctx: Any, grad: Tensor) -> Tensor:
    return exponential_adjoint(*ctx.saved_tensors, grad)


def _differentiate_adjoint(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the adjoint's own arithmetic, which is made of differentiable operations only."""
    coordinates, grad = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
    with torch.enable_grad():
        adjoint = charts.exponential_adjoint(coordinates, grad)
    to_coordinates, to_grad = torch.autograd.grad(adjoint, (coordinates, grad), cotangent)
    return to_coordinates, to_grad


exponential.register_autograd(_differentiate_exponential, setup_context=_keep_inputs)
exponential_adjoint.register_autograd(_differentiate_adjoint, setup_context=_keep_inputs)


away_from_cut = torch.library.custom_op(
    "so8t::away_from_cut",
    charts.away_from_cut,
    mutates_args=(),
    schema="(Tensor rotation, float cut_margin) -> Tensor",
)


@away_from_cut.register_fake
def _(rotation: Tensor, _cut_margin: float) -> Tensor:
    return torch.empty_like(rotation)


def _pass_through(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


away_from_cut.register_autograd(_pass_through)
refuse_tangents(exponential, exponential_adjoint, away_from_cut)
