"""Registration of the rows and the head with ``torch.library``: one node each for ``torch.compile``.

Saved are the ids and the cores of rows; hidden, targets, the cores and one log-sum-exp per token of the head. Every
gradient has its own backward, made of plain operations, so that derivatives of every order exist. Forward-mode
derivatives do not pass through a registered operation; the public functions take the plain form there. Autocast is off
inside, forward and backward: every sum is carried in the dtype that the operation states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.errors import DomainError
from so8t_torch.core.forward_mode import register_autograd
from so8t_torch.core.operators import define
from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.ops.tensor_train import eager, head

TRITON = ("triton", "triton_atomic")


def _checked(ids: Tensor, limit: int, allowed: int | None, op: str, what: str) -> Tensor:
    outside = (ids < 0) | (ids >= limit)
    if allowed is not None:
        outside &= ids != allowed
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        also = "" if allowed is None else f" or {allowed}"
        raise DomainError(
            f"{op}: expected {what} in [0, {limit}){also}, got {int(ids[place])} at position {place} "
            f"({int(outside.sum())} of {ids.numel()} are outside); check the vocabulary size and the tokenizer."
        )
    return ids.clone()


def _rows(ids: Tensor, cores: list[Tensor], d_model: int, padding: int | None, backend: str) -> Tensor:
    if backend in TRITON:
        from so8t_torch.ops.tensor_train import kernels

        return kernels.rows(_kernel_digits(ids, cores, padding), tuple(cores), d_model)
    return eager.rows_tiled(ids, cores, d_model, padding)


def _rows_gradient(grad: Tensor, ids: Tensor, cores: list[Tensor], padding: int | None, backend: str) -> list[Tensor]:
    if backend in TRITON:
        from so8t_torch.ops.tensor_train import kernels

        parts = _kernel_digits(ids, cores, padding)
        found = kernels.rows_backward(grad, parts, tuple(cores), atomic=backend == "triton_atomic")
        return [share.to(core.dtype) for share, core in zip(found, cores, strict=True)]
    return eager.rows_gradient_tiled(grad, ids, cores, padding)


def _kernel_digits(ids: Tensor, cores: list[Tensor], padding: int | None) -> tuple[Tensor, ...]:
    """Return the digits of the ids; the first is −1 where a row is zero, and too large where an id is negative."""
    left_out = torch.zeros_like(ids, dtype=torch.bool) if padding is None else ids == padding
    first, *rest = eager.digits(ids.clamp(min=0), cores)
    first = torch.where(ids < 0, cores[0].shape[0], first)
    return torch.where(left_out, -1, first), *rest


def _kernel_targets(targets: Tensor, ignore: int) -> Tensor:
    """Return targets with −1 for the ignored ones; −2, which no vocabulary holds, for every other negative one."""
    return torch.where(targets == ignore, -1, torch.where(targets < 0, -2, targets))


def _logits(hidden: Tensor, cores: list[Tensor], vocab_size: int) -> Tensor:
    return head.logits_tiled(hidden, cores, vocab_size)


def _logits_gradient(grad: Tensor, hidden: Tensor, cores: list[Tensor], vocab_size: int) -> list[Tensor]:
    return head.logits_gradient_tiled(grad, hidden, cores, vocab_size)


def _cross_entropy(
    hidden: Tensor, targets: Tensor, cores: list[Tensor], vocab_size: int, ignore: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from so8t_torch.ops.tensor_train import head_kernels

        aims = _kernel_targets(targets, ignore)
        loss, normaliser = head_kernels.head_forward(hidden, aims, cores[0], cores[1], vocab_size)
        return loss, normaliser.double()
    return head.cross_entropy_tiled(hidden, targets, cores, vocab_size, ignore)


def _cross_entropy_gradient(
    grad: Tensor,
    hidden: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    cores: list[Tensor],
    vocab_size: int,
    ignore: int,
    backend: str,
) -> list[Tensor]:
    if backend == "triton":
        from so8t_torch.ops.tensor_train import head_kernels

        aims = _kernel_targets(targets, ignore)
        found = head_kernels.head_backward(grad, hidden, aims, normaliser.float(), cores[0], cores[1], vocab_size)
        return [share.to(x.dtype) for share, x in zip(found, (hidden, *cores), strict=True)]
    return head.cross_entropy_gradient_tiled(grad, hidden, targets, normaliser, cores, vocab_size, ignore)


def _topk(hidden: Tensor, cores: list[Tensor], k: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    return head.topk_tiled(hidden, cores, k, vocab_size)


def _register(name: str, function: Callable[..., Any], schema: str) -> Any:
    """Define an operation of this room, which runs with autocast off."""

    def run(first: Tensor, *others: Any) -> Any:
        with without_autocast(first.device):
            return function(first, *others)

    return define(f"tensor_train_{name}", run, schema)


checked = _register("checked", _checked, "(Tensor ids, int limit, int? allowed, str op, str what) -> Tensor")
rows = _register("rows", _rows, "(Tensor ids, Tensor[] cores, int d_model, int? padding, str backend) -> Tensor")
rows_gradient = _register(
    "rows_gradient",
    _rows_gradient,
    "(Tensor grad, Tensor ids, Tensor[] cores, int? padding, str backend) -> Tensor[]",
)
logits = _register("logits", _logits, "(Tensor hidden, Tensor[] cores, int vocab_size) -> Tensor")
logits_gradient = _register(
    "logits_gradient", _logits_gradient, "(Tensor grad, Tensor hidden, Tensor[] cores, int vocab_size) -> Tensor[]"
)
cross_entropy = _register(
    "cross_entropy",
    _cross_entropy,
    "(Tensor hidden, Tensor targets, Tensor[] cores, int vocab_size, int ignore, str backend) -> (Tensor, Tensor)",
)
cross_entropy_gradient = _register(
    "cross_entropy_gradient",
    _cross_entropy_gradient,
    "(Tensor grad, Tensor hidden, Tensor targets, Tensor normaliser, Tensor[] cores, int vocab_size, int ignore, "
    "str backend) -> Tensor[]",
)
topk = _register("topk", _topk, "(Tensor hidden, Tensor[] cores, int k, int vocab_size) -> (Tensor, Tensor)")


@torch.library.register_fake(checked)
def _(ids: Tensor, *_: Any) -> Tensor:
    return torch.empty(ids.shape, dtype=torch.int64, device=ids.device)


@torch.library.register_fake(rows)
def _(ids: Tensor, cores: list[Tensor], d_model: int, *_: Any) -> Tensor:
    return cores[0].new_empty((ids.shape[0], d_model))


@torch.library.register_fake(rows_gradient)
def _(_grad: Tensor, _ids: Tensor, cores: list[Tensor], *_: Any) -> list[Tensor]:
    return [_like(core) for core in cores]


@torch.library.register_fake(logits)
def _(hidden: Tensor, _cores: list[Tensor], vocab_size: int) -> Tensor:
    return hidden.new_empty((hidden.shape[0], vocab_size))


@torch.library.register_fake(logits_gradient)
def _(_grad: Tensor, hidden: Tensor, cores: list[Tensor], *_: Any) -> list[Tensor]:
    return [_like(x) for x in (hidden, *cores)]


@torch.library.register_fake(cross_entropy)
def _(hidden: Tensor, targets: Tensor, cores: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(torch.promote_types(hidden.dtype, cores[0].dtype))
    return hidden.new_empty(targets.shape, dtype=dtype), hidden.new_empty(targets.shape, dtype=torch.float64)


@torch.library.register_fake(cross_entropy_gradient)
def _(_grad: Tensor, hidden: Tensor, _targets: Tensor, _normaliser: Tensor, cores: list[Tensor], *_: Any) -> Any:
    return [_like(x) for x in (hidden, *cores)]


@torch.library.register_fake(topk)
def _(hidden: Tensor, _cores: list[Tensor], k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((hidden.shape[0], k)), hidden.new_empty((hidden.shape[0], k), dtype=torch.int64)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ids, cores, _, ctx.padding, ctx.backend = inputs
    ctx.save_for_backward(ids, *cores)


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, *cores = ctx.saved_tensors
    return None, rows_gradient(grad, ids, cores, ctx.padding, ctx.backend), None, None, None


def _save_rows_gradient(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    grad, ids, cores, ctx.padding, _ = inputs
    ctx.save_for_backward(grad, ids, *cores)


def _rows_gradient_backward(ctx: Any, directions: list[Tensor]) -> tuple[Any, ...]:
    grad, ids, *cores = ctx.saved_tensors
    with without_autocast(grad.device):
        along, *turned = eager.rows_second(directions, grad, ids, cores, ctx.padding)
    return along, None, turned, None, None


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    hidden, cores, ctx.vocab_size = inputs
    ctx.save_for_backward(hidden, *cores)


def _logits_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, *cores = ctx.saved_tensors
    along, *turned = logits_gradient(grad, hidden, cores, ctx.vocab_size)
    return along, turned, None


def _save_logits_gradient(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    grad, hidden, cores, ctx.vocab_size = inputs
    ctx.save_for_backward(grad, hidden, *cores)


def _logits_gradient_backward(ctx: Any, directions: list[Tensor]) -> tuple[Any, ...]:
    grad, hidden, *cores = ctx.saved_tensors

    def gradient(g: Tensor, h: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        return head.logits_gradient(g, h, list(c), ctx.vocab_size)

    with without_autocast(grad.device):
        swung, along, *turned = torch.func.vjp(gradient, grad, hidden, *cores)[1](tuple(directions))
    return swung, along, turned, None


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, targets, cores, ctx.vocab_size, ctx.ignore, ctx.backend = inputs
    ctx.save_for_backward(hidden, targets, output[1], *cores)
    ctx.mark_non_differentiable(output[1])


def _cross_entropy_backward(ctx: Any, grad: Tensor, _normaliser: Tensor) -> tuple[Any, ...]:
    hidden, targets, normaliser, *cores = ctx.saved_tensors
    found = cross_entropy_gradient(grad, hidden, targets, normaliser, cores, ctx.vocab_size, ctx.ignore, ctx.backend)
    return found[0], None, found[1:], None, None, None


def _save_cross_entropy_gradient(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    grad, hidden, targets, _, cores, ctx.vocab_size, ctx.ignore, _ = inputs
    ctx.save_for_backward(grad, hidden, targets, *cores)


def _cross_entropy_gradient_backward(ctx: Any, directions: list[Tensor]) -> tuple[Any, ...]:
    grad, hidden, targets, *cores = ctx.saved_tensors

    def gradient(g: Tensor, h: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        return head.cross_entropy_gradient(g, h, targets, list(c), ctx.vocab_size, ctx.ignore)

    with without_autocast(grad.device):
        swung, along, *turned = torch.func.vjp(gradient, grad, hidden, *cores)[1](tuple(directions))
    return swung, along, None, None, turned, None, None, None


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, cores, *_ = inputs
    ctx.save_for_backward(hidden, output[1], *cores)
    ctx.mark_non_differentiable(output[1])


def _topk_backward(ctx: Any, grad: Tensor, _ids: Tensor) -> tuple[Any, ...]:
    hidden, ids, *cores = ctx.saved_tensors

    def chosen(h: Tensor, *c: Tensor) -> Tensor:
        return head.logits_at(h, ids, list(c))

    with without_autocast(grad.device):
        along, *turned = torch.func.vjp(chosen, hidden, *cores)[1](grad)
    return along, turned, None, None


register_autograd(rows, _rows_backward, setup_context=_save_rows)
register_autograd(rows_gradient, _rows_gradient_backward, setup_context=_save_rows_gradient)
register_autograd(logits, _logits_backward, setup_context=_save_logits)
register_autograd(logits_gradient, _logits_gradient_backward, setup_context=_save_logits_gradient)
register_autograd(cross_entropy, _cross_entropy_backward, setup_context=_save_cross_entropy)
register_autograd(cross_entropy_gradient, _cross_entropy_gradient_backward, setup_context=_save_cross_entropy_gradient)
register_autograd(topk, _topk_backward, setup_context=_save_topk)
register_autograd(checked)
