"""Declarations of the room ``rank_gate``: numpy's sorts and scalar logistic functions judge the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size
from so8t_jax.ops import rank_gate as reference
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.ops import rank_gate as production

SIZES: tuple[Size, ...] = ({"T": 2, "R": 3}, {"T": 7, "R": 9})
SINGLE: tuple[Size, ...] = ({"T": 1, "R": 1},)


def logits(generator: np.random.Generator, size: Size) -> np.ndarray:
    """Draw logits of both signs, well apart from zero and from one another."""
    count = size["T"] * size["R"]
    apart = (np.arange(count) - count // 2 + 0.5) * 4.0 / count
    return generator.permutation(apart).reshape(size["T"], size["R"])


def bare(generator: np.random.Generator, size: Size) -> Example:
    """Draw logits."""
    return logits(generator, size), None


def noisy(generator: np.random.Generator, size: Size) -> Example:
    """Draw logits and logistic noise, whose sums are well apart."""
    total, z = logits(generator, size), np.round(8.0 * logits(generator, size)) / 8.0
    return z, np.round(64.0 * total) / 64.0 + 1.0 / 128.0 - z


def extreme(generator: np.random.Generator, size: Size) -> Example:
    """Draw logits, of which every second one has an exponential that overflows."""
    z = logits(generator, size)
    return z * np.where(np.arange(z.size).reshape(z.shape) % 2, 1000.0, 1.0), None


def uniform(generator: np.random.Generator, size: Size) -> Example:
    """Draw numbers between 0 and 1, not at the ends."""
    return (generator.uniform(0.05, 0.95, (size["T"], size["R"])),)


def progress(generator: np.random.Generator, size: Size) -> Example:
    """Draw shares of a schedule, one of them over."""
    return (np.append(generator.uniform(0.05, 0.95, size["T"] * size["R"] - 1), 1.5),)


def by_scalars(
    z: np.ndarray,
    noise: np.ndarray | None = None,
    *,
    mode: str = "soft",
    temperature: float = 1.0,
    hard: bool | None = None,
    training: bool = True,
    min_rank: int = 0,
    active_rank: int | None = None,
) -> np.ndarray:
    """Return the gates channel by channel."""
    exact = hard if hard is not None else {"soft": False, "straight_through": True}.get(mode, not training)
    scale = temperature if mode == "binary_concrete" else 1.0
    active = z.shape[1] if active_rank is None else active_rank
    gates = np.zeros_like(z)
    for t, row in enumerate(z if noise is None else z + noise):
        kept = np.argsort(-row[:active], kind="stable")[:min_rank].tolist()
        for r in range(active):
            soft = 0.5 * (1.0 + math.tanh(0.5 * row[r] / scale))
            floored = max(soft, 0.5) if r in kept else soft
            gates[t, r] = float(row[r] >= 0 or r in kept) if exact else floored
    return gates


def logit_by_scalars(u: np.ndarray) -> np.ndarray:
    """Return 2 artanh(2u − 1)."""
    return np.array([[2.0 * math.atanh(2.0 * x - 1.0) for x in row] for row in u])


def temperature_by_powers(p: np.ndarray, *, start: float, end: float) -> np.ndarray:
    """Return start · (end/start)^p."""
    return np.array([start * (end / start) ** min(max(x, 0.0), 1.0) for x in p])


def rank_by_loops(gates: np.ndarray) -> np.ndarray:
    """Return the mean over tokens of the sum."""
    return np.asarray(math.fsum(gates.ravel()) / len(gates))


def l1_by_loops(gates: np.ndarray) -> np.ndarray:
    """Return the mean of the sizes."""
    return np.asarray(math.fsum(abs(g) for g in gates.ravel()) / gates.size)


def complement_law(f: Any, example: Example) -> np.ndarray:
    """The gates of −z are one minus those of z."""
    return np.asarray(f(example[0], None)) + np.asarray(f(-example[0], None)) - 1.0


def zeros(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Return tensors of zeros."""
    return tuple(torch.zeros(shape) for shape in shapes)


def options(name: str, match: str, *shapes: tuple[int, ...], **keywords: Any) -> Rejection:
    """Return a call that is refused for its options."""
    return Rejection(name, lambda: zeros(*(shapes or ((2, 4),))), ConfigError, match, keywords)


REJECTIONS = (
    Rejection("no_channels", lambda: zeros((2, 0)), ShapeError, "at least one channel"),
    Rejection("noise", lambda: zeros((2, 4), (2, 3)), ShapeError, "noise of the shape", {"mode": "binary_concrete"}),
    Rejection("integers", lambda: (torch.zeros(2, 4).int(),), DomainError, "real floating dtype"),
    options("mode", "expected a mode out of soft", mode="gumbel"),
    options("temperature", "temperature > 0", temperature=0.0),
    options("no_noise", "needs noise", mode="binary_concrete"),
    options("unused_noise", "leave it out", (2, 4), (2, 4)),
    options("soft_exact", "straight-through gates are exact", mode="straight_through", hard=False),
    options("active", "active_rank between 0 and 4", active_rank=5),
    options("floor", "min_rank between 0 and 2", min_rank=3, active_rank=2),
)
GATES = (
    Rejection("no_tokens", lambda: zeros((0, 4)), ShapeError, "at least one token"),
    Rejection("integer_gates", lambda: (torch.zeros(2, 4).int(),), DomainError, "real floating dtype"),
)


def gate_pair(variant: str, draw: Any, exact: bool = False, **keywords: Any) -> OpPair:
    """Declare the gates with some options."""
    return OpPair(
        name=f"rank_gate.rank_gate{variant}",
        reference=reference.rank_gate,
        production=production.rank_gate,
        oracle=by_scalars,
        inputs={"bare": bare, "extreme": extreme} if not keywords else {draw.__name__: draw},
        sizes=SIZES,
        edge_sizes=SINGLE if not keywords else (),
        wrt=(0, 1),
        dtypes=("float64", "float32") if keywords else ("float64", "float32", "bfloat16", "float16"),
        keywords=keywords,
        # one logistic function, whose slope is a product of two
        budget=Budget(forward=8.0, gradient=16.0),
        finite_differences=not exact,
        laws=() if keywords else (Law("complement", complement_law, 4.0),),
        rejections=() if keywords else REJECTIONS,
    )


def small(name: str, f: Any, production_f: Any, oracle: Any, draw: Any, **more: Any) -> OpPair:
    """Declare one of the functions around the gates."""
    return OpPair(
        name=f"rank_gate.{name}",
        reference=f,
        production=production_f,
        oracle=oracle,
        inputs={draw.__name__: draw},
        sizes=SIZES,
        wrt=(0,),
        budget=Budget(forward=16.0, gradient=16.0),
        **more,
    )


PAIRS: tuple[OpPair, ...] = (
    gate_pair("", bare),
    gate_pair(":floor", bare, min_rank=2, active_rank=3),
    gate_pair(":straight_through", bare, True, mode="straight_through", min_rank=2),
    gate_pair(":sample", noisy, mode="binary_concrete", temperature=0.5),
    gate_pair(":hard_sample", noisy, True, mode="binary_concrete", temperature=0.5, hard=True, min_rank=1),
    gate_pair(":evaluated", bare, True, mode="binary_concrete", temperature=0.5, training=False),
    small(
        "logistic",
        reference.logistic,
        production.logistic,
        logit_by_scalars,
        uniform,
        rejections=(Rejection("integers", lambda: (torch.zeros(2).int(),), DomainError, "real floating dtype"),),
    ),
    small(
        "temperature",
        reference.temperature,
        production.temperature,
        temperature_by_powers,
        progress,
        keywords={"start": 2.0, "end": 0.25},
        rejections=(
            Rejection("end", lambda: zeros((2,)), ConfigError, "end > 0", {"start": 1.0, "end": 0.0}),
            Rejection(
                "steps", lambda: (torch.zeros(2).int(),), DomainError, "real floating", {"start": 1.0, "end": 0.5}
            ),
        ),
    ),
    small(
        "effective_rank",
        reference.effective_rank,
        production.effective_rank,
        rank_by_loops,
        uniform,
        rejections=GATES,
    ),
    small("l1", reference.l1, production.l1, l1_by_loops, uniform, rejections=GATES),
)
