"""Declarations of the room ``snr_filter``: numpy's medians and loops over heads and entries judge the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size, Strategy
from so8t_jax.ops import snr_filter as reference
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.ops import snr_filter as production

SIZES: tuple[Size, ...] = ({"H": 2, "K": 3, "V": 2, "C": 2}, {"H": 3, "K": 5, "V": 7, "C": 4})
SINGLE: tuple[Size, ...] = ({"H": 2, "K": 1, "V": 1, "C": 1},)
FLOOR = 1e-3


def drawn_state(kind: str, generator: np.random.Generator, size: Size) -> np.ndarray:
    """Draw the states of H heads of some kind."""
    shape = (size["H"], size["K"], size["V"])
    noise = generator.standard_normal(shape)
    if kind == "written":
        # one strong association in noise
        pair = generator.standard_normal((shape[0], shape[1], 1)) * generator.standard_normal((shape[0], 1, shape[2]))
        return 4.0 * pair + noise
    if kind == "sparse":
        # more than half of the entries are zero, so is the median deviation
        return np.where(generator.uniform(size=shape) < 0.2, noise, 0.0)
    if kind == "silent_head":
        noise[0] = 0.0
    return noise * 1e-30 if kind == "tiny" else noise


def states(kind: str) -> Strategy:
    """Return a strategy that draws states."""
    return lambda generator, size: (drawn_state(kind, generator, size),)


def chunks(kind: str) -> Strategy:
    """Return a strategy that draws states, decay rates and write strengths."""

    def strategy(generator: np.random.Generator, size: Size) -> Example:
        state = drawn_state(kind, generator, size)
        rates = generator.uniform(0.0, 1.0, (2, size["C"], size["H"]))
        return state, rates[0], rates[1]

    return strategy


def aged(kind: str) -> Strategy:
    """Return a strategy that draws states and ages."""

    def strategy(generator: np.random.Generator, size: Size) -> Example:
        state = drawn_state(kind, generator, size)
        return state, generator.uniform(0.0, 30.0, state.shape)

    return strategy


KINDS = ("generic", "written", "sparse", "silent_head", "tiny")


def logistic(x: float) -> float:
    """Return 1/(1 + e^{−x})."""
    return 1.0 / (1.0 + math.exp(-x)) if x > 0 else math.exp(x) / (1.0 + math.exp(x))


def ratio_by_head(state: np.ndarray, noise_floor: float = FLOOR) -> np.ndarray:
    """Return |S|/σ head by head."""
    ratio = np.zeros_like(state)
    for h, entries in enumerate(state):
        spread = np.median(np.abs(entries - np.median(entries)))
        noise = 1.4826 * spread + noise_floor * np.abs(entries).sum() / entries.size
        if noise > 0:
            ratio[h] = np.abs(entries) / noise
    return ratio


def statistics_by_head(state: np.ndarray, threshold: float = 2.0) -> Any:
    """Return the five statistics head by head, in the definition's named tuple."""
    rows = []
    for entries in ratio_by_head(state):
        values = sorted(entries.ravel())
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        low = sum(v < threshold for v in values) / len(values)
        rows.append((mean, spread, values[0], values[-1], low))
    return reference.Statistics(*np.array(rows).T)


def filter_by_entry(
    state: np.ndarray,
    decay: np.ndarray,
    eta: np.ndarray,
    threshold: float = 2.0,
    temperature: float = 0.25,
    gamma_boost: float = 2.0,
    eta_boost: float = 1.5,
    cleanup: float = 0.0,
    hard: bool = False,
) -> Any:
    """Return state, decay, eta and p, entry by entry and token by token, in the definition's named tuple."""
    ratio = ratio_by_head(state)
    cleaned, faster, stronger, shares = state.copy(), decay.copy(), eta.copy(), np.ones(len(state))
    for h, entries in enumerate(state):
        if entries.any():
            gates = np.empty_like(entries)
            for place in np.ndindex(*entries.shape):
                above = float(ratio[h][place]) - threshold
                gates[place] = float(above >= 0) if hard else logistic(above / temperature)
                cleaned[h][place] = (1.0 - cleanup) * entries[place] + cleanup * gates[place] * entries[place]
            shares[h] = gates.sum() / gates.size
        for t in range(len(decay)):
            faster[t, h] *= gamma_boost + (1.0 - gamma_boost) * shares[h]
            stronger[t, h] *= 1.0 + (eta_boost - 1.0) * shares[h] * float(entries.any())
    return reference.Filtered(cleaned, faster, stronger, shares)


def importance_by_entry(
    state: np.ndarray, age: np.ndarray, weights: tuple[float, float, float] = (0.5, 0.3, 0.2)
) -> np.ndarray:
    """Return the scores entry by entry."""
    ratio, score = ratio_by_head(state), np.empty_like(state)
    for h, i, j in np.ndindex(*state.shape):
        largest = np.abs(state[h]).max()
        share = (state[h, i, j] / largest) ** 2 if largest > 0 else 0.0
        terms = logistic(float(ratio[h, i, j]) - 2.0), share, math.exp(-0.1 * age[h, i, j])
        score[h, i, j] = sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights)
    return score


def scale_law(f: Any, example: Example) -> np.ndarray:
    """Scaling S by −3 scales what comes out as a state, and changes no rate."""
    once, scaled = (f(factor * example[0], *example[1:]) for factor in (1.0, -3.0))
    size = max(np.abs(example[0]).max(), 1e-300)
    rates = [np.asarray(a) - np.asarray(b) for a, b in zip(once[1:], scaled[1:], strict=True)]
    state = (np.asarray(scaled[0]) + 3.0 * np.asarray(once[0])) / size
    return np.concatenate([state.ravel(), *(r.ravel() for r in rates)])


def bounds_law(f: Any, example: Example) -> np.ndarray:
    """Rates stay between themselves and themselves boosted, p between 0 and 1, and no entry grows."""
    state, decay, eta, p = (np.asarray(x) for x in f(*example))
    over = [decay - 2.0 * example[1], example[1] - decay, eta - 1.5 * example[2], example[2] - eta, p - 1.0, -p]
    grown = (np.abs(state) - np.abs(example[0])) / max(np.abs(example[0]).max(), 1e-300)
    return np.asarray(np.maximum(np.concatenate([grown.ravel(), *(x.ravel() for x in over)]), 0.0))


def zeros(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Return tensors of zeros."""
    return tuple(torch.zeros(shape) for shape in shapes)


def state_rejections(*others: tuple[int, ...]) -> tuple[Rejection, ...]:
    """Return the calls with bad states that every function refuses, for the shapes of its other arguments."""
    one = (2, 3, 3)
    return (
        Rejection("no_heads", lambda: zeros((3, 3), *others), ShapeError, r"states \(\.\.\., H, K, V\)"),
        Rejection("no_entries", lambda: zeros((2, 0, 3), *others), ShapeError, "K, V ≥ 1"),
        Rejection("integers", lambda: (zeros(one)[0].int(), *zeros(*others)), DomainError, "real floating dtype"),
        Rejection("floor", lambda: zeros(one, *others), ConfigError, "noise_floor > 0", {"noise_floor": 0.0}),
    )


FITTING = ((2, 3, 3), (4, 2), (4, 2))
CHUNK_REJECTIONS = (
    *state_rejections((4, 2), (4, 2)),
    Rejection("decay", lambda: zeros((2, 3, 3), (2,), (4, 2)), ShapeError, r"expected decay \(\.\.\., C, H\)"),
    Rejection("eta", lambda: zeros((2, 3, 3), (4, 2), (4, 3)), ShapeError, r"expected eta \(\.\.\., C, H\)"),
    Rejection("temperature", lambda: zeros(*FITTING), ConfigError, "temperature > 0", {"temperature": 0.0}),
    Rejection("threshold", lambda: zeros(*FITTING), ConfigError, "finite threshold", {"threshold": math.nan}),
    Rejection("boost", lambda: zeros(*FITTING), ConfigError, "gamma_boost ≥ 1", {"gamma_boost": 0.5}),
    Rejection("cleanup", lambda: zeros(*FITTING), ConfigError, r"cleanup in \[0, 1\]", {"cleanup": 1.5}),
)


def filter_pair(variant: str, **keywords: Any) -> OpPair:
    """Declare the filter with some options."""
    return OpPair(
        name=f"snr_filter.snr_filter{variant}",
        reference=reference.snr_filter,
        production=production.snr_filter,
        oracle=filter_by_entry,
        inputs={kind: chunks(kind) for kind in KINDS},
        sizes=SIZES,
        wrt=(0, 1, 2),
        # options change what is computed, not how it is rounded
        dtypes=("float64", "float32") if keywords else ("float64", "float32", "bfloat16", "float16"),
        keywords=keywords,
        # A gate divides a few roundings of r, at most 10 where its slope counts, by the temperature.
        budget=Budget(forward=64.0, gradient=64.0),
        edge_sizes=SINGLE,
        finite_differences=False,
        laws=() if keywords else (Law("scale", scale_law, 64.0), Law("bounds", bounds_law, 4.0)),
        rejections=() if keywords else CHUNK_REJECTIONS,
    )


PAIRS: tuple[OpPair, ...] = (
    OpPair(
        name="snr_filter.signal_to_noise",
        reference=reference.signal_to_noise,
        production=production.signal_to_noise,
        oracle=ratio_by_head,
        inputs={kind: states(kind) for kind in KINDS},
        sizes=SIZES,
        wrt=(0,),
        budget=Budget(forward=8.0, gradient=8.0),
        returns="accumulation",
        edge_sizes=SINGLE,
        finite_differences=False,
        rejections=state_rejections(),
    ),
    OpPair(
        name="snr_filter.statistics",
        reference=reference.statistics,
        production=production.statistics,
        oracle=statistics_by_head,
        inputs={kind: states(kind) for kind in KINDS},
        sizes=SIZES,
        budget=Budget(forward=16.0),
        returns="accumulation",
        edge_sizes=SINGLE,
        rejections=state_rejections(),
    ),
    filter_pair(""),
    filter_pair(":cleaning", cleanup=0.75, threshold=1.0, temperature=0.5, gamma_boost=10.0),
    filter_pair(":hard", hard=True, cleanup=1.0, threshold=1.0),
    OpPair(
        name="snr_filter.importance",
        reference=reference.importance,
        production=production.importance,
        oracle=importance_by_entry,
        inputs={kind: aged(kind) for kind in KINDS},
        sizes=SIZES,
        wrt=(0, 1),
        budget=Budget(forward=16.0, gradient=32.0),
        returns="accumulation",
        finite_differences=False,
        rejections=(
            *state_rejections((2, 3, 3)),
            Rejection("age", lambda: zeros((2, 3, 3), (2, 3)), ShapeError, "one age per entry"),
            Rejection(
                "weights", lambda: zeros((2, 3, 3), (2, 3, 3)), ConfigError, "three weights", {"weights": (1.0,)}
            ),
            Rejection("rate", lambda: zeros((2, 3, 3), (2, 3, 3)), ConfigError, "age_rate ≥ 0", {"age_rate": -1.0}),
        ),
    ),
)
