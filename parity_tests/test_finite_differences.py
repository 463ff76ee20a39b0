"""Finite differences ask a pair for the derivatives that it declares, and for no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from parity_tests.harness import cases
from parity_tests.toy import SOUND


class Gradient(torch.autograd.Function):
    """The gradient of a product, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Any:  # noqa: ARG004
        return grad * weight, grad * x

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        raise NotImplementedError("there is no second derivative")


class Once(torch.autograd.Function):
    """A product whose gradient is that."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        return Gradient.apply(cotangents[0], *ctx.saved_tensors)


def test_what_is_declared_to_have_no_second_derivative_is_asked_for_none() -> None:
    pair = dataclasses.replace(
        SOUND,
        name="toy.once",
        reference=lambda x, weight: x * weight,
        production=lambda x, weight: Once.apply(x, weight),
        oracle=np.multiply,
        twice=False,
        laws=(),
    )
    (case,) = cases([pair], ["gradcheck"])
    case.run()
