"""Weights whose singular values fall like the inverse zeta zeros, for new and for existing layers.

    W = c·Q(left) diag(γ_1/γ_j) Q(right)ᵀ,   ‖W‖_F = gain·√(outputs)  ("frobenius")   or   ‖W‖₂ = gain  ("spectral")

The noise is drawn by a numpy generator, and the factors are found by QR in float64 on the host: one seed gives one
array on every device. Nothing is decomposed into singular values, so that nothing can fail to converge.
Operation: so8t_torch/ops/zeta.py. Derivation: docs/math/zeta.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError
from so8t_torch.ops import zeta

__all__ = ["Initialized", "ZetaInitializer", "apply_zeta_initialization", "get_zeta_statistics", "zeta_linear_init"]

Norm = Literal["frobenius", "spectral"]

TOKEN_STD = 0.02
"""Standard deviation of the rows of token embeddings."""


def zeta_linear_init(
    shape: tuple[int, int], gain: float = 1.0, mode: Norm = "frobenius", *, rng: np.random.Generator
) -> Float[Tensor, "m n"]:
    """Return a weight of m outputs and n inputs in float64 on the host.

    Args:
        shape: (m, n), each at least 1.
        gain: as in ``zeta.linear_init``.
        mode: as in ``zeta.linear_init``.
        rng: draws (m, r) and then (n, r) standard normal numbers, r = min(m, n).

    Raises:
        ConfigError: a size below 1, or as in ``zeta.linear_init``.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ConfigError(f"zeta_linear_init: expected a shape (m, n) with m, n ≥ 1, got {tuple(shape)}.")
    left, right = (torch.from_numpy(rng.standard_normal((size, min(shape)))) for size in shape)
    return zeta.linear_init(left, right, gain=gain, mode=mode)


class ZetaInitializer:
    """Initialises single layers in place."""

    @staticmethod
    @torch.no_grad()
    def initialize_linear_zeta(
        linear: nn.Linear, gain: float = 1.0, mode: Norm = "frobenius", *, rng: np.random.Generator
    ) -> None:
        """Give a linear layer the spectrum γ_1/γ_j, and no bias.

        Args:
            linear: the layer; its weight keeps device and dtype.
            gain: as in ``zeta.linear_init``.
            mode: as in ``zeta.linear_init``.
            rng: as in ``zeta_linear_init``.

        Raises:
            ConfigError: as ``zeta_linear_init``, or the weight is not an ordinary floating-point matrix with data.
        """
        weight = linear.weight
        _expect_writable("initialize_linear_zeta", weight)
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ConfigError(
                f"initialize_linear_zeta: expected a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}; "
                "initialise before quantising."
            )
        weight.copy_(zeta_linear_init((weight.shape[0], weight.shape[1]), gain, mode, rng=rng))
        if linear.bias is not None:
            linear.bias.zero_()

    @staticmethod
    @torch.no_grad()
    def initialize_embedding_zeta(embedding: nn.Embedding, scale: float = 1.0, **options: Any) -> None:
        """Give an embedding of positions the rows of ``zeta.embedding``. Ids of tokens have no order: not for them.

        Args:
            embedding: the layer; row p belongs to position p, and a padding row becomes zero.
            scale: amplitude, positive.
            **options: omega_max, power and mode of ``zeta.frequencies``.

        Raises:
            ConfigError: an option is out of range, or the weight is not an ordinary parameter with data.
        """
        _expect_writable("initialize_embedding_zeta", embedding.weight)
        if not 0.0 < scale < math.inf:
            raise ConfigError(f"initialize_embedding_zeta: expected a scale > 0, got {scale!r}.")
        rows, width = embedding.weight.shape
        positions = torch.arange(rows, dtype=torch.float64, device=zeta.HOST)
        embedding.weight.copy_(zeta.embedding(positions, width, scale=scale, **options))
        if embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx].zero_()


class Initialized(NamedTuple):
    """Names of the layers that ``apply_zeta_initialization`` wrote, in order, and of those that it left."""

    linear: tuple[str, ...]
    positions: tuple[str, ...]
    tokens: tuple[str, ...]
    tied: tuple[str, ...]


def apply_zeta_initialization(
    model: nn.Module,
    gain: float = 1.0,
    mode: Norm = "frobenius",
    *,
    seed: int = 0,
    positions: Collection[str] = (),
    position_scale: float = math.sqrt(2.0) * TOKEN_STD,
) -> Initialized:
    """Initialise every linear and embedding layer of a model in place, in the order of ``named_modules``.

    Args:
        model: any module; layers of other kinds are left alone.
        gain: as in ``zeta.linear_init``.
        mode: as in ``zeta.linear_init``.
        seed: of the one generator that all layers draw from.
        positions: names of the ``nn.Embedding`` layers whose rows are positions; they get ``zeta.embedding``, every
            other embedding N(0, 0.02²).
        position_scale: amplitude of positions; √2·0.02 gives them the size of token embeddings.

    Returns:
        What was written. A head that shares the table of an embedding keeps it and is listed as tied.

    Raises:
        ConfigError: a name in ``positions`` is no embedding, a weight is computed from others or has no data, or as
            ``zeta_linear_init``.
    """
    rng = np.random.default_rng(seed)
    modules = dict(model.named_modules())
    tables = {name: m for name, m in modules.items() if isinstance(m, nn.Embedding)}
    unknown = sorted(set(positions) - tables.keys())
    if unknown:
        raise ConfigError(
            f"apply_zeta_initialization: expected names of embeddings in positions, got {', '.join(unknown)}; this "
            f"model has {', '.join(tables) or 'none'}."
        )
    shared = {id(table.weight) for table in tables.values()}
    layers = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    tied = tuple(name for name, layer in layers.items() if id(layer.weight) in shared)
    for name, layer in layers.items():
        if name not in tied:
            ZetaInitializer.initialize_linear_zeta(layer, gain, mode, rng=rng)
    for name, table in tables.items():
        if name in positions:
            ZetaInitializer.initialize_embedding_zeta(table, position_scale)
        else:
            _draw_tokens(table, rng)
    return Initialized(
        linear=tuple(name for name in layers if name not in tied),
        positions=tuple(name for name in tables if name in positions),
        tokens=tuple(name for name in tables if name not in positions),
        tied=tied,
    )


def get_zeta_statistics(n: int = 100) -> dict[str, Any]:
    """Return the first n zeros and the mean, standard deviation, least and largest of their spacings.

    Args:
        n: at least 2.

    Returns:
        ``zeros`` (a tensor), ``mean_spacing``, ``std_spacing``, ``min_spacing``, ``max_spacing``, ``num_zeros``.

    Raises:
        ConfigError: n is below 2.
    """
    if n < 2:
        raise ConfigError(f"get_zeta_statistics: expected n ≥ 2, as one zero has no spacing, got {n}.")
    gamma = zeta.zeros(n)
    spacing = gamma.diff()
    return {
        "zeros": gamma,
        "mean_spacing": float(spacing.mean()),
        "std_spacing": float(spacing.std(correction=0)),
        "min_spacing": float(spacing.min()),
        "max_spacing": float(spacing.max()),
        "num_zeros": n,
    }


@torch.no_grad()
def _draw_tokens(table: nn.Embedding, rng: np.random.Generator) -> None:
    """Draw the rows of a token embedding; a padding row becomes zero."""
    _expect_writable("apply_zeta_initialization", table.weight)
    table.weight.copy_(torch.from_numpy(rng.standard_normal(tuple(table.weight.shape)) * TOKEN_STD))
    if table.padding_idx is not None:
        table.weight[table.padding_idx].zero_()


def _expect_writable(function: str, weight: Tensor) -> None:
    """Raise unless what is written to a weight stays there: a parametrised one is computed anew, meta has no data."""
    if not isinstance(weight, nn.Parameter):
        raise ConfigError(f"{function}: expected a parameter, got a weight that is computed; remove parametrizations.")
    if weight.is_meta:
        raise ConfigError(f"{function}: expected a weight with data, got it on the meta device; call to_empty first.")
