"""Registration of the fast weights and their gradient with ``torch.library``: one node each for ``torch.compile``.

Saved are the arguments and the states that enter the chunks. The gradient's own backward differentiates the plain loop
twice, so that derivatives of every order exist. Forward-mode derivatives do not pass through a registered operation;
the public functions take the plain form there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.forward_mode import register_autograd
from so8t_torch.core.operators import define
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops.hebbian import eager

INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor eta, Tensor? initial, Tensor? restart"


def _hebbian(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    restart: Tensor | None,
    delta: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from so8t_torch.ops.hebbian import kernels

        # float32 keys of a half-precision stream came from its dtype
        return kernels.forward(q, k.to(v.dtype), v, log_decay, eta, initial, restart, eager.CHUNK)
    return eager.recurrence_chunked(q, k, v, log_decay, eta, initial, restart, delta)


def _gradient(
    grad: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    restart: Tensor | None,
    states: Tensor,
    delta: bool,
    backend: str,
) -> eager.Grads:
    if backend == "triton":
        from so8t_torch.ops.hebbian import kernels

        ends = initial, restart, states, eager.CHUNK
        found = kernels.backward(grad, grad_final, q, k.to(v.dtype), v, log_decay, eta, *ends)
        return found[0], found[1].to(k.dtype), *found[2:]
    return eager.gradient_chunked(grad, grad_final, q, k, v, log_decay, eta, states, restart, delta)


hebbian = define("hebbian", _hebbian, f"({INPUTS}, bool delta, str backend) -> (Tensor, Tensor, Tensor)")
gradient = define(
    "hebbian_gradient",
    _gradient,
    f"(Tensor grad, Tensor grad_final, {INPUTS}, Tensor states, bool delta, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(hebbian)
def _(_q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, initial, _, delta, _ = others
    rows, length, heads, width = v.shape
    shape, chunks = (k.shape[-1], width), len(eager.chunks(length, delta))
    final = v.new_empty((rows, heads, *shape), dtype=v.dtype if initial is None else initial.dtype)
    states = v.new_empty((rows, chunks, heads, *shape), dtype=accumulation_dtype(v.dtype))
    return v.new_empty(v.shape), final, states


@torch.library.register_fake(gradient)
def _(_grad: Tensor, grad_final: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in given[:5]), grad_final.new_empty(grad_final.shape)


def _save_hebbian(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.delta, ctx.backend = inputs
    ctx.save_for_backward(*given, output[2])


def _hebbian_backward(ctx: Any, grad: Tensor, grad_final: Tensor, _states: Tensor) -> tuple[Tensor | None, ...]:
    *given, states = ctx.saved_tensors
    *found, dinitial = gradient(grad, grad_final, *given, states, ctx.delta, ctx.backend)
    return *found, None if given[5] is None else dinitial, None, None, None


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    *given, restart, _, ctx.delta, _ = inputs
    ctx.save_for_backward(*given, restart)


def _gradient_backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
    *given, restart = ctx.saved_tensors
    grad, grad_final, *numbers, initial = given
    start = initial if initial is not None else torch.zeros_like(grad_final)

    def plain(*arguments: Tensor) -> tuple[Tensor, ...]:
        def forward(
            q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, eta: Tensor, start: Tensor
        ) -> tuple[Tensor, Tensor]:
            return eager.recurrence(q, k, v, log_decay, eta, start, restart, delta=ctx.delta)

        return torch.func.vjp(forward, *arguments[2:])[1](arguments[:2])

    found = torch.func.vjp(plain, grad, grad_final, *numbers, start)[1](directions)
    return *found[:-1], None if initial is None else found[-1], None, None, None, None


register_autograd(hebbian, _hebbian_backward, setup_context=_save_hebbian)
register_autograd(gradient, _gradient_backward, setup_context=_save_gradient)
