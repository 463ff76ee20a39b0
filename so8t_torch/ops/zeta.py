"""The zeros of Riemann's ζ on the critical line, and what is built from them: bases, position embeddings, initialisers.

    ζ(½ + iγ_n) = 0,  0 < γ_1 < γ_2 < …          γ_n ≈ 2πu,  u ln u − u = n − 11/8       for n > 1024
    x_j = (γ_j/2π) ln(γ_j/2πe) + 7/8             the zero on a scale where neighbours are 1 apart on average
    basis      cos ω_j t, sin ω_j t on t_i = i − (n−1)/2,  ω_j = π x_j / (x_m + ½),  m = ⌊n/2⌋
    embedding  E[p] = a·(sin φ_1, cos φ_1, sin φ_2, …),    φ_j = p·ω_max (γ_1/γ_j)^power
    weights    W = c·Q(left) diag(γ_1/γ_j) Q(right)ᵀ

Symbols: p a position; Q(·) the orthonormal factor of QR with a positive diagonal of R; c a scale that fixes a norm.
The first 1024 zeros are a table of correctly rounded numbers, ``zeta_zeros.csv``, verified when it is read and made by
``scripts/zeta_zeros.py``. Everything is computed in float64: what depends on n alone on the host, so that a device
changes no bit of it, and without a singular value decomposition, so that none can fail to converge.
Twin: so8t_jax/ops/zeta.py. Derivation: docs/math/zeta.md.
"""

from __future__ import annotations

import hashlib
import math
from importlib.resources import files
from typing import Any, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DataError, DomainError, ShapeError
from so8t_torch.core.tensors import expect_tensors

__all__ = ["basis", "embedding", "frequencies", "linear_init", "singular_values", "unfolded", "zeros"]

CHECKSUM = "861847566984d53b25a1acfc6779004f2540244f9a644e0ccb26f6cc0b3bf51c"
"""SHA-256 of the numbers of the table, joined by commas."""
NEWTON_STEPS = 7
"""Convex, started left of the root: from n = 1025 on the steps from the third are below one eps."""

HOST = torch.device("cpu")
"""Named wherever a tensor is made: a model may be built under another default device, such as meta."""

Mode = Literal["scaled", "inverse", "direct"]
Norm = Literal["frobenius", "spectral"]


def _read_table(text: str) -> Tensor:
    """Return the numbers of the table in float64, or raise where one of them is not what was computed."""
    numbers = text.split()
    found = hashlib.sha256(",".join(numbers).encode()).hexdigest()
    if found != CHECKSUM:
        raise DataError(
            f"zeta_zeros.csv: expected {CHECKSUM[:16]}… as checksum of the zeros, got {found[:16]}… over "
            f"{len(numbers)} numbers; install the package again."
        )
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=HOST)


_TABLE = _read_table(files("so8t_torch.ops").joinpath("zeta_zeros.csv").read_text(encoding="ascii"))


def zeros(n: int) -> Float[Tensor, " n"]:
    """Return the imaginary parts of the first n zeros with positive imaginary part, strictly increasing.

    Args:
        n: at least 1.

    Returns:
        γ_1 … γ_n in float64 on the host: correctly rounded up to the 1024th, from there on the asymptotic value, less
        than a mean spacing off.

    Raises:
        ConfigError: n is below 1.

    Source: H. M. Edwards, Riemann's Zeta Function (1974), chapters 6 and 7; for the asymptotic value G. França and
    A. LeClair, "A theory for the zeros of Riemann zeta and other L-functions" (2014), equation 20.
    """
    _expect_count(n, "zeros")
    if n <= len(_TABLE):
        return _TABLE[:n].clone()
    y = torch.arange(len(_TABLE) + 1, n + 1, dtype=torch.float64, device=HOST) - 11.0 / 8.0
    u = y / y.log()
    for _ in range(NEWTON_STEPS):
        u = (u + y) / u.log()
    return torch.cat([_TABLE, 2.0 * math.pi * u])


def unfolded(n: int) -> Float[Tensor, " n"]:
    """Return x_j = (γ_j/2π) ln(γ_j/2πe) + 7/8, the smooth part of the number of zeros below γ_j.

    Args:
        n: at least 1.

    Returns:
        x_1 … x_n in float64, with mean spacing 1; the spacings keep the statistics of random Hermitian matrices.

    Raises:
        ConfigError: n is below 1.
    """
    _expect_count(n, "unfolded")
    gamma = zeros(n)
    return gamma * torch.log(gamma / (2.0 * math.pi * math.e)) / (2.0 * math.pi) + 7.0 / 8.0


def basis(n: int) -> Float[Tensor, "n n"]:
    """Return the cosines and sines of the unfolded zeros on n centred points, as columns of norm one.

    Args:
        n: points and columns, at least 1.

    Returns:
        Columns cos ω_1t, sin ω_1t, cos ω_2t, …, and a constant one for odd n, in float64; independent, not orthogonal
        (``resonance.basis`` is the nearest orthonormal one).

    Raises:
        ConfigError: n is below 1.
    """
    _expect_count(n, "basis")
    columns = torch.ones(n, n, dtype=torch.float64, device=HOST)
    if n > 1:
        x = unfolded(n // 2)
        t = torch.arange(n, dtype=torch.float64, device=HOST) - (n - 1) / 2.0
        angle = torch.outer(t, math.pi / (x[-1] + 0.5) * x)
        columns[:, 0 : n - n % 2 : 2] = angle.cos()
        columns[:, 1 : n - n % 2 : 2] = angle.sin()
    return torch.nn.functional.normalize(columns, dim=0)


def frequencies(
    n: int, *, omega_max: float = math.pi / 2, power: float = 1.0, mode: Mode = "scaled"
) -> Float[Tensor, " n"]:
    """Return the frequencies of position embeddings in radians per position.

    Args:
        n: at least 1.
        omega_max: largest frequency of ``"scaled"``, in (0, π/2], so that no two neighbours look alike.
        power: exponent of γ_1/γ_j in ``"scaled"``, positive.
        mode: ``"scaled"`` ω_max (γ_1/γ_j)^power; ``"inverse"`` 1/γ_j; ``"direct"`` γ_j/2π, which is aliased: it starts
            at 2.25 and passes π at the third zero.

    Returns:
        ω_1 … ω_n in float64.

    Raises:
        ConfigError: n is below 1, the mode is unknown, or omega_max or power is out of range.
    """
    _expect_count(n, "frequencies")
    if mode not in ("scaled", "inverse", "direct"):
        raise ConfigError(f"zeta.frequencies: expected mode 'scaled', 'inverse' or 'direct', got {mode!r}.")
    if not 0.0 < omega_max <= math.pi / 2:
        raise ConfigError(
            f"zeta.frequencies: expected omega_max in (0, π/2], got {omega_max!r}; beyond it positions are aliased."
        )
    if not 0.0 < power < math.inf:
        raise ConfigError(f"zeta.frequencies: expected a power > 0, got {power!r}.")
    gamma = zeros(n)
    if mode == "scaled":
        return omega_max * (gamma[0] / gamma).pow(power)
    return gamma.reciprocal() if mode == "inverse" else gamma / (2.0 * math.pi)


def embedding(
    positions: Num[Tensor, "*batch t"],
    width: int,
    *,
    scale: float = 1.0,
    omega_max: float = math.pi / 2,
    power: float = 1.0,
    mode: Mode = "scaled",
) -> Float[Tensor, "*batch t d"]:
    """Return the vectors of positions: a sine and a cosine for every frequency.

    Args:
        positions: any numbers, in tokens; nothing is clamped.
        width: D, at least 1; for odd D the last cosine is left out.
        scale: amplitude a; the root mean square of a row is a/√2 for even D.
        omega_max: as in ``frequencies``.
        power: as in ``frequencies``.
        mode: as in ``frequencies``.

    Returns:
        a·(sin φ_1, cos φ_1, sin φ_2, …) on the device and in the dtype of the positions, in float32 for integers.

    Raises:
        ShapeError: positions have no axis of tokens.
        DomainError: positions are complex or booleans.
        ConfigError: width is below 1, or as in ``frequencies``.

    Numerics: angles in float64 and one rounding at the end; a phase of 10⁵ radians loses ten bits of it.
    """
    expect_tensors("zeta.embedding", positions=positions)
    if positions.is_complex() or positions.dtype == torch.bool:
        raise DomainError(f"zeta.embedding: expected numbers of tokens as positions, got {positions.dtype}.")
    _expect_count(width, "embedding", "width")
    omega = frequencies((width + 1) // 2, omega_max=omega_max, power=power, mode=mode).to(positions.device)
    found = scale * waves(positions, omega, width)
    return found.to(positions.dtype if positions.is_floating_point() else torch.float32)


def waves(positions: Num[Tensor, "*batch t"], omega: Float[Tensor, " n"], width: int) -> Float[Tensor, "*batch t d"]:
    """Return (sin φ_1, cos φ_1, sin φ_2, …) of φ_j = p ω_j in float64, where the positions are.

    Args:
        positions: p.
        omega: what ``frequencies`` returned, on the device of the positions.
        width: D, twice as many as frequencies, or one less.

    Raises:
        ShapeError: positions have no axis of tokens.
    """
    if positions.ndim == 0:
        raise ShapeError("zeta.embedding: expected positions (..., T), got a tensor without axes.")
    phase = positions.double()[..., None] * omega
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)[..., :width]


def singular_values(n: int) -> Float[Tensor, " n"]:
    """Return γ_1/γ_j in float64: a spectrum that starts at 1 and falls like ln j / j.

    Args:
        n: at least 1.

    Raises:
        ConfigError: n is below 1.
    """
    _expect_count(n, "singular_values")
    gamma = zeros(n)
    return gamma[0] / gamma


def linear_init(
    left: Float[Tensor, "*batch m r"],
    right: Float[Tensor, "*batch n r"],
    *,
    gain: float = 1.0,
    mode: Norm = "frobenius",
) -> Float[Tensor, "*batch m n"]:
    """Return a weight whose singular values are proportional to γ_1/γ_j, from two matrices of noise.

    Args:
        left: standard normal noise for the r = min(m, n) left singular vectors of a layer with m outputs.
        right: the same for the right singular vectors, n inputs.
        gain: in units of the norm that ``mode`` fixes, positive.
        mode: ``"frobenius"``: ‖W‖_F = gain·√m, as if entries had the variance gain²/n; ``"spectral"``: ‖W‖₂ = gain.

    Returns:
        W, for y = W x, on the device and in the dtype of the noise; it carries no gradient.

    Raises:
        ShapeError: the two do not have min(m, n) columns each.
        DomainError: the noise is not of a real floating dtype, or on the meta device.
        ConfigError: the mode is unknown, or the gain is not positive.

    Numerics: QR in float64 on the host whatever the device, rounded once.
    """
    _expect_noise(left, right)
    if mode not in ("frobenius", "spectral"):
        raise ConfigError(f"zeta.linear_init: expected mode 'frobenius' or 'spectral', got {mode!r}.")
    if not 0.0 < gain < math.inf:
        raise ConfigError(f"zeta.linear_init: expected a gain > 0, got {gain!r}.")
    s = singular_values(left.shape[-1])
    size = gain if mode == "spectral" else gain * math.sqrt(left.shape[-2]) / torch.linalg.vector_norm(s)
    weight = _orthonormal(left) @ (size * s[:, None] * _orthonormal(right).mT)
    return weight.to(left)


def _orthonormal(noise: Tensor) -> Tensor:
    """Return the factor Q (..., m, r) of noise = QR with R_jj > 0, in float64 on the host."""
    q, r = torch.linalg.qr(noise.detach().to(HOST, torch.float64))
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]


def _expect_noise(left: Tensor, right: Tensor) -> None:
    """Raise unless noise is (..., m, r) and (..., n, r) with r = min(m, n) ≥ 1, real and of one dtype."""
    expect_tensors("zeta.linear_init", left=left, right=right)
    if min(left.ndim, right.ndim) < 2 or left.shape[:-2] != right.shape[:-2]:
        raise ShapeError(
            f"zeta.linear_init: expected noise (..., m, r) and (..., n, r), got {tuple(left.shape)} and "
            f"{tuple(right.shape)}."
        )
    m, n = left.shape[-2], right.shape[-2]
    if not left.shape[-1] == right.shape[-1] == min(m, n) or min(m, n) < 1:
        raise ShapeError(
            f"zeta.linear_init: expected r = min(m, n) ≥ 1 columns of noise on both sides, got {tuple(left.shape)} and "
            f"{tuple(right.shape)}."
        )
    if not left.is_floating_point() or left.dtype != right.dtype:
        raise DomainError(
            f"zeta.linear_init: expected noise of one real floating dtype, got {left.dtype} and {right.dtype}."
        )
    if left.is_meta or right.is_meta:
        raise DomainError("zeta.linear_init: expected noise with data, got it on the meta device; draw it on the host.")


def _expect_count(n: Any, function: str, name: str = "n") -> None:
    """Raise unless n is a whole number of at least 1."""
    if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"zeta.{function}: expected a whole number {name} ≥ 1, got {n!r}.")
