"""Registration of chunks acting on inputs and states with ``torch.library``: one node for ``torch.compile``.

Saved are the inputs and the small matrices of the chunks, no states. The gradient is made of plain operations and of
the linear recurrence, so that derivatives of every order exist. Forward-mode derivatives do not pass through a
registered operation; the public function takes the plain form there. Autocast is off inside, forward and backward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.forward_mode import register_autograd
from so8t_torch.ops.semiseparable import eager
from so8t_torch.ops.semiseparable.eager import Chunks


def _chunked(
    x: Tensor,
    within: Tensor,
    reads: Tensor,
    writes: Tensor,
    totals: Tensor,
    initial: Tensor,
    run: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return eager.apply(x, Chunks(within, reads, writes, totals), initial, run)


@functools.cache
def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def _run(*arguments: Any) -> Any:
    # ``torch.library.custom_op`` would load the compiler (seconds) at the first call of a process without it
    body = _untraced(_chunked) if "torch._dynamo" in sys.modules else _chunked
    return body(*arguments)


torch.library.define(
    "so8t::semiseparable_chunks",
    "(Tensor x, Tensor within, Tensor reads, Tensor writes, Tensor totals, Tensor initial, Tensor? run) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("so8t::semiseparable_chunks", "default", _run)
chunked = torch.ops.so8t.semiseparable_chunks.default


@torch.library.register_fake(chunked)
def _(x: Tensor, _within: Tensor, _reads: Tensor, _writes: Tensor, _totals: Tensor, initial: Tensor, _run: Any) -> Any:
    return x.new_empty(x.shape), initial.new_empty(initial.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    x, within, reads, writes, totals, initial, _ = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        parts = Chunks(within, reads, writes, totals)
        return (*eager.gradient(grad, grad_final, x, parts, initial), None)


register_autograd(chunked, _backward, setup_context=_save)
