"""Launchers of the fast weights' kernels, interpreted, against a loop over tokens in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import fixed_tile

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs a process started with TRITON_INTERPRET=1"),
]
kernels = pytest.importorskip("so8t_torch.ops.hebbian.kernels")
GIVEN = ("q", "k", "v", "log_decay", "eta", "initial")
ROUNDING = {torch.float64: 4e-15, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def drawn(kind: torch.dtype, length: int = 37, dk: int = 5, dv: int = 9, resets: bool = True) -> dict[str, Any]:
    """Draw a call whose decays go from nothing forgotten to all of it."""
    generator = torch.Generator().manual_seed(length)
    batch, heads = 2, 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x: dict[str, Any] = {name: normal(batch, length, heads, width) for name, width in (("q", dk), ("k", dk), ("v", dv))}
    x |= {"dy": normal(batch, length, heads, dv), "initial": normal(batch, heads, dk, dv)}
    x |= {"dfinal": normal(batch, heads, dk, dv), "eta": torch.rand(batch, length, heads, dtype=torch.float64)}
    x["log_decay"] = -normal(batch, length, heads).abs() ** 3
    x["log_decay"][0, ::3] = 0.0
    x["log_decay"][:, length // 2, 0] = -torch.inf
    x["log_decay"][1, length // 3, 1] = -1000.0
    half = {torch.bfloat16, torch.float16} & {kind}
    carried = torch.float32 if half else kind
    x = {name: y.to(kind if name in ("q", "k", "v", "dy") else carried) for name, y in x.items()}
    x["reset"] = torch.zeros(batch, length, dtype=torch.bool) if resets else None
    if resets:
        x["reset"][0, [0, 20, 21]] = x["reset"][1, length - 1] = True
    return x


def loop(x: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the outputs, the last state and all gradients, token by token in float64."""
    q, k, v, dy = (x[name].double().numpy() for name in ("q", "k", "v", "dy"))
    a, eta = np.exp(x["log_decay"].double().numpy()), x["eta"].double().numpy()
    kept = np.ones(a.shape[:2], bool) if x["reset"] is None else ~x["reset"].numpy()
    state = np.zeros((q.shape[0], *q.shape[2:], v.shape[-1])) if x["initial"] is None else x["initial"].double().numpy()
    found = {name: np.zeros_like(y) for name, y in (("y", v), ("q", q), ("k", k), ("v", v), ("log_decay", a))}
    found["eta"] = np.zeros_like(a)
    before = []
    for t in range(q.shape[1]):
        before.append(np.where(kept[:, t, None, None, None], state, 0.0))
        write = np.where(eta[:, t] != 0, eta[:, t], 0.0)[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        state = np.where(kept[:, t, None, None, None], a[:, t, :, None, None] * before[t], 0.0) + write
        found["y"][:, t] = np.einsum("bhij,bhi->bhj", state, q[:, t])
        found["q"][:, t] = np.einsum("bhij,bhj->bhi", state, dy[:, t])
    found["final"] = state
    adjoint = np.zeros_like(state) if x["dfinal"] is None else x["dfinal"].double().numpy()
    for t in range(q.shape[1])[::-1]:
        adjoint = adjoint + q[:, t, :, :, None] * dy[:, t, :, None]
        into_v, into_k = (np.einsum(how, adjoint, y[:, t]) for how, y in (("bhij,bhi->bhj", k), ("bhij,bhj->bhi", v)))
        found["v"][:, t], found["k"][:, t] = eta[:, t, :, None] * into_v, eta[:, t, :, None] * into_k
        found["eta"][:, t] = (into_v * v[:, t]).sum(-1)
        passed = np.where(kept[:, t, None, None, None], a[:, t, :, None, None] * adjoint, 0.0)
        found["log_decay"][:, t] = (passed * before[t]).sum((-2, -1))
        adjoint = passed
    return {**found, "initial": adjoint}


def forward(x: dict[str, Any], chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.forward(*(x[name] for name in GIVEN), x["reset"], chunk)


def backward(x: dict[str, Any], states: Tensor | None, chunk: int) -> dict[str, Tensor]:
    found = kernels.backward(x["dy"], x["dfinal"], *(x[name] for name in GIVEN), x["reset"], states, chunk)
    return dict(zip(GIVEN, found, strict=True))


def off(found: Tensor, wanted: np.ndarray) -> float:
    """Return the largest difference in units of the largest number, over everything but rows and heads."""
    return float(np.abs(found.double().numpy() - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("kind", list(ROUNDING))
@pytest.mark.parametrize(("chunk", "length"), [(16, 37), (64, 67), (32, 1)])
def test_chunks_give_what_the_loop_gives(kind, chunk, length):
    x = drawn(kind, length) if length > 21 else drawn(kind, length, resets=False)
    wanted = loop(x)
    y, final, states = forward(x, chunk)
    assert y.dtype == kind
    assert states.shape == (2, -(-length // chunk), 2, 5, 9)
    assert off(y, wanted["y"]) <= ROUNDING[kind]
    assert off(final, wanted["final"]) <= ROUNDING[final.dtype]
    for name, gradient in backward(x, states, chunk).items():
        assert gradient.shape == x[name].shape
        assert off(gradient, wanted[name]) <= ROUNDING[gradient.dtype], name
