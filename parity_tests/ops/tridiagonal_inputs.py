"""Chains for the room ``tridiagonal``: real and complex, hermitian and not, parted by zeros and by segments."""

from __future__ import annotations

import numpy as np

from parity_tests.harness.pair import Example, Size, Strategy

LEAST_DISSIPATION = 0.3
"""Least Im z. With couplings of random sign it keeps minors away from zero, where a chain is ill conditioned."""


def point(generator: np.random.Generator) -> np.ndarray:
    """Draw z in the upper half-plane."""
    return np.asarray(generator.standard_normal() + 1j * (LEAST_DISSIPATION + generator.exponential()))


def lossy(generator: np.random.Generator, n: int) -> np.ndarray:
    """Draw potentials v − iΓ with Γ > 0."""
    return generator.standard_normal(n) - 1j * (0.05 + 0.5 * generator.exponential(size=n))


def normal(generator: np.random.Generator, n: int) -> np.ndarray:
    """Draw complex couplings of size 1/2."""
    return 0.35 * (generator.standard_normal(n) + 1j * generator.standard_normal(n))


def unequal(generator: np.random.Generator, size: Size) -> Example:
    """Draw complex potentials and couplings, b and c independent."""
    n = size["N"]
    return lossy(generator, n), normal(generator, n - 1), normal(generator, n - 1), point(generator)


def real(generator: np.random.Generator, size: Size) -> Example:
    """Draw real potentials and couplings of either sign, b and c independent."""
    n = size["N"]
    b, c = (0.5 * generator.standard_normal(n - 1) for _ in range(2))
    return generator.standard_normal(n), b, c, point(generator)


def hermitian(generator: np.random.Generator, size: Size) -> Example:
    """Draw lossy potentials and hopping with c = b̄."""
    n = size["N"]
    b = normal(generator, n - 1)
    return lossy(generator, n), b, b.conj(), point(generator)


def laplacian(generator: np.random.Generator, size: Size) -> Example:
    """Draw a disordered Laplacian: −2 on the diagonal, 1 beside it."""
    n = size["N"]
    v = -2.0 + 0.5 * generator.standard_normal(n) - 0.02j
    return v, np.ones(n - 1), np.ones(n - 1), np.asarray(0.1 + 1j * LEAST_DISSIPATION)


def parted(generator: np.random.Generator, size: Size) -> Example:
    """Draw couplings of which a third are zero: b alone, c alone, or both."""
    h, b, c, z = real(generator, size)
    which = generator.integers(0, 9, b.shape)
    return h, np.where((which == 0) | (which == 2), 0.0, b), np.where((which == 1) | (which == 2), 0.0, c), z


def packed(generator: np.random.Generator, size: Size) -> Example:
    """Draw a row of segments whose numbers come in any order."""
    starts = generator.random(size["N"]) < 0.3
    ids = (7 * np.cumsum(starts) + 5) % 11
    return *unequal(generator, size), ids


def stream(generator: np.random.Generator, size: Size) -> Example:
    """Draw what came before, sites and couplings to the site before each."""
    n = size["N"]
    return np.asarray(normal(generator, 1)[0]), lossy(generator, n) - point(generator), normal(generator, n)


def fresh(generator: np.random.Generator, size: Size) -> Example:
    """Draw a stream that begins, real couplings, and starts again now and then."""
    _, d, _ = stream(generator, size)
    beta = np.where(generator.random(size["N"]) < 0.2, 0.0, 0.5 * generator.random(size["N"]))
    return np.asarray(0j), d, beta


def token(generator: np.random.Generator, _: Size) -> Example:
    """Draw one step of a stream."""
    state, d, beta = stream(generator, {"N": 1})
    return state, d[0], beta[0]


CHAINS: dict[str, Strategy] = {"unequal": unequal, "real": real, "parted": parted, "packed": packed}
HERMITIAN: dict[str, Strategy] = {"hermitian": hermitian, "laplacian": laplacian}
STREAMS: dict[str, Strategy] = {"stream": stream, "fresh": fresh}
TOKENS: dict[str, Strategy] = {"token": token}
