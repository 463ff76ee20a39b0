"""Finite differences ask a pair for the derivatives that it declares, and for no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from parity_tests.harness import cases
from parity_tests.toy import SOUND


class Once(torch.autograd.Function):
    """A product whose backward pass has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return cotangents[0] * weight, cotangents[0] * x


def test_what_is_declared_to_have_no_second_derivative_is_asked_for_none() -> None:
    pair = dataclasses.replace(
        SOUND,
        name="toy.once",
        reference=lambda x, weight: (x * weight) ** 2,
        production=lambda x, weight: Once.apply(x, weight).square(),
        oracle=lambda x, weight: np.square(x * weight),
        twice=False,
        laws=(),
    )
    (case,) = cases([pair], ["gradcheck"])
    case.run()
