"""Registration of the operator in chunks with ``torch.library``: one node for ``torch.compile``.

Saved are the arguments, no states. The gradient is made of plain operations and of
the linear recurrence, so that derivatives of every order exist. Forward-mode derivatives do not pass through a
registered operation; the public function takes the plain form there. Autocast is off inside, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.forward_mode import register_autograd
from so8t_torch.core.operators import define
from so8t_torch.core.precision import without_autocast
from so8t_torch.ops.semiseparable import eager


def _chunked(
    x: Tensor, u: Tensor, v: Tensor, decay: Tensor, initial: Tensor, run: Tensor | None
) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device):
        return eager.operate(x, u, v, decay, initial, run)


chunked = define(
    "semiseparable_chunks",
    _chunked,
    "(Tensor x, Tensor u, Tensor v, Tensor decay, Tensor initial, Tensor? run) -> (Tensor, Tensor)",
)


@torch.library.register_fake(chunked)
def _(x: Tensor, _u: Tensor, _v: Tensor, _decay: Tensor, initial: Tensor, _run: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), initial.new_empty(initial.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    with without_autocast(grad.device):
        return (*eager.gradient(grad, grad_final, *saved), None)


register_autograd(chunked, _backward, setup_context=_save)
