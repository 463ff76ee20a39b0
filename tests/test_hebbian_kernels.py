"""Launchers of the fast weights' kernels, interpreted, against a loop over tokens in NumPy."""

from __future__ import annotations

import importlib
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
pytest.importorskip("triton")
kernels = importlib.import_module("so8t_torch.ops.hebbian.kernels")
GIVEN = ("q", "k", "v", "log_decay", "eta", "initial")
ROUNDING = {torch.float64: 4e-15, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def drawn(kind: torch.dtype, length: int = 37, batch: int = 1, dk: int = 5, dv: int = 9) -> dict[str, Any]:
    """Draw a call whose decays go from nothing forgotten to all of it."""
    generator = torch.Generator().manual_seed(length)
    heads = 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x: dict[str, Any] = {name: normal(batch, length, heads, width) for name, width in (("q", dk), ("k", dk), ("v", dv))}
    x |= {"dy": normal(batch, length, heads, dv), "initial": normal(batch, heads, dk, dv)}
    x |= {"dfinal": normal(batch, heads, dk, dv), "eta": torch.rand(batch, length, heads, dtype=torch.float64)}
    x["log_decay"] = -(normal(batch, length, heads).abs() ** 3)
    x["log_decay"][0, ::3] = 0.0
    x["log_decay"][:, length // 2, 0] = -torch.inf
    x["log_decay"][-1, length // 3, 1] = -1000.0
    half = {torch.bfloat16, torch.float16} & {kind}
    carried = torch.float32 if half else kind
    x = {name: y.to(kind if name in ("q", "k", "v", "dy") else carried) for name, y in x.items()}
    x["reset"] = torch.zeros(batch, length, dtype=torch.bool)
    x["reset"][0, [length // 5, length // 2 + 2, length // 2 + 3]] = x["reset"][-1, -1] = True
    return x


@np.errstate(invalid="ignore")
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
        write = eta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
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
    """Return the largest difference in units of the largest number, where there is one."""
    return float(np.abs(found.double().numpy() - wanted).max() / (np.abs(wanted).max() or 1.0))


def check(x: dict[str, Any], chunk: int) -> None:
    """Compare everything that the launchers return with the loop."""
    wanted = loop(x)
    y, final, states = forward(x, chunk)
    batch, length, heads, dk = x["k"].shape
    assert y.dtype == x["v"].dtype
    assert states.shape == (batch, -(-length // chunk), heads, dk, x["v"].shape[-1])
    assert off(y, wanted["y"]) <= ROUNDING[y.dtype]
    assert off(final, wanted["final"]) <= ROUNDING[final.dtype]
    for name, gradient in backward(x, states, chunk).items():
        if x[name] is not None:
            assert (gradient.shape, gradient.dtype) == (x[name].shape, x[name].dtype)
        assert off(gradient, wanted[name]) <= ROUNDING[gradient.dtype], name


@pytest.mark.parametrize("kind", list(ROUNDING))
def test_a_chunk_and_a_part_of_one_give_what_the_loop_gives(kind):
    check(drawn(kind, length=67), 64)


def test_rows_heads_and_many_chunks_give_what_the_loop_gives():
    check(drawn(torch.float64, length=37, batch=2), 16)


def test_keys_wider_than_a_tile_give_what_the_loop_gives():
    check(drawn(torch.float32, length=17, dk=40, dv=70), 16)


def test_one_token_without_state_or_segments_gives_its_own_write():
    x = drawn(torch.float32, length=11)
    x = {name: None if name in ("initial", "dfinal", "reset") else y[:, :1] for name, y in x.items()}
    check(x, 16)


def test_states_are_made_again_where_they_were_not_kept():
    x = drawn(torch.float32, length=19)
    _, _, states = forward(x, 16)
    kept, again = backward(x, states, 16), backward(x, None, 16)
    assert all(torch.equal(kept[name], again[name]) for name in GIVEN)


def test_every_tile_gives_the_same_numbers():
    x = drawn(torch.float32, length=19, dk=40, dv=70)
    results = []
    for index in range(2):
        with fixed_tile(index):
            y, final, states = forward(x, 32)
            results.append([y, final, *backward(x, states, 32).values()])
    for one, other in zip(*results, strict=True):
        assert off(one, other.double().numpy()) <= ROUNDING[torch.float32]


def test_two_halves_with_the_state_between_them_are_one_run_bit_by_bit():
    x = drawn(torch.float32)
    whole, last, _ = forward(x, 16)
    parts = []
    for part in (slice(0, 32), slice(32, None)):
        cut = {name: x[name][:, part] for name in (*GIVEN[:5], "reset")}
        y, state, _ = forward({**cut, "initial": x["initial"] if part.start == 0 else parts[0][1]}, 16)
        parts.append((y, state))
    assert torch.equal(torch.cat([y for y, _ in parts], 1), whole)
    assert torch.equal(parts[1][1], last)


@pytest.mark.parametrize("name", GIVEN[:5])
@pytest.mark.parametrize("value", [3.0, torch.inf, torch.nan])
def test_what_comes_later_changes_no_bit(name, value):
    x = drawn(torch.float32, length=18)
    before, _, _ = forward(x, 16)
    x[name] = x[name].clone()
    x[name][0, 5] = -value if name == "log_decay" else value
    after, _, _ = forward(x, 16)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.equal(after[:, 5:], before[:, 5:])


def test_an_infinite_value_stays_in_its_channel_and_behind_the_next_segment():
    x = drawn(torch.float32, length=20)
    x["reset"][:] = False
    x["log_decay"].clamp_(min=-1.0)
    x["reset"][0, 9] = True
    clean, last, _ = forward(x, 16)
    x["v"] = x["v"].clone()
    x["v"][0, 5, 1, 3] = torch.inf
    y, final, _ = forward(x, 16)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, 5:9, 1, 3] = True
    assert torch.equal(y[~touched], clean[~touched])
    assert not y[touched].isfinite().any()
    assert np.array_equal(np.isfinite(loop(x)["y"]), ~touched.numpy())
    assert torch.equal(final, last)


def test_gradients_of_the_past_do_not_see_an_infinite_future():
    x = drawn(torch.float32, length=20)
    x["reset"], x["dfinal"] = None, None
    x["dy"] = x["dy"].clone()
    x["dy"][:, 6:] = 0.0
    clean = backward(x, None, 16)
    for name in ("k", "v", "eta"):
        worse = {**x, name: x[name].clone()}
        worse[name][0, 6] = torch.inf
        found = backward(worse, None, 16)
        assert all(torch.equal(found[each][:, :6], clean[each][:, :6]) for each in GIVEN[:5]), name
        assert torch.equal(found["initial"], clean["initial"])


def test_a_decay_of_zero_has_a_gradient_of_zero():
    x = drawn(torch.float32, length=20)
    x["log_decay"][0, 7] = -torch.inf
    gradient = backward(x, None, 16)["log_decay"]
    assert (gradient[0, 7] == 0.0).all()
    assert (gradient[x["reset"]] == 0.0).all()
