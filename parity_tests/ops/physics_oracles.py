"""Oracles of the room ``physics``: loops over states and channels, dense Jacobians, dense resolvents, in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from parity_tests.ops.physics_inputs import mixing_layer

Diagnostics = dict[str, np.ndarray]

EPS = 1e-12
"""The default of every ``eps``."""


def energy_by_loops(x: np.ndarray, inverse_mass: Any, kappa: Any, scales: Any, weights: Any, biases: Any) -> np.ndarray:
    """Return H of one state, one degree of freedom and one term at a time."""
    d = len(x) // 2
    total = 0.0
    for i in range(d):
        total += 0.5 * inverse_mass[i] * x[d + i] ** 2 + 0.5 * float(kappa) * x[i] ** 2
    for s, w, b in zip(scales, weights, biases, strict=True):
        total += s * np.logaddexp(0.0, math.fsum(w * x[:d]) + b)
    return np.asarray(total)


def slope(q: np.ndarray, kappa: Any, scales: Any, weights: Any, biases: Any) -> np.ndarray:
    """Return ∇V(q), one term at a time."""
    total = float(kappa) * q
    for s, w, b in zip(scales, weights, biases, strict=True):
        total = total + s * w / (1.0 + math.exp(-(math.fsum(w * q) + b)))
    return total


def gradient_by_terms(x: np.ndarray, inverse_mass: Any, *potential: Any) -> np.ndarray:
    """Return ∇H of one state."""
    q, p = np.split(x, 2)
    return np.concatenate([slope(q, *potential), inverse_mass * p])


def leapfrog_by_maps(
    x: np.ndarray, inverse_mass: Any, *potential: Any, step: float, damping: float = 0.0, steps: int = 1
) -> np.ndarray:
    """Return the composition of its five maps, step by step."""
    q, p = np.split(x, 2)
    for _ in range(steps):
        p = p * math.exp(-damping * step / 2)
        p = p - step / 2 * slope(q, *potential)
        q = q + step * inverse_mass * p
        p = p - step / 2 * slope(q, *potential)
        p = p * math.exp(-damping * step / 2)
    return np.concatenate([q, p])


def discrete_by_projection(gradient: np.ndarray, change: np.ndarray, energy_change: Any) -> np.ndarray:
    """Return g with its component along Δx replaced by ΔE/|Δx|."""
    length = np.linalg.norm(change)
    if length == 0.0:
        return gradient
    along = change / length
    across = gradient - np.outer(along, along) @ gradient
    return across + along * float(energy_change) / length


def structure(n: int) -> np.ndarray:
    """Return Ω = [[0, I], [−I, 0]] of n degrees of freedom."""
    return np.kron(np.array([[0.0, 1.0], [-1.0, 0.0]]), np.eye(n))


def form_by_matrix(u: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return uᵀ Ω w."""
    return np.asarray(u @ structure(len(u) // 2) @ w)


def drift_by_loops(energies: np.ndarray) -> tuple[np.ndarray, Diagnostics]:
    """Return the drift, one step and one state at a time."""
    scale = np.asarray(np.abs(energies).sum() / energies.size + EPS)
    steps = [(after[s] - before[s]) / scale for before, after in pairs(energies) for s in range(energies.shape[1])]
    total = sum(energies[-1] - energies[0]) / energies.shape[1] / scale
    worst = np.asarray(max(abs(step) for step in steps))
    return np.asarray(mean([step**2 for step in steps])), {"scale": scale, "worst": worst, "total": np.asarray(total)}


def pairs(energies: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return neighbouring rows."""
    return [(energies[i], energies[i + 1]) for i in range(len(energies) - 1)]


def mean(values: list[Any]) -> Any:
    """Return the mean of a list."""
    return sum(values) / len(values)


def balance_by_loops(
    energies: np.ndarray,
    gradients: np.ndarray,
    resistance: np.ndarray,
    supply: np.ndarray | None = None,
    step: float = 1.0,
) -> tuple[np.ndarray, Diagnostics]:
    """Return the power balance with R as a matrix, one step and one state at a time."""
    scale = np.abs(energies).mean() + EPS
    residuals, losses = [], []
    for i, (before, after) in enumerate(pairs(energies)):
        for s, g in enumerate(gradients[i]):
            losses.append(step * (g @ np.diag(resistance) @ g))
            given = 0.0 if supply is None else supply[i, s]
            residuals.append((after[s] - before[s] + losses[-1] - given) / scale)
    worst = np.asarray(max(abs(r) for r in residuals))
    monitors = {"scale": np.asarray(scale), "worst": worst, "dissipation": np.asarray(mean(losses) / scale)}
    return np.asarray(mean([r**2 for r in residuals])), monitors


def residual_by_matrix(
    increments: np.ndarray, gradients: np.ndarray, resistance: np.ndarray, step: float = 1.0
) -> tuple[np.ndarray, Diagnostics]:
    """Return the Hamiltonian residual with J − R as a matrix."""
    flow = structure(increments.shape[1] // 2) - np.diag(resistance)
    fields = [flow @ g for g in gradients]
    wrong = mean([np.sum((f / step - field) ** 2) for f, field in zip(increments, fields, strict=True)])
    size = mean([np.sum((f / step) ** 2) for f in increments])
    monitors = {"increment": np.asarray(size), "field": np.asarray(mean([field @ field for field in fields]))}
    return np.asarray(wrong / (size + EPS)), monitors


def hinge_by_loops(
    energies: np.ndarray, supply: np.ndarray | None = None, rate: float = 0.0, step: float = 1.0
) -> tuple[np.ndarray, Diagnostics]:
    """Return the hinge, one step and one state at a time."""
    scale = np.abs(energies).mean() + EPS
    excess = []
    for i, (before, after) in enumerate(pairs(energies)):
        for s in range(energies.shape[1]):
            given = 0.0 if supply is None else supply[i, s]
            excess.append(max(0.0, after[s] - (1.0 - rate * step) * before[s] - given) / scale)
    share = mean([float(e > 0.0) for e in excess])
    monitors = {"scale": np.asarray(scale), "worst": np.asarray(max(excess)), "violations": np.asarray(share)}
    return np.asarray(mean([e**2 for e in excess])), monitors


def jacobian(x: np.ndarray) -> np.ndarray:
    """Return the Jacobian of the layer at one state (N, D) by complex steps, which round nothing off."""
    columns = []
    for i in range(x.size):
        moved = x.astype(complex).ravel()
        moved[i] += 1e-30j
        columns.append(mixing_layer(moved.reshape(x.shape)).imag.ravel() / 1e-30)
    return np.stack(columns, axis=1)


def defect_by_jacobian(
    _layer: Any, x: np.ndarray, u: np.ndarray, w: np.ndarray, damping: float = 0.0, step: float = 1.0
) -> tuple[np.ndarray, Diagnostics]:
    """Return the symplectic defect with DF and Ω as matrices over all tokens."""
    tokens, width = x.shape[-2:]
    omega = np.kron(np.eye(tokens), structure(width // 2))
    values, stretches = [], []
    for state, a, b in zip(x, u, w, strict=True):
        df, a, b = jacobian(state), a.ravel(), b.ravel()
        twist = df.T @ omega @ df - math.exp(-damping * step) * omega
        values.append((a @ twist @ b) ** 2 / ((a @ a) * (b @ b)))
        stretches.append((df @ a) @ (df @ a) / (a @ a))
    return np.asarray(mean(values)), {"stretch": np.asarray(mean(stretches))}


def anchor_by_loops(gradients: np.ndarray) -> tuple[np.ndarray, Diagnostics]:
    """Return the anchor."""
    square = mean([g @ g for g in gradients])
    return np.asarray((square - 1.0) ** 2), {"mean_square": np.asarray(square)}


def memory_by_loops(
    states: np.ndarray, keys: np.ndarray, values: np.ndarray, retention: np.ndarray, eta: np.ndarray, bound: Any = None
) -> tuple[np.ndarray, Diagnostics]:
    """Return the books of one memory, write by write, with the writes as matrices."""
    energies = [0.5 * np.linalg.norm(s) ** 2 for s in states]
    writes = [e * np.outer(k, v) for e, k, v in zip(eta, keys, values, strict=True)]
    lost = [(1 - a * a) * energies[t] for t, a in enumerate(retention)]
    given = [
        a * (states[t] * write).sum() + 0.5 * (write**2).sum()
        for t, (a, write) in enumerate(zip(retention, writes, strict=True))
    ]
    scale = mean(energies) + EPS
    residuals = [(energies[t + 1] - energies[t] + lost[t] - given[t]) / scale for t in range(len(writes))]
    a, largest = max(retention), max(np.linalg.norm(write) for write in writes)
    reach, limits = np.linalg.norm(states[0]), []
    for t in range(len(writes)):
        reach = a * reach + largest
        limits.append(reach if bound is None else bound[t])
    filled = [e / (limit**2 / 2 + EPS) for e, limit in zip(energies[1:], limits, strict=True)]
    value = mean([r**2 for r in residuals]) + mean([max(0.0, f - 1.0) ** 2 for f in filled])
    means = {"energy": mean(energies), "dissipation": mean(lost), "supply": mean(given)}
    monitors = {**means, "residual": max(abs(r) for r in residuals), "filled": max(filled)}
    return np.asarray(value), {name: np.asarray(monitor) for name, monitor in monitors.items()}


def budget_by_loops(decay: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, Diagnostics]:
    """Return the decay budget, head by head."""
    value = mean([(column.sum() / len(column) / goal - 1.0) ** 2 for column, goal in zip(decay.T, target, strict=True)])
    short = mean([float(math.log(2.0) / gamma < 1.0) for gamma in decay.ravel()])
    return np.asarray(value), {"mean": np.asarray(decay.sum() / decay.size), "overdamped": np.asarray(short)}


def divergence_by_loops(
    decay: np.ndarray, shortest: float = 4.0, longest: float = 4096.0, bins: int = 10
) -> tuple[np.ndarray, Diagnostics]:
    """Return the divergence with one membership at a time, in base 2."""
    octaves = math.log2(longest / shortest) / bins
    places = [(math.log2(math.log(2.0) / gamma) - math.log2(shortest)) / octaves for gamma in decay.ravel()]
    even = [(i + 0.5) / 16 for i in range(16 * bins)]
    p, even_p = (np.mean([membership(place, bins) for place in some], axis=0) for some in (places, even))
    typical = 2.0 ** mean([math.log2(math.log(2.0) / gamma) for gamma in decay.ravel()])
    return np.asarray(np.sum(p * np.log(p / even_p))), {"half_life": np.asarray(typical)}


def membership(place: float, bins: int) -> np.ndarray:
    """Return the weights with which one half-life belongs to the bins."""
    distance = -0.5 * (place - np.arange(bins) - 0.5) ** 2
    weights = np.exp(distance - distance.max())
    return weights / weights.sum()


def ward_by_matrix(
    green: np.ndarray, left: np.ndarray, right: np.ndarray, upper: np.ndarray, lower: np.ndarray, width: np.ndarray
) -> tuple[np.ndarray, Diagnostics]:
    """Return the Ward residual from the whole matrix G, built entry by entry from its diagonal."""
    n = len(green)
    g = np.diag(green).astype(complex)
    for i in range(n):
        for j in range(i + 1, n):
            g[i, j] = -g[i, j - 1] * upper[j - 1] / right[j]
        for j in range(i - 1, -1, -1):
            g[i, j] = -g[i, j + 1] * lower[j] / left[j]
    residual = width * (green.imag - np.abs(g) ** 2 @ width)
    return np.asarray(np.mean(residual**2)), {"worst": np.asarray(np.abs(residual).max())}


def log_det_by_product(left: np.ndarray) -> np.ndarray:
    """Return −(1/N) log|Π L| from sums of complex logarithms."""
    return np.asarray(-np.log(left.astype(complex)).sum().real / len(left))


def lagrangian_by_loops(
    task: Any, constraints: np.ndarray, multipliers: np.ndarray, penalties: np.ndarray
) -> tuple[np.ndarray, Diagnostics]:
    """Return the loss, constraint by constraint."""
    linear = math.fsum(m * c for m, c in zip(multipliers, constraints, strict=True))
    quadratic = math.fsum(r * c * c / 2 for r, c in zip(penalties, constraints, strict=True))
    monitors = {"linear": np.asarray(linear), "quadratic": np.asarray(quadratic)}
    return np.asarray(float(task) + linear + quadratic), monitors


def update_by_loops(multipliers: Any, constraints: Any, penalties: Any, targets: Any, limits: Any) -> np.ndarray:
    """Return the next multipliers, one at a time."""
    rows = zip(multipliers, constraints, penalties, targets, limits, strict=True)
    return np.array([min(max(m + r * (c - t), 0.0), top) for m, c, r, t, top in rows])
