"""Registration of the ratios and of the linear scan with ``torch.library``: one node each for ``torch.compile``.

The derivative of either is a linear scan against the sweep and products of what was saved, so both are
differentiable to any order: β and the ratios are saved, or the multipliers and the result. Forward-mode derivatives do
not pass through a registered operation, which refuses tangents; the public functions take the plain form there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.forward_mode import register_autograd
from so8t_torch.core.operators import define
from so8t_torch.ops.tridiagonal import eager


def _ratios(d: Tensor, beta: Tensor, reverse: Sequence[bool], backend: str) -> Tensor:
    if backend == "triton":
        from so8t_torch.ops.tridiagonal import kernels

        return kernels.ratios(d, beta, reverse)
    return eager.ratios_blocked(d, beta, reverse)


def _linear_scan(m: Tensor, s: Tensor, reverse: Sequence[bool], backend: str) -> Tensor:
    if backend == "triton":
        from so8t_torch.ops.tridiagonal import kernels

        return kernels.linear_scan(m, s, reverse)
    return eager.linear_scan_blocked(m, s, reverse)


ratios = define("tridiagonal_ratios", _ratios, "(Tensor d, Tensor beta, bool[] reverse, str backend) -> Tensor")
linear_scan = define(
    "tridiagonal_linear_scan", _linear_scan, "(Tensor m, Tensor s, bool[] reverse, str backend) -> Tensor"
)


@torch.library.register_fake(ratios)
def _(_d: Tensor, beta: Tensor, reverse: Sequence[bool], _backend: str) -> Tensor:
    return beta.new_empty((len(reverse), *beta.shape))


@torch.library.register_fake(linear_scan)
def _(_m: Tensor, s: Tensor, _reverse: Sequence[bool], _backend: str) -> Tensor:
    return s.new_empty(s.shape)


def _save_ratios(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    d, beta, ctx.reverse, ctx.backend = inputs
    ctx.dtype = d.dtype
    ctx.save_for_backward(beta, output)


def _ratios_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    beta, ratio = ctx.saved_tensors
    multiplier = eager.onward(beta, ratio, ctx.reverse).conj().resolve_conj()
    adjoint = linear_scan(multiplier, grad, [not backwards for backwards in ctx.reverse], ctx.backend)
    return adjoint.sum(0, dtype=ctx.dtype), eager.coupling_gradient(adjoint, ratio, ctx.reverse), None, None


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    m, _, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(m, output)


def _scan_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    m, x = ctx.saved_tensors
    against = [not backwards for backwards in ctx.reverse]
    multiplier = eager.shifted(m, against).conj().resolve_conj()
    source = linear_scan(multiplier, grad, against, ctx.backend)
    return source * eager.shifted(x, ctx.reverse).conj(), source, None, None


register_autograd(ratios, _ratios_backward, setup_context=_save_ratios)
register_autograd(linear_scan, _scan_backward, setup_context=_save_scan)
