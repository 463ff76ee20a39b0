"""Registration of the recurrence and its gradient with ``torch.library``: one node each for ``torch.compile``.

Only a and h are saved, and h only where a wants a gradient. Its gradient has its own backward, of plain operations,
so that derivatives of every order exist. Forward-mode derivatives do not pass through a registered operation; the
public functions take the plain form there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.forward_mode import register_autograd
from so8t_torch.core.operators import define
from so8t_torch.ops.linear_recurrence import eager

Three = tuple[Tensor, Tensor, Tensor]


def _recurrence(
    a: Tensor, b: Tensor, initial: Tensor | None, restart: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from so8t_torch.ops.linear_recurrence import kernels

        return kernels.recurrence(a, b, initial, restart, reverse)
    return eager.recurrence_blocked(a, b, initial, restart, reverse)


def _gradient(
    grad: Tensor,
    grad_final: Tensor,
    a: Tensor,
    h: Tensor | None,
    initial: Tensor | None,
    restart: Tensor | None,
    reverse: bool,
    backend: str,
) -> Three:
    if backend == "triton":
        from so8t_torch.ops.linear_recurrence import kernels

        return kernels.gradient(grad, grad_final, a, h, initial, restart, reverse)
    return eager.gradient_blocked(grad, grad_final, a, h, initial, restart, reverse)


recurrence = define(
    "linear_recurrence",
    _recurrence,
    "(Tensor a, Tensor b, Tensor? initial, Tensor? restart, bool reverse, str backend) -> (Tensor, Tensor)",
)
gradient = define(
    "linear_recurrence_gradient",
    _gradient,
    "(Tensor grad, Tensor grad_final, Tensor a, Tensor? h, Tensor? initial, Tensor? restart, bool reverse, "
    "str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(recurrence)
def _(_a: Tensor, b: Tensor, initial: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    final = b.new_empty((b.shape[0], b.shape[2]), dtype=b.dtype if initial is None else initial.dtype)
    return b.new_empty(b.shape), final


@torch.library.register_fake(gradient)
def _(grad: Tensor, grad_final: Tensor, a: Tensor, h: Tensor | None, *_: Any) -> Three:
    da = a.new_empty((0,) if h is None else a.shape)
    return da, grad.new_empty(grad.shape), grad_final.new_empty(grad_final.shape)


def _save_recurrence(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, initial, restart, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(a, output[0] if ctx.needs_input_grad[0] else None, initial, restart)


def _recurrence_backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    a, h, initial, restart = ctx.saved_tensors
    da, db, dinitial = gradient(grad, grad_final, a, h, initial, restart, ctx.reverse, ctx.backend)
    return None if h is None else da, db, None if initial is None else dinitial, None, None, None


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:  # noqa: ARG001
    *saved, ctx.reverse, _ = inputs
    ctx.save_for_backward(*saved)


def _gradient_backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
    *given, restart = ctx.saved_tensors
    places = [place for place, x in enumerate(given) if x is not None]

    def plain(*present: Tensor) -> Three:
        full: list[Tensor | None] = [None] * len(given)
        for place, x in zip(places, present, strict=True):
            full[place] = x
        grad, grad_final, a, h, initial = full
        return eager.gradient(grad, grad_final, a, h, initial, restart, ctx.reverse)  # type: ignore[arg-type]

    pull = torch.func.vjp(plain, *(given[place] for place in places))[1]
    found: list[Tensor | None] = [None] * len(given)
    for place, x in zip(places, pull(directions), strict=True):
        found[place] = x
    return *found, None, None, None


register_autograd(recurrence, _recurrence_backward, _save_recurrence)
register_autograd(gradient, _gradient_backward, _save_gradient)
