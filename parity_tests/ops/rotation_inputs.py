"""What judges rotations, and what they are judged on: dense matrices by scipy and numpy, and drawn examples."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from parity_tests.harness.pair import Example, Size, Strategy

UPPER = np.triu_indices(8, 1)
EYE = np.eye(8)


def dense_skew(a: np.ndarray) -> np.ndarray:
    """Return the skew matrix of 28 coordinates, one entry at a time."""
    A = np.zeros((8, 8))
    for value, i, j in zip(a, *UPPER, strict=True):
        A[i, j], A[j, i] = value, -value
    return A


def dense_unskew(M: np.ndarray) -> np.ndarray:
    """Return the 28 coordinates of (M − Mᵀ)/2."""
    return np.asarray([(M[i, j] - M[j, i]) / 2 for i, j in zip(*UPPER, strict=True)])


def dense_cayley(a: np.ndarray) -> np.ndarray:
    """Return (I − A/2)⁻¹(I + A/2) by scipy's solver."""
    A = dense_skew(a)
    return np.asarray(scipy.linalg.solve(EYE - A / 2, EYE + A / 2))


def dense_logarithm(R: np.ndarray, cut_margin: float = 1e-3) -> np.ndarray:
    """Return the skew part of scipy's principal logarithm."""
    del cut_margin
    return dense_unskew(np.real(scipy.linalg.logm(R)))


def block_diagonal(R: np.ndarray, channels: int) -> np.ndarray:
    """Return the D × D matrix with the rotations on its diagonal."""
    blocks = channels // 8
    return np.asarray(scipy.linalg.block_diag(*(R if len(R) == blocks else [R[0]] * blocks)))


def dense_apply(R: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the product with the dense matrix, leaving out what lies beside its blocks, where 0·∞ would be NaN."""
    beside = np.kron(np.eye(x.size // 8), np.ones((8, 8))) == 0
    return np.where(beside, 0.0, block_diagonal(R, x.size) * np.where(beside, 0.0, x)).sum(axis=1)


def dense_fold_output(W: np.ndarray, b: np.ndarray | None, R: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the products with the dense block-diagonal matrix."""
    D = block_diagonal(R, W.shape[0])
    return D @ W, None if b is None else D @ b


def dense_unfold_output(W: np.ndarray, b: np.ndarray | None, R: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the products with the inverse of the dense block-diagonal matrix."""
    D = np.linalg.inv(block_diagonal(R, W.shape[0]))
    return D @ W, None if b is None else D @ b


def dense_isometry(R: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the largest relative change of length, block by block."""
    y = block_diagonal(R, x.size) @ x
    pairs = [(np.linalg.norm(y[k : k + 8]), np.linalg.norm(x[k : k + 8])) for k in range(0, x.size, 8)]
    return np.asarray(max(abs(after / before - 1) if before else 0.0 for after, before in pairs))


def commutator(safe: np.ndarray, cmd: np.ndarray) -> np.ndarray:
    """Return the Frobenius norm of R_c R_s R_c⁻¹ R_s⁻¹ − I, with inverses by LU."""
    return np.asarray(np.linalg.norm(cmd @ safe @ np.linalg.inv(cmd) @ np.linalg.inv(safe) - EYE))


def of_norm(direction: np.ndarray, norm: float) -> np.ndarray:
    """Return a skew matrix's coordinates scaled to the largest angle ``norm``."""
    return np.asarray(direction * norm / np.linalg.norm(dense_skew(direction), 2))


def mixed(generator: np.random.Generator, _: Size) -> Example:
    """Draw coordinates whose largest angle is anywhere between 1e-8 and 50, so that a batch mixes all."""
    return (of_norm(generator.standard_normal(28), 10.0 ** generator.uniform(-8.0, np.log10(50.0))),)


def moderate(generator: np.random.Generator, _: Size) -> Example:
    """Draw coordinates whose largest angle is between 0.1 and 3."""
    return (of_norm(generator.standard_normal(28), generator.uniform(0.1, 3.0)),)


def in_planes(generator: np.random.Generator, angles: np.ndarray) -> np.ndarray:
    """Return the coordinates of given angles in four random orthogonal planes."""
    Q = np.linalg.qr(generator.standard_normal((8, 8)))[0]
    A = np.zeros((8, 8))
    for k, angle in enumerate(angles):
        A[2 * k, 2 * k + 1], A[2 * k + 1, 2 * k] = angle, -angle
    return dense_unskew(Q @ A @ Q.T)


def repeated(generator: np.random.Generator, _: Size) -> Example:
    """Draw equal angles in all four planes, or in two of them with none in the others."""
    angle = generator.uniform(0.1, 3.0)
    return (in_planes(generator, np.array([angle, angle, 0.0, 0.0] if generator.uniform() < 0.5 else [angle] * 4)),)


def near_pi(generator: np.random.Generator, _: Size) -> Example:
    """Draw one angle within 0.01 of π, where the two charts are far apart."""
    return (in_planes(generator, np.array([np.pi - 0.01 * generator.uniform(), 1.0, 0.3, 0.0])),)


def zeros(_: np.random.Generator, __: Size) -> Example:
    """Return the identity's coordinates."""
    return (np.zeros(28),)


COORDINATES: dict[str, Strategy] = {
    "moderate": moderate,
    "mixed": mixed,
    "repeated": repeated,
    "near_pi": near_pi,
    "zeros": zeros,
}


def rotations(generator: np.random.Generator, count: int, angle: float = 2.0) -> np.ndarray:
    """Draw rotations by scipy."""
    draws = (of_norm(generator.standard_normal(28), angle * generator.uniform(0.2, 1.0)) for _ in range(count))
    return np.stack([scipy.linalg.expm(dense_skew(a)) for a in draws])


def one_rotation(generator: np.random.Generator, _: Size) -> Example:
    """Draw a rotation by at most two radians."""
    return (rotations(generator, 1)[0],)


def slight_rotation(generator: np.random.Generator, _: Size) -> Example:
    """Draw a rotation near the identity."""
    return (rotations(generator, 1, 1e-3)[0],)


def nearly_half_turn(generator: np.random.Generator, _: Size) -> Example:
    """Draw a rotation with one angle 0.1 below π."""
    return (scipy.linalg.expm(dense_skew(in_planes(generator, np.array([np.pi - 0.1, 1.0, 1.0, 0.0])))),)


def two_rotations(generator: np.random.Generator, _: Size) -> Example:
    """Draw two rotations."""
    return tuple(rotations(generator, 2))


def two_coordinates(generator: np.random.Generator, _: Size) -> Example:
    """Draw two elements of so(8)."""
    return tuple(generator.standard_normal((2, 28)))


def matrix(generator: np.random.Generator, _: Size) -> Example:
    """Draw any matrix."""
    return (generator.standard_normal((8, 8)),)


def channels(angle: float, shared: bool = False) -> Strategy:
    """Return a strategy for rotations and one vector of channels."""

    def draw(generator: np.random.Generator, size: Size) -> Example:
        # the rotations have no batch axis, so that they depend on the size alone
        R = rotations(np.random.default_rng(size["n"]), 1 if shared else size["n"], angle)
        return R, generator.standard_normal(8 * size["n"])

    return draw


def with_infinity(generator: np.random.Generator, size: Size) -> Example:
    """Draw channels with one infinity: every channel of its block, and no other, loses its value."""
    R, x = channels(1.0)(generator, size)
    x[generator.integers(x.size)] = np.inf
    return R, x


def wide_or_plain_layer(bias: bool, shared: bool = False) -> Strategy:
    """Return a strategy for a layer of 8n outputs and 8m inputs and rotations of its outputs."""

    def draw(generator: np.random.Generator, size: Size) -> Example:
        W = generator.standard_normal((8 * size["n"], 8 * size["m"]))
        R = rotations(np.random.default_rng(size["n"]), 1 if shared else size["n"])
        return W, generator.standard_normal(8 * size["n"]) if bias else None, R

    return draw


def input_layer(generator: np.random.Generator, size: Size) -> Example:
    """Draw a layer of 8n outputs and 8m inputs and rotations of its inputs."""
    W = generator.standard_normal((8 * size["n"], 8 * size["m"]))
    return W, rotations(np.random.default_rng(size["m"]), size["m"])


APPLY: dict[str, Strategy] = {"turned": channels(2.0), "slight": channels(0.05), "shared": channels(1.0, shared=True)}
LAYER: dict[str, Strategy] = {
    "bias": wide_or_plain_layer(True),
    "no_bias": wide_or_plain_layer(False),
    "shared": wide_or_plain_layer(True, shared=True),
}
