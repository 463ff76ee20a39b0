"""Declarations of the room ``semiseparable``: matrices filled entry by entry, products of decays and all, judge it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Carry, Example, Law, OpPair, Rejection, Size
from so8t_jax.ops import semiseparable as reference
from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError
from so8t_torch.ops import semiseparable as production

SIZES: tuple[Size, ...] = ({"T": 5, "R": 2, "D": 2}, {"T": 21, "R": 19, "D": 3})
SHORT: tuple[Size, ...] = ({"T": 1, "R": 2, "D": 1}, {"T": 2, "R": 1, "D": 2})


def plain(generator: np.random.Generator, size: Size) -> Example:
    """Draw inputs, what is written and read, decays inside of (0, 1) and a state that enters."""
    x, u, v, s = (
        generator.standard_normal((size[a], size[b])) for a, b in (("T", "D"), ("T", "R"), ("T", "R"), ("R", "D"))
    )
    return x, u, v, generator.uniform(0.2, 0.95, u.shape), s, None


def packed(generator: np.random.Generator, size: Size) -> Example:
    """Draw segments of random lengths, decays that are exactly 0 or 1 in places, and channels that are closed."""
    x, u, v, a, s, _ = plain(generator, size)
    kinds = generator.integers(0, 8, a.shape)
    a = np.select([kinds == 0, kinds == 1], [0.0, 1.0], a)
    gate = generator.integers(0, 2, u.shape) * (np.arange(size["R"]) < 17)
    return x, u * gate, v * gate, a, s, np.cumsum(generator.random(size["T"]) < 0.2)


def shared_decay(generator: np.random.Generator, size: Size) -> Example:
    """Draw one decay per rank channel; nothing enters."""
    x, u, v, a, _, _ = plain(generator, size)
    return x, u, v, a[0], None, None


INPUTS = {"plain": plain, "packed": packed}


def runs(segment_ids: np.ndarray | None, length: int) -> np.ndarray:
    """Return the number of the run of each token, counting changes of the segment."""
    ids = np.zeros(length, int) if segment_ids is None else segment_ids
    return np.cumsum(np.append(0, ids[1:] != ids[:-1]))


def weights(decay: np.ndarray, run: np.ndarray, t: int, s: int) -> np.ndarray:
    """Return the product of the decays after token s up to token t, s = −1 for what enters; zero across runs."""
    return np.prod(decay[s + 1 : t + 1], axis=0) * float(run[t] == run[max(s, 0)])


def operator_by_matrix(
    x: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    initial: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
    *,
    chunk: int = 64,  # noqa: ARG001
) -> tuple[np.ndarray, np.ndarray]:
    """Return M x with the N×N matrix M filled entry by entry, and what enters and leaves."""
    length, decay, run = len(x), np.broadcast_to(decay, u.shape), runs(segment_ids, len(x))
    start = np.zeros((u.shape[1], x.shape[1])) if initial is None else initial
    matrix = np.zeros((length, length))
    for t in range(length):
        for s in range(t + 1):
            matrix[t, s] = v[t] @ (weights(decay, run, t, s) * u[s])
    entering = np.stack([(weights(decay, run, t, -1) * v[t]) @ start for t in range(length)])
    last = length - 1
    final = sum(np.outer(weights(decay, run, last, s) * u[s], x[s]) for s in range(length))
    return matrix @ x + entering, final + weights(decay, run, last, -1)[:, None] * start


def compat_by_matrix(
    u: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    initial: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return k ⊙ v with every k_t a sum over tokens."""
    length, decay, run = len(u), np.broadcast_to(decay, u.shape), runs(segment_ids, len(u))
    k = np.zeros(u.shape)
    for t in range(length):
        k[t] = sum(weights(decay, run, t, s) * u[s] for s in range(t + 1))
        k[t] += 0.0 if initial is None else weights(decay, run, t, -1) * initial
    return k * v, k[-1]


def band_by_matrix(
    x: np.ndarray, taps: np.ndarray, initial: np.ndarray | None = None, segment_ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the band one product at a time."""
    length, before, run = len(x), len(taps) - 1, runs(segment_ids, len(x))
    start = np.zeros((before, x.shape[1])) if initial is None else initial

    def source(t: int, reader: int) -> np.ndarray:
        if run[max(t, 0)] != run[reader]:
            return np.zeros(x.shape[1])
        return x[t] if t >= 0 else start[before + t]

    y = np.stack([sum(taps[j] * source(t - j, t) for j in range(before + 1)) for t in range(length)])
    last = [source(t, length - 1) for t in range(length - before, length)]
    return y, np.stack(last) if last else start


def compat_inputs(draw: Any) -> Any:
    """Return a strategy that draws states of one number per rank channel."""

    def strategy(generator: np.random.Generator, size: Size) -> Example:
        _, u, v, a, s, ids = draw(generator, size)
        return u, v, a, None if s is None else s[:, 0], ids

    return strategy


def band(generator: np.random.Generator, size: Size) -> Example:
    """Draw inputs, taps and what came before."""
    x, taps = (generator.standard_normal((size[name], size["D"])) for name in ("T", "K"))
    return x, taps, generator.standard_normal((size["K"] - 1, size["D"])), None


def packed_band(generator: np.random.Generator, size: Size) -> Example:
    """Draw segments of random lengths."""
    return *band(generator, size)[:3], np.cumsum(generator.random(size["T"]) < 0.3)


def superposition_law(f: Any, example: Example) -> np.ndarray:
    """Inputs and entering states add up."""
    x, u, v, a, s, ids = example
    whole, inputs, state = (np.asarray(f(p, u, v, a, q, ids)[0]) for p, q in ((x, s), (x, 0 * s), (0 * x, s)))
    return (whole - inputs - state) / max(1.0, np.abs(whole).max())


def cut(example: Example, per_token: tuple[int, ...], state: int) -> tuple[Example, Any]:
    """Cut inside a segment; the second half is entered by what the first one left."""
    ids, length = example[-1], len(example[0])
    middle = next((t for t in range(1, length) if ids is None or (ids[t] == ids[t - 1] and t > 2)), length)

    def part(piece: slice, given: Any) -> Example:
        found = list(example)
        for place in per_token:
            found[place] = None if found[place] is None else found[place][piece]
        found[state] = given
        return tuple(found)

    return part(slice(middle), example[state]), lambda s: part(slice(middle, None), s)


def joined(first: Any, second: Any) -> Any:
    """Put two runs together."""
    return np.concatenate([first[0], second[0]]), second[1]


def zeros(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
    """Return zeros."""
    return tuple(torch.zeros(shape) for shape in shapes)


TOKENS = ((2, 5, 3), (2, 5, 4), (2, 5, 4), (4,))


def of_five(
    u: tuple[int, ...] = (2, 5, 4), v: tuple[int, ...] = (2, 5, 4), a: tuple[int, ...] = (4,), x: int = 5
) -> Any:
    """Return zeros for two rows of five tokens with four rank channels, or shapes that do not fit."""
    return zeros((2, x, 3), u, v, a)


REJECTIONS = (
    Rejection("no_tokens", lambda: of_five(x=0), ShapeError, "at least one token"),
    Rejection("other_tokens", lambda: of_five(u=(2, 4, 4)), ShapeError, r"expected u \(2, 5, 'R'\)"),
    Rejection("no_rank", lambda: of_five(u=(2, 5, 0)), ShapeError, "at least one rank channel"),
    Rejection("read", lambda: of_five(v=(2, 5, 3)), ShapeError, "v of the shape of u"),
    Rejection("decays", lambda: of_five(a=(3,)), ShapeError, "decays of shape"),
    Rejection("state", lambda: (*of_five(), torch.zeros(2, 3, 3)), ShapeError, "initial state"),
    Rejection("ids", lambda: (*of_five(), None, torch.zeros(2, 4).int()), ShapeError, "one number per token"),
    Rejection("real_ids", lambda: (*of_five(), None, torch.zeros(2, 5)), DomainError, "whole numbers"),
    Rejection("negative", lambda: (*of_five()[:3], torch.tensor(-0.5)), DomainError, r"decays in \[0, 1\]"),
    Rejection("growing", lambda: (*of_five()[:3], torch.tensor(1.5)), DomainError, r"decays in \[0, 1\]"),
    Rejection("integers", lambda: tuple(z.int() for z in of_five()), DomainError, "real floating dtype"),
    Rejection("chunk", of_five, ConfigError, "a power of two", {"chunk": 48}),
    Rejection("backend", of_five, BackendError, "chunked", {"backend": "triton"}),
)

# Sums of products of both signs, of decays in turn; the gradient of a decay sums over tokens before and after it.
BUDGET = Budget(forward=32.0, gradient=64.0, floor=0.5, gradient_floor=0.5)


def operator_pair(variant: str, inputs: dict[str, Any], **more: Any) -> OpPair:
    """Declare the operator on some inputs, in chunks that do not fill the tokens."""
    return OpPair(
        name=f"semiseparable.operator{variant}",
        reference=reference.operator,
        production=production.operator,
        oracle=operator_by_matrix,
        inputs=inputs,
        sizes=SIZES,
        budget=BUDGET,
        keywords={"chunk": 8},
        **more,
    )


PAIRS: tuple[OpPair, ...] = (
    operator_pair(
        "",
        INPUTS,
        wrt=(0, 1, 2, 3, 4),
        edge_sizes=SHORT,
        backends=("eager",),
        laws=(Law("superposition", superposition_law, 64.0),),
        rejections=REJECTIONS,
        carry=Carry(lambda e: cut(e, (0, 1, 2, 3, 5), 4), joined),
    ),
    operator_pair(
        ":shared_decay",
        {"shared": shared_decay},
        wrt=(0, 1, 2, 3),
        shared=(3,),
        dtypes=("float64", "float32"),
        twice=False,
    ),
    OpPair(
        name="semiseparable.compat",
        reference=reference.compat,
        production=production.compat,
        oracle=compat_by_matrix,
        inputs={name: compat_inputs(draw) for name, draw in INPUTS.items()},
        sizes=SIZES,
        edge_sizes=SHORT,
        wrt=(0, 1, 2, 3),
        budget=BUDGET,
        carry=Carry(lambda e: cut(e, (0, 1, 2, 4), 3), joined),
        rejections=(
            Rejection("no_tokens", lambda: zeros((2, 0, 4), (2, 0, 4), (4,)), ShapeError, "at least one token"),
            Rejection("state", lambda: zeros((2, 5, 4), (2, 5, 4), (4,), (2, 3)), ShapeError, "initial state"),
        ),
    ),
    OpPair(
        name="semiseparable.banded",
        reference=reference.banded,
        production=production.banded,
        oracle=band_by_matrix,
        inputs={"band": band, "packed": packed_band},
        sizes=({"T": 4, "D": 2, "K": 3}, {"T": 17, "D": 3, "K": 4}),
        edge_sizes=({"T": 1, "D": 1, "K": 1}, {"T": 2, "D": 2, "K": 4}),
        shared=(1,),
        wrt=(0, 1, 2),
        budget=BUDGET,
        carry=Carry(lambda e: cut(e, (0, 3), 2), joined),
        rejections=(
            Rejection("taps", lambda: zeros((2, 5, 3), (3, 4)), ShapeError, r"taps \(K, 3\)"),
            Rejection("no_taps", lambda: zeros((2, 5, 3), (0, 3)), ShapeError, "K ≥ 1"),
            Rejection("state", lambda: zeros((2, 5, 3), (3, 3), (2, 3, 3)), ShapeError, "initial state"),
        ),
    ),
)
