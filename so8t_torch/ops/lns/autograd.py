"""Registration of the sign–log product with ``torch.library``: one node each for ``torch.compile``, ladder included.

Saved are the operands, the result, and what makes the gradient two exact GEMMs: on the CPU the linear product S, with
the kernels what rounding left out of the logs. The gradient has its own backward, made of plain operations in float64,
so that derivatives of every order exist.
Forward-mode derivatives do not pass through a registered operation; the public functions take the plain form there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.forward_mode import refuse_tangents
from so8t_torch.ops.lns import eager, gradient, ladder, rescaling


def product(
    sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor, mode: str, backend: str
) -> ladder.Product:
    """Return the product of (batch, M, K) and (batch, K, N) with its rungs; the kernels keep no linear product."""
    if backend == "triton":
        from so8t_torch.ops.lns import kernels

        sign, log, low, rung = kernels.matmul(sign_a, log_a, sign_b, log_b, mode)
        nothing = log.new_empty(0, dtype=torch.int8)
        return ladder.Product(nothing if sign is None else sign, log, low, rung.abs(), rung < 0)
    with _exact_float32():
        return ladder.matmul(rescaling.operands(sign_a, log_a, sign_b, log_b))


def _matmul(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    found = product(*arguments)
    return found.log, found.sign, found.scaled


def _gradient(
    g: Tensor, sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor,
    sign_c: Tensor, log_c: Tensor, scaled: Tensor, mode: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    factors = (sign_a, log_a, sign_b, log_b)
    if backend == "triton":
        from so8t_torch.ops.lns import kernels

        if mode == "max":
            return kernels.max_backward(g, *factors)
        return kernels.matmul_backward(g, None, *factors, None if sign_a is None else sign_c, log_c, scaled)
    with _exact_float32():
        return gradient.matmul(g, rescaling.operands(*factors), scaled, log_c)


def _in_range(log_a: Tensor, log_b: Tensor, total: Tensor) -> Tensor:
    return eager.in_range(log_a, log_b, total)


def _search(log_a: Tensor, log_b: Tensor) -> Tensor:
    return eager.search(log_a, log_b)


matmul = torch.library.custom_op(
    "so8t::lns_matmul",
    _matmul,
    mutates_args=(),
    schema="(Tensor? sign_a, Tensor log_a, Tensor? sign_b, Tensor log_b, str mode, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
matmul_gradient = torch.library.custom_op(
    "so8t::lns_matmul_gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor g, Tensor? sign_a, Tensor log_a, Tensor? sign_b, Tensor log_b, Tensor sign_c, Tensor log_c, "
    "Tensor scaled, str mode, str backend) -> (Tensor, Tensor)",
)
search = torch.library.custom_op(
    "so8t::lns_search", _search, mutates_args=(), schema="(Tensor log_a, Tensor log_b) -> Tensor"
)


in_range = torch.library.custom_op(
    "so8t::lns_in_range",
    _in_range,
    mutates_args=(),
    schema="(Tensor log_a, Tensor log_b, Tensor total) -> Tensor",
)


@in_range.register_fake
def _(_log_a: Tensor, _log_b: Tensor, total: Tensor) -> Tensor:
    return total.new_empty(())


@matmul.register_fake
def _(sign_a: Tensor | None, log_a: Tensor, _sign_b: Any, log_b: Tensor, *_: Any) -> tuple[Tensor, ...]:
    log = log_a.new_empty(*log_a.shape[:-1], log_b.shape[-1])
    sign = log_a.new_empty(0 if sign_a is None else log.shape, dtype=torch.int8)
    return log, sign, torch.empty_like(log)


@matmul_gradient.register_fake
def _(_g: Tensor, _sign_a: Any, log_a: Tensor, _sign_b: Any, log_b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return log_a.new_empty(log_a.shape), log_b.new_empty(log_b.shape)


@search.register_fake
def _(log_a: Tensor, log_b: Tensor) -> Tensor:
    return log_a.new_empty(*log_a.shape[:-1], log_b.shape[-1], dtype=torch.int64)


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, ctx.mode, ctx.backend = inputs
    log, sign, scaled = output
    ctx.save_for_backward(*saved, sign, log, scaled)
    ctx.set_materialize_grads(False)


def _matmul_backward(ctx: Any, g: Tensor | None, _sign: Any, _scaled: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return None, None, None, None, None, None
    da, db = matmul_gradient(g.contiguous(), *ctx.saved_tensors, ctx.mode, ctx.backend)
    return None, da, None, db, None, None


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    g, sign_a, log_a, sign_b, log_b, sign_c, log_c, _scaled, ctx.mode, _backend = inputs
    ctx.save_for_backward(g, sign_a, log_a, sign_b, log_b, sign_c, log_c)


def _gradient_backward(ctx: Any, along_a: Tensor, along_b: Tensor) -> tuple[Tensor | None, ...]:
    g, sign_a, log_a, sign_b, log_b, sign_c, log_c = ctx.saved_tensors
    factors, directions = (sign_a, log_a, sign_b, log_b), (along_a, along_b)
    if ctx.mode == "max":
        return eager.along_largest(factors, directions, search), *[None] * 9
    found = eager.second_gradient(g, factors, None if sign_a is None else sign_c, log_c, directions, in_range)
    dg, da, db, dc = (x.to(g.dtype) for x in found)
    return dg, None, da, None, db, None, dc, None, None, None


matmul.register_autograd(_matmul_backward, setup_context=_save_matmul)
matmul_gradient.register_autograd(_gradient_backward, setup_context=_save_gradient)
refuse_tangents(matmul, matmul_gradient, search, in_range)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Compute float32 GEMMs in float32, whatever autocast or the global precision flags say: the proof needs it."""
    coarse = torch.backends.mkldnn.matmul.fp32_precision not in ("none", "ieee")  # type: ignore[attr-defined]
    plain = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None, fp32_precision=None)
    with torch.autocast("cpu", enabled=False), plain if coarse else nullcontext():
        yield
