"""Declarations of the room ``second_difference``: loops over tokens and channels judge the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size
from so8t_jax.ops import second_difference as reference
from so8t_torch.core.errors import BackendError, ConfigError, ShapeError
from so8t_torch.ops import second_difference as production

BACKENDS = ("eager", "triton")
SEQUENCE = ({"T": 8, "D": 5}, {"T": 37, "D": 19})
BATCH = ({"B": 2, "T": 8, "D": 5}, {"B": 3, "T": 21, "D": 11})
SHORT = ({"T": 1, "D": 2}, {"T": 2, "D": 2}, {"T": 3, "D": 1})
SHORT_BATCH = tuple({"B": 2, **size} for size in SHORT)


def hidden(generator: np.random.Generator, size: Size) -> np.ndarray:
    """Draw hidden states of one sequence, or of one batch where the size has B."""
    return generator.standard_normal([size[axis] for axis in "BTD" if axis in size])


def full_mask(h: np.ndarray) -> np.ndarray:
    """Return a mask of ones."""
    return np.ones(h.shape[:-1], np.int64)


def everything(generator: np.random.Generator, size: Size) -> Example:
    """Draw hidden states without padding."""
    h = hidden(generator, size)
    return h, full_mask(h)


def padded(generator: np.random.Generator, size: Size) -> Example:
    """Draw hidden states, padded left of the first and right of the last quarter, non-finite in the padding."""
    h = hidden(generator, size)
    mask = full_mask(h)
    quarter = max(1, size["T"] // 4)
    mask[..., :quarter] = 0
    mask[..., size["T"] - quarter :] = 0
    h[mask == 0] = np.inf
    return h, mask


def packed(generator: np.random.Generator, size: Size) -> Example:
    """Draw hidden states of two sequences in one row, marked by their numbers; the second is much larger."""
    h = hidden(generator, size)
    numbers = np.where(np.arange(size["T"]) < size["T"] // 2, 1, 2)
    h[..., size["T"] // 2 :, :] *= 30.0
    return h, np.broadcast_to(numbers, h.shape[:-1]).copy()


def drifting(generator: np.random.Generator, size: Size) -> Example:
    """Draw a straight line far from the origin with a small tremor: the second difference cancels most digits."""
    h = hidden(generator, size)
    return 8.0 + np.arange(size["T"])[:, None] / 4.0 + h / 4.0, full_mask(h)


INPUTS = {"everything": everything, "padded": padded, "packed": packed, "drifting": drifting}


def energy_by_loops(h: np.ndarray, mask: np.ndarray, norm: str = "mean", delta: float = 0.0) -> np.ndarray:
    """Return the energy of one sequence, one token and one channel at a time."""
    length, width = h.shape
    total = 0.0
    for t in range(1, length - 1):
        if mask[t] == 0 or mask[t - 1] != mask[t] or mask[t + 1] != mask[t]:
            continue
        for d in range(width):
            u = abs(h[t - 1, d] - 2.0 * h[t, d] + h[t + 1, d])
            total += u**2 if delta == 0.0 or u <= delta else 2.0 * delta * u - delta**2
    return np.asarray(total / width if norm == "mean" else total)


def centres_by_loops(mask: np.ndarray) -> np.ndarray:
    """Return where three neighbours carry one number that is not zero."""
    return np.asarray([0 < t < len(mask) - 1 and 0 != mask[t - 1] == mask[t] == mask[t + 1] for t in range(len(mask))])


def penalty_by_loops(
    h: np.ndarray, mask: np.ndarray, norm: str = "mean", delta: float = 0.0, scale_free: bool = False
) -> np.ndarray:
    """Return the penalty of one batch, sequence by sequence."""
    energies = [energy_by_loops(x, m, norm, delta) for x, m in zip(h, mask, strict=True)]
    penalty = sum(energies) / max(1, sum(int(centres_by_loops(m).sum()) for m in mask))
    if not scale_free:
        return np.asarray(penalty)
    squares = [(x**2).mean() if norm == "mean" else (x**2).sum() for x in h[mask != 0]]
    return np.asarray(penalty / (sum(squares) / len(squares)))


def weight_by_comparison(progress: np.ndarray) -> np.ndarray:
    """Return the weight from the three phases as they are written in the documentation."""
    return np.asarray(0.01 if progress < 0.2 else 0.05 if progress < 0.6 else 0.1)


def cosine_law(f: Any, example: Example) -> np.ndarray:
    """A pure frequency ω costs (2 − 2 cos ω)² times its own square at every centre."""
    length = example[0].shape[0]
    omega = 0.1 + 3.0 * (np.abs(np.nan_to_num(example[0], posinf=0.0)).sum() % 1.0)
    phase = omega * np.arange(length)
    wave = np.stack([np.cos(phase), np.sin(phase)], axis=1)
    expected = (2.0 - 2.0 * np.cos(omega)) ** 2 * (length - 2)
    return np.asarray(np.asarray(f(wave, np.ones(length, np.int64))) * 2.0 - expected) / max(1.0, expected)


def line_law(f: Any, example: Example) -> np.ndarray:
    """Adding a straight line (of dyadic numbers, exact in floating point) to a dyadic trajectory changes nothing."""
    h = np.round(np.nan_to_num(example[0], posinf=1.0) * 64.0) / 64.0
    line = np.arange(h.shape[0])[:, None] * 0.25 - 3.0
    before, after = (np.asarray(f(x, example[1])) for x in (h, h + line))
    return np.asarray(after - before) / max(1.0, float(before))


def quadratic_law(f: Any, example: Example) -> np.ndarray:
    """Twice the trajectory costs four times as much."""
    once, twice = (np.asarray(f(example[0] * factor, example[1])) for factor in (1.0, 2.0))
    return np.asarray(twice - 4.0 * once) / max(1.0, float(once))


def padding_law(f: Any, example: Example) -> np.ndarray:
    """Masked tokens on either side, of any value, change nothing."""
    h, mask = example
    room = ((0, 0), (2, 3), (0, 0))
    wide = np.pad(h, room, constant_values=np.nan), np.pad(mask, room[:2])
    before, after = np.asarray(f(h, mask)), np.asarray(f(*wide))
    return np.asarray(after - before) / max(1.0, float(before))


def scale_law(f: Any, example: Example) -> np.ndarray:
    """Shrinking the trajectory does not lower the scale-free penalty."""
    once, shrunk = (np.asarray(f(example[0] * factor, example[1])) for factor in (1.0, 1.0 / 64.0))
    return np.asarray(shrunk - once) / max(1.0, float(once))


def bad_batch(**shapes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros of the given shapes for h and the mask."""
    return torch.zeros(shapes["h"]), torch.zeros(shapes["mask"])


REJECTIONS = (
    Rejection("mask_too_short", lambda: bad_batch(h=(2, 5, 3), mask=(2, 4)), ShapeError, r"mask of shape \(2, 5\)"),
    Rejection("no_channels", lambda: bad_batch(h=(2, 5, 0), mask=(2, 5)), ShapeError, "D > 0"),
    Rejection(
        "unknown_norm", lambda: bad_batch(h=(2, 5, 3), mask=(2, 5)), ConfigError, "'mean' or 'sum'", {"norm": "max"}
    ),
    Rejection("negative_delta", lambda: bad_batch(h=(2, 5, 3), mask=(2, 5)), ConfigError, "delta ≥ 0", {"delta": -1.0}),
    Rejection(
        "unknown_backend", lambda: bad_batch(h=(2, 5, 3), mask=(2, 5)), BackendError, "streamed", {"backend": "fast"}
    ),
)

ENERGY_LAWS = (
    Law("frequency", cosine_law, 64.0),
    Law("line", line_law, 64.0),
    Law("quadratic", quadratic_law, 16.0),
)

# Terms are squares of differences and all have one sign, so a sum is as accurate as its terms. In drifting
# trajectories a difference is about 30 times smaller than h, and Huber's gradient cancels where it is ±δ throughout.
BUDGET = Budget(forward=32.0, gradient=64.0)


def energy_pair(variant: str, **keywords: Any) -> OpPair:
    """Declare the energy with some options."""
    return OpPair(
        name=f"second_difference.energy{variant}",
        reference=reference.energy,
        production=production.energy,
        oracle=energy_by_loops,
        inputs=INPUTS,
        sizes=SEQUENCE,
        wrt=(0,),
        keywords=keywords,
        budget=BUDGET,
        returns="accumulation",
        backends=BACKENDS,
        edge_sizes=SHORT,
        bitwise_batch=True,
        laws=() if keywords else ENERGY_LAWS,
        rejections=() if keywords else REJECTIONS,
    )


def penalty_pair(variant: str, laws: tuple[Law, ...], inputs: dict[str, Any] = INPUTS, **keywords: Any) -> OpPair:
    """Declare the penalty with some options."""
    return OpPair(
        name=f"second_difference.second_difference{variant}",
        reference=reference.second_difference,
        production=production.second_difference,
        oracle=penalty_by_loops,
        inputs=inputs,
        sizes=BATCH,
        wrt=(0,),
        keywords=keywords,
        budget=BUDGET,
        returns="accumulation",
        backends=BACKENDS,
        edge_sizes=SHORT_BATCH,
        bitwise_batch=True,
        laws=laws,
        rejections=() if keywords else REJECTIONS,
        known_gaps={"gradcheck": "the scale is held constant on purpose"} if keywords.get("scale_free") else {},
    )


PAIRS: tuple[OpPair, ...] = (
    OpPair(
        name="second_difference.centres",
        reference=reference.centres,
        production=production.centres,
        oracle=centres_by_loops,
        inputs={"segments": lambda generator, size: (generator.integers(0, 3, size["T"]).repeat(3),)},
        sizes=({"T": 2}, {"T": 30}),
        dtypes=("float64",),
        budget=Budget(forward=0.0),
    ),
    energy_pair(""),
    energy_pair(":huber", delta=0.75, norm="sum"),
    penalty_pair("", (Law("padding", padding_law, 16.0),)),
    penalty_pair(":scale_free", (Law("scale", scale_law, 16.0),), scale_free=True),
    OpPair(
        name="second_difference.schedule_weight",
        reference=reference.schedule_weight,
        production=production.schedule_weight,
        oracle=weight_by_comparison,
        inputs={
            "inside": lambda generator, _: (np.asarray(generator.uniform(0.0, 1.0)),),
            "boundaries": lambda generator, _: (np.asarray(generator.choice([0.0, 0.2, 0.6, 1.0])),),
            "beyond": lambda generator, _: (np.asarray(generator.uniform(1.0, 3.0)),),
        },
        sizes=({},),
        dtypes=("float64",),
        budget=Budget(forward=0.0),
        rejections=(
            Rejection("falling", lambda: (0.5,), ConfigError, "increase within", {"boundaries": (0.6, 0.2)}),
            Rejection("missing_weight", lambda: (0.5,), ConfigError, "expected 3 weights", {"weights": (0.1, 0.2)}),
            Rejection("negative", lambda: (0.5,), ConfigError, "finite weights", {"weights": (0.1, -0.2, 0.1)}),
            Rejection("nan", lambda: (float("nan"),), ConfigError, "got NaN"),
        ),
    ),
)
