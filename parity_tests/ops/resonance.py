"""Declarations of the room ``resonance``: scipy's polar factor and loops over heads and modes judge the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size, Strategy
from parity_tests.ops import zeta_inputs
from so8t_jax.ops import resonance as reference
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.ops import resonance as production

SMALL: Size = {"H": 2, "K": 3, "V": 3}
WIDE: Size = {"H": 3, "K": 8, "V": 5}
SQUARE: Size = {"H": 2, "K": 6, "V": 6}
SINGLE_AND_DOUBLE = ("float64", "float32")


def rotation(generator: np.random.Generator, n: int) -> np.ndarray:
    """Draw an orthonormal matrix."""
    return np.linalg.qr(generator.standard_normal((n, n)))[0]


def states(kind: str) -> Strategy:
    """Return a strategy that draws states of some kind, two bases and, between 0 and 1, the blend of every head."""

    def strategy(generator: np.random.Generator, size: Size) -> Example:
        heads, k, v = size["H"], size["K"], size["V"]
        q_k, q_v = rotation(generator, k), rotation(generator, v)
        s = generator.standard_normal((heads, k, v))
        if kind == "few_modes":
            # one mode in three is 32 times as large as the others, which are close to the threshold
            s = q_k @ (np.where(np.arange(k) % 3 == 0, 1.0, 1.0 / 32.0)[:, None] * s) @ q_v.T
        elif kind == "silent_head":
            s[0] = 0.0
        elif kind == "tiny":
            s *= 1e-30
        return s, q_k, q_v, generator.uniform(0.0, 1.0, heads)

    return strategy


INPUTS = {kind: states(kind) for kind in ("few_modes", "generic", "silent_head", "tiny")}


def fully(strategy: Strategy) -> Strategy:
    """Return the same strategy without a blend."""
    return lambda generator, size: (*strategy(generator, size)[:3], None)


def without_blend(strategy: Strategy) -> Strategy:
    """Return the same strategy for a function that takes no blend."""
    return lambda generator, size: strategy(generator, size)[:3]


def transform_by_entry(state: np.ndarray, q_k: np.ndarray, q_v: np.ndarray) -> np.ndarray:
    """Return S′ entry by entry."""
    modes = np.zeros_like(state)
    for h, i, j in np.ndindex(*state.shape):
        modes[h, i, j] = sum(q_k[a, i] * state[h, a] @ q_v[:, j] for a in range(len(q_k)))
    return modes


def filter_by_mode(
    state: np.ndarray,
    q_k: np.ndarray,
    q_v: np.ndarray,
    blend: np.ndarray | None,
    threshold: float = 0.1,
    temperature: float = 0.05,
    energy: str = "row",
    hard: bool = False,
) -> Any:
    """Return the filtered states, energies and gates, head by head and mode by mode."""
    heads, k, v = state.shape
    result, energies, gates = np.zeros_like(state), np.zeros((heads, k)), np.zeros((heads, k))
    for h in range(heads):
        modes = [[q_k[:, j] @ state[h] @ q_v[:, i] for i in range(v)] for j in range(k)]
        energies[h] = [abs(modes[j][j]) if energy == "diag" else math.hypot(*modes[j]) for j in range(k)]
        total = math.fsum(energies[h])
        for j in range(k):
            relative = energies[h, j] * k / total if total else 1.0
            rises = (relative - threshold) / temperature
            gates[h, j] = float(rises >= 0) if hard else 1.0 / (1.0 + math.exp(-rises))
            result[h] += gates[h, j] * np.outer(q_k[:, j], q_v @ np.array(modes[j]))
        w = 1.0 if blend is None else blend[h]
        result[h] = (1.0 - w) * state[h] + w * result[h]
    return reference.Resonance(result, energies, gates)


def unchanged(state: np.ndarray, q_k: np.ndarray, q_v: np.ndarray, _blend: Any, **_: Any) -> Any:
    """Return what a filter that lets everything pass gives."""
    modes = np.stack([q_k.T @ s @ q_v for s in state])
    return reference.Resonance(state, np.linalg.norm(modes, axis=2), np.ones(state.shape[:2]))


def norm_law(f: Any, example: Example) -> np.ndarray:
    """The norm of no head grows."""
    before, after = (np.linalg.norm(np.asarray(s), axis=(1, 2)) for s in (example[0], f(*example)[0]))
    return np.asarray(np.maximum(after - before, 0.0) / np.maximum(before, 1e-300))


def scale_law(f: Any, example: Example) -> np.ndarray:
    """The filter of 3S is three times the filter of S, with the same gates."""
    once, thrice = (f(factor * example[0], *example[1:]) for factor in (1.0, 3.0))
    size = np.maximum(np.abs(example[0]).max(), 1e-300)
    return np.concatenate(
        [
            (np.asarray(thrice[0]) - 3.0 * np.asarray(once[0])).ravel() / size,
            (np.asarray(thrice[2]) - np.asarray(once[2])).ravel(),
        ]
    )


def orthonormal_law(f: Any, example: Example) -> np.ndarray:
    """QᵀQ = I."""
    q = np.asarray(f(*example))
    return np.asarray(q.T @ q - np.eye(len(q)))


def parity_law(f: Any, example: Example) -> np.ndarray:
    """Even columns are symmetric about the centre, odd ones antisymmetric."""
    q = np.asarray(f(*example))
    signs = np.array([-1.0 if j % 2 and j < len(q) // 2 * 2 else 1.0 for j in range(len(q))])
    return np.asarray(q[::-1] - signs * q)


def zeros(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Return tensors of zeros."""
    return tuple(torch.zeros(shape) for shape in shapes)


BASES = (
    Rejection("no_heads", lambda: zeros((3, 3), (3, 3), (3, 3)), ShapeError, r"states \(\.\.\., H, K, V\)"),
    Rejection("keys", lambda: zeros((2, 4, 3), (3, 3), (3, 3)), ShapeError, r"expected bases \(4, 4\) and \(3, 3\)"),
    Rejection("nothing", lambda: zeros((2, 0, 3), (0, 0), (3, 3)), ShapeError, "expected bases"),
    Rejection(
        "integers", lambda: (torch.zeros(2, 3, 3).int(), *zeros((3, 3), (3, 3))), DomainError, "real floating dtypes"
    ),
)
FITTING = ((2, 4, 3), (4, 4), (3, 3))
OPTIONS = (
    Rejection("blend", lambda: zeros(*FITTING, (3,)), ShapeError, "one blend per head"),
    Rejection("energy", lambda: zeros(*FITTING), ConfigError, "'row' or 'diag'", {"energy": "trace"}),
    Rejection("not_square", lambda: zeros(*FITTING), ShapeError, "take 'row'", {"energy": "diag"}),
    Rejection("threshold", lambda: zeros(*FITTING), ConfigError, "below ∞", {"threshold": math.inf}),
    Rejection("temperature", lambda: zeros(*FITTING), ConfigError, "temperature > 0", {"temperature": 0.0}),
)

# Chains of products of length K and V, forward and back. A gate divides a rounding of the relative energy by the
# temperature 0.05, the direction of a small row has the rounding of the large ones, and slopes pass through the same
# products again.
BUDGET = Budget(forward=64.0, gradient={"float64": 256.0, "float32": 256.0, "bfloat16": 64.0, "float16": 256.0})


def filter_pair(
    variant: str, inputs: Any, sizes: tuple[Size, ...], oracle: Any = filter_by_mode, **more: Any
) -> OpPair:
    """Declare the filter with some options."""
    return OpPair(
        name=f"resonance.resonance{variant}",
        reference=reference.resonance,
        production=production.resonance,
        oracle=oracle,
        inputs=inputs,
        sizes=sizes,
        shared=(1, 2, 3),
        masters=(1, 2, 3),
        budget=BUDGET,
        **more,
    )


PAIRS: tuple[OpPair, ...] = (
    OpPair(
        name="resonance.basis",
        reference=reference.basis,
        production=production.basis,
        oracle=zeta_inputs.nearest_orthonormal,
        inputs={"counted": zeta_inputs.counted},
        sizes=({"n": 1}, {"n": 2}, {"n": 5}, {"n": 32}),
        dtypes=("float64",),
        returns="float64",
        # n eps of the angles times the condition number, 2.7 at n = 32, over entries of 0.3
        budget=Budget(forward=128.0),
        laws=(Law("orthonormal", orthonormal_law, 32.0), Law("parity", parity_law, 128.0)),
        rejections=(Rejection("none", lambda: (0,), ConfigError, "whole number n ≥ 1"),),
    ),
    OpPair(
        name="resonance.transform",
        reference=reference.transform,
        production=production.transform,
        oracle=transform_by_entry,
        inputs={kind: without_blend(strategy) for kind, strategy in INPUTS.items()},
        sizes=(SMALL, WIDE),
        shared=(1, 2),
        masters=(1, 2),
        wrt=(0, 1, 2),
        budget=Budget(forward=16.0, gradient=16.0),
        rejections=BASES,
    ),
    filter_pair(
        "",
        INPUTS,
        (SMALL, WIDE),
        wrt=(0, 1, 2, 3),
        laws=(Law("norm", norm_law, 16.0), Law("scale", scale_law, 512.0)),
        rejections=(*BASES, *OPTIONS),
    ),
    filter_pair(
        ":diagonal",
        {kind: fully(strategy) for kind, strategy in INPUTS.items()},
        (SMALL, SQUARE),
        wrt=(0,),
        dtypes=SINGLE_AND_DOUBLE,
        keywords={"energy": "diag", "threshold": 0.5, "temperature": 0.25},
        laws=(Law("norm", norm_law, 16.0),),
    ),
    filter_pair(
        ":hard",
        INPUTS,
        (SMALL, WIDE),
        wrt=(0, 3),
        dtypes=SINGLE_AND_DOUBLE,
        keywords={"hard": True, "threshold": 0.8},
        finite_differences=False,
        laws=(Law("norm", norm_law, 16.0),),
    ),
    filter_pair(
        ":open",
        {kind: fully(strategy) for kind, strategy in INPUTS.items()},
        (SMALL, WIDE),
        oracle=unchanged,
        wrt=(0,),
        dtypes=SINGLE_AND_DOUBLE,
        keywords={"threshold": -math.inf},
    ),
)
