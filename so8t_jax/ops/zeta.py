"""The zeros of Riemann's ζ on the critical line, and what is built from them: bases, position embeddings, initialisers.

    ζ(½ + iγ_n) = 0,  0 < γ_1 < γ_2 < …          γ_n ≈ 2π x / W(x/e),  x = n − 11/8     for n > 1024
    x_j = (γ_j/2π) ln(γ_j/2πe) + 7/8             the zero on a scale where neighbours are 1 apart on average
    basis      cos ω_j t, sin ω_j t on t_i = i − (n−1)/2,  ω_j = π x_j / (x_m + ½),  m = ⌊n/2⌋
    embedding  E[p] = a·(sin φ_1, cos φ_1, sin φ_2, …),    φ_j = p·ω_max (γ_1/γ_j)^power
    weights    W = c·Q(left) diag(γ_1/γ_j) Q(right)ᵀ

Symbols: W(·) in the first line is the Lambert function; p a position; Q(·) the orthonormal factor of QR with a positive
diagonal of R; c a scale that fixes a norm.
The zeros are found here, not tabulated: sign changes of Z(t) = e^{iθ(t)} ζ(½ + it) on a grid finer than their smallest
distance, refined by Ridders' method; ζ by Euler–Maclaurin summation, θ(t) = Im ln Γ(¼ + it/2) − (t/2) ln π.
Cost: T² for all zeros below the height T, once for each n (about a second for the first 1024).
Derivation: docs/math/zeta.md.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num
from scipy.special import bernoulli, lambertw, loggamma

__all__ = ["basis", "embedding", "frequencies", "linear_init", "singular_values", "unfolded", "zeros"]

TABULATED = 1024
"""Zeros that are exact; the following ones are asymptotic, less than a mean spacing off."""
STEP = 1.0 / 8.0
"""Distance of grid points: no two zeros up to the 1024th are closer than 0.16."""
BLOCK = 512
ORDER = 14
"""Terms of the Euler–Maclaurin tail; with twice as many summands as t/2 the last one is below 10⁻¹⁵."""
REFINEMENTS = 9

Mode = Literal["scaled", "inverse", "direct"]
Norm = Literal["frobenius", "spectral"]


def zeros(n: int) -> Float[Array, " n"]:
    """Return the imaginary parts of the first n zeros with positive imaginary part, increasing.

    Args:
        n: at least 1.

    Returns:
        γ_1 … γ_n in float64 (in jax's default dtype where x64 is off): within 10⁻¹¹ up to the 1024th, from there on
        the asymptotic value, less than a mean spacing off.

    Source: H. M. Edwards, Riemann's Zeta Function (1974), chapters 6 and 7; for the asymptotic value G. França and
    A. LeClair, "A theory for the zeros of Riemann zeta and other L-functions" (2014), equation 20.
    """
    exact = _zeros_on_the_line(min(n, TABULATED))
    return jnp.asarray(np.concatenate([exact, _asymptotic(np.arange(TABULATED + 1.0, n + 1.0))]))


def unfolded(n: int) -> Float[Array, " n"]:
    """Return x_j = (γ_j/2π) ln(γ_j/2πe) + 7/8, the smooth part of the number of zeros below γ_j.

    Args:
        n: at least 1.

    Returns:
        x_1 … x_n, with mean spacing 1; the spacings keep the statistics of random Hermitian matrices.
    """
    turns = zeros(n) / (2.0 * math.pi)
    return turns * (jnp.log(turns) - 1.0) + 7.0 / 8.0


def basis(n: int) -> Float[Array, "n n"]:
    """Return the cosines and sines of the unfolded zeros on n centred points, as columns of norm one.

    Args:
        n: points and columns, at least 1.

    Returns:
        Columns cos ω_1t, sin ω_1t, cos ω_2t, …, and a constant one for odd n; independent, not orthogonal
        (``resonance.basis`` is the nearest orthonormal one).
    """
    t = np.arange(n) - (n - 1) / 2.0
    columns = jnp.ones((n, n % 2))
    if n > 1:
        x = unfolded(n // 2)
        angle = t[:, None] * (math.pi * x / (x[-1] + 0.5))[None]
        waves = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=2).reshape(n, -1)
        columns = jnp.concatenate([waves, columns], axis=1)
    return columns / jnp.sqrt((columns**2).sum(0, keepdims=True))


def frequencies(
    n: int, *, omega_max: float = math.pi / 2, power: float = 1.0, mode: Mode = "scaled"
) -> Float[Array, " n"]:
    """Return the frequencies of position embeddings in radians per position.

    Args:
        n: at least 1.
        omega_max: largest frequency of ``"scaled"``, in (0, π/2], so that no two neighbours look alike.
        power: exponent of γ_1/γ_j in ``"scaled"``, positive.
        mode: ``"scaled"`` ω_max (γ_1/γ_j)^power; ``"inverse"`` 1/γ_j; ``"direct"`` γ_j/2π, which is aliased: it starts
            at 2.25 and passes π at the third zero.

    Returns:
        ω_1 … ω_n.
    """
    gamma = zeros(n)
    if mode == "inverse":
        return 1.0 / gamma
    if mode == "direct":
        return gamma / (2.0 * math.pi)
    return omega_max * (gamma[0] / gamma) ** power


def embedding(
    positions: Num[Array, " t"],
    width: int,
    *,
    scale: float = 1.0,
    omega_max: float = math.pi / 2,
    power: float = 1.0,
    mode: Mode = "scaled",
) -> Float[Array, "t d"]:
    """Return the vectors of positions: a sine and a cosine for every frequency.

    Args:
        positions: any numbers, in tokens; nothing is clamped.
        width: D, at least 1; for odd D the last cosine is left out.
        scale: amplitude a; the root mean square of a row is a/√2 for even D.
        omega_max: as in ``frequencies``.
        power: as in ``frequencies``.
        mode: as in ``frequencies``.

    Returns:
        a·(sin φ_1, cos φ_1, sin φ_2, …) in the dtype of the positions, the default floating dtype for integers.
    """
    omega = frequencies((width + 1) // 2, omega_max=omega_max, power=power, mode=mode)
    if not jnp.issubdtype(positions.dtype, jnp.floating):
        positions = positions.astype(omega.dtype)
    phase = positions[:, None] * omega.astype(positions.dtype)[None]
    return scale * jnp.stack([jnp.sin(phase), jnp.cos(phase)], axis=-1).reshape(positions.shape[0], -1)[:, :width]


def singular_values(n: int) -> Float[Array, " n"]:
    """Return γ_1/γ_j: a spectrum that starts at 1 and falls like ln j / j."""
    gamma = zeros(n)
    return gamma[0] / gamma


def linear_init(
    left: Float[Array, "m r"], right: Float[Array, "n r"], *, gain: float = 1.0, mode: Norm = "frobenius"
) -> Float[Array, "m n"]:
    """Return a weight whose singular values are proportional to γ_1/γ_j, from two matrices of noise.

    Args:
        left: standard normal noise for the r = min(m, n) left singular vectors of a layer with m outputs.
        right: the same for the right singular vectors, n inputs.
        gain: in units of the norm that ``mode`` fixes, positive.
        mode: ``"frobenius"``: ‖W‖_F = gain·√m, as if entries had the variance gain²/n; ``"spectral"``: ‖W‖₂ = gain.

    Returns:
        W, for y = W x.
    """
    s = singular_values(left.shape[1]).astype(left.dtype)
    size = gain * math.sqrt(left.shape[0]) / jnp.sqrt((s**2).sum()) if mode == "frobenius" else gain
    return (_orthonormal(left) * (size * s)[None]) @ _orthonormal(right).T


def _orthonormal(noise: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Return the factor Q of noise = QR with R_jj > 0, which makes it unique."""
    q, r = jnp.linalg.qr(noise)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)[None]


@functools.cache
def _zeros_on_the_line(n: int) -> np.ndarray:
    """Return the first n zeros of Z."""
    height = _asymptotic(np.array([n + 2.0]))[0] + 2.0
    grid = np.arange(10.0, height, STEP)
    values = _hardy(grid)
    change = np.flatnonzero(np.sign(values[:-1]) != np.sign(values[1:]))[:n]
    a, b, at_a, at_b = grid[change], grid[change + 1], values[change], values[change + 1]
    for _ in range(REFINEMENTS):
        middle = (a + b) / 2
        at_middle = _hardy(middle)
        x = middle + (middle - a) * np.sign(at_a) * at_middle / np.sqrt(at_middle**2 - at_a * at_b)
        at_x = _hardy(x)
        # The new bracket is the pair of neighbours among a, middle, x, b between which Z changes its sign.
        points = np.stack([a, np.minimum(middle, x), np.maximum(middle, x), b])
        order = x < middle
        heights = np.stack([at_a, np.where(order, at_x, at_middle), np.where(order, at_middle, at_x), at_b])
        k = np.argmax(np.sign(heights[:-1]) != np.sign(heights[1:]), axis=0)
        columns = np.arange(len(k))
        a, b, at_a, at_b = points[k, columns], points[k + 1, columns], heights[k, columns], heights[k + 1, columns]
    return np.where(np.abs(at_a) < np.abs(at_b), a, b)


def _hardy(t: np.ndarray) -> np.ndarray:
    """Return Z(t) = e^{iθ(t)} ζ(½ + it), which is real."""
    theta = loggamma(0.25 + 0.5j * t).imag - t / 2.0 * math.log(math.pi)
    blocks = [_zeta(0.5 + 1j * t[i : i + BLOCK]) for i in range(0, len(t), BLOCK)]
    return (np.exp(1j * theta) * np.concatenate(blocks)).real


def _zeta(s: np.ndarray) -> np.ndarray:
    """Return ζ(s) by Euler–Maclaurin summation with N > |Im s| / 2 terms."""
    n = int(np.abs(s.imag).max() / 2.0) + 20
    k = np.arange(1, n)
    total = (np.exp(-1j * s.imag[:, None] * np.log(k)) * k**-0.5).sum(1)
    power = n ** (0.5 - s.real) * np.exp(-1j * s.imag * math.log(n)) * n**-0.5
    total = total + power * n / (s - 1.0) + power / 2.0
    term = power * s / n
    for j, number in enumerate(bernoulli(2 * ORDER)[2::2], start=1):
        total = total + number / math.factorial(2 * j) * term
        term = term * (s + 2 * j - 1) * (s + 2 * j) / n**2
    return total


def _asymptotic(n: np.ndarray) -> np.ndarray:
    """Return 2π x / W(x/e) with x = n − 11/8: the height where the smooth count of zeros is n − ½."""
    x = n - 11.0 / 8.0
    return 2.0 * math.pi * x / lambertw(x / math.e).real
