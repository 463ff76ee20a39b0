"""Sends each row's gradient to one of the two rotation factors, the forward value unchanged.

    y = R_cmd R_safe x;   rows sent to safe:  ∂L/∂A_cmd = 0,   the others:  ∂L/∂A_safe = 0

Both branches compute the same y, one with R_cmd held constant, one with R_safe held constant; the backward pass
gives each row's gradient to one branch. The rows are kept on the autograd node, not among its saved tensors, so
that non-reentrant checkpointing, which recomputes saved tensors only, uses the rows of the original forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from so8t_torch.core.errors import TrainingError


class GateRoutes:
    """The rows of the current batch whose gradient goes to R_safe; one object shared by all layers of a model."""

    def __init__(self) -> None:
        self.rows_to_safe: Tensor | None = None

    def set(self, rows_to_safe: Bool[Tensor, "*rows"] | None) -> None:
        """Replace the routes; None forgets them.

        Raises:
            TrainingError: the tensor is not boolean or has no row axis.
        """
        if rows_to_safe is not None and (rows_to_safe.dtype != torch.bool or rows_to_safe.ndim == 0):
            raise TrainingError(
                "set_gate_routes: expected a boolean tensor (batch,) or (batch, tokens), True where the gradient goes "
                f"to R_safe, got {rows_to_safe.dtype} {tuple(rows_to_safe.shape)}."
            )
        self.rows_to_safe = rows_to_safe

    def for_output(self, shape: torch.Size) -> Tensor | None:
        """Return the routes that fit an output of this shape.

        While a backward pass runs the call comes from checkpoint recomputation: then routes that no longer fit are
        answered with None, and only using that answer in a backward pass is an error (``send``).

        Raises:
            TrainingError: no routes are set, or their rows are not those of the batch.
        """
        rows = self.rows_to_safe
        if rows is not None and rows.shape == shape[: rows.ndim] and rows.ndim < len(shape):
            return rows
        if torch._C._current_graph_task_id() != -1:
            return None
        if rows is None:
            raise TrainingError(
                "train_gates='routed': expected the routes of this batch before a training forward pass; call "
                "model.set_gate_routes(rows_to_safe) with True for rows labelled ESCALATE or REFUSE."
            )
        raise TrainingError(
            f"train_gates='routed': expected routes for a batch of shape {tuple(shape[:-1])}, got routes of shape "
            f"{tuple(rows.shape)}; call model.set_gate_routes with the rows of this batch."
        )


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, to_safe: Tensor, to_cmd: Tensor, rows: Tensor | None) -> Tensor:
        del to_cmd
        ctx.rows = rows
        return to_safe.view_as(to_safe)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        if ctx.rows is None:
            raise TrainingError(
                "train_gates='routed': the routes were dropped between a forward pass and its backward pass; keep "
                "them until backward has finished, or checkpoint with use_reentrant=False."
            )
        rows = ctx.rows.to(gradient.device)
        rows = rows.reshape(rows.shape + (1,) * (gradient.ndim - rows.ndim))
        zero = gradient.new_zeros(())
        return torch.where(rows, gradient, zero), torch.where(rows, zero, gradient), None


def send(
    to_safe: Float[Tensor, "*batch channels"],
    to_cmd: Float[Tensor, "*batch channels"],
    rows_to_safe: Bool[Tensor, "*rows"] | None,
) -> Float[Tensor, "*batch channels"]:
    """Return ``to_safe``, whose values ``to_cmd`` shares, and give each row's gradient to one of the two.

    Args:
        to_safe: the output computed with R_cmd constant.
        to_cmd: the output computed with R_safe constant.
        rows_to_safe: over the leading axes of the output; None if no backward pass will use this call.
    """
    return _Send.apply(to_safe, to_cmd, rows_to_safe)
