"""Replaces a table of embeddings by a tensor train, measures what that costs, and refuses what is too far away.

    error = ‖E − Ê‖ / ‖E‖ over all V × D entries      worst row = max_i ‖E_i − Ê_i‖ / (‖E‖ / √V)
    row i of the table is row π(i) of the train, π a stored bijection of [0, V)

A byte-pair vocabulary is roughly sorted by frequency, so without π the frequent ids would share the first slice of the
first core. The golden permutation π(i) = g i mod V, g the number coprime to V nearest V (√5 − 1)/2, spreads any run of
neighbouring ids evenly.
Ê is what the layer returns: cores in the dtype of the table, rows by ``ops.tensor_train.rows``.
Cost: that of ``decompose`` and of ``sweeps`` times ``refine``. Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.ops import tensor_train
from so8t_torch.ops.tensor_train.decomposition import bond_spectra
from so8t_torch.ops.tensor_train.factors import balanced_factors, padded_factors

__all__ = [
    "Compressed",
    "CompressionReport",
    "compress_embedding",
    "permutation_of",
    "ranks_for_error",
    "require_error",
    "require_gate",
]

Permutation = Literal["golden", "identity"] | Tensor

_CHUNK = 4096


@dataclass(frozen=True)
class CompressionReport:
    """What a table and its train hold, and how far apart they are.

    Errors are relative Frobenius norms; ``worst_row_error`` is in units of the root mean square norm of a row.
    """

    vocab_size: int
    d_model: int
    vocab_factors: tuple[int, ...]
    feature_factors: tuple[int, ...]
    ranks: tuple[int, ...]
    sweeps: int
    decomposition_error: float
    relative_error: float
    worst_row: int
    worst_row_error: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    seconds: float

    def table(self, max_relative_error: float | None = None) -> Table:
        """Return the report as a table for a terminal.

        Args:
            max_relative_error: the gate to compare with; None leaves the verdict out.
        """
        table = Table(title=f"embedding {self.vocab_size} × {self.d_model} as {len(self.vocab_factors)} cores")
        table.add_column("quantity")
        table.add_column("value", justify="right")
        share = self.parameters_after / self.parameters_before
        rows = {
            "vocabulary factors": " × ".join(map(str, self.vocab_factors)),
            "feature factors": " × ".join(map(str, self.feature_factors)),
            "ranks": ", ".join(map(str, self.ranks)),
            "parameters": f"{self.parameters_before:,} → {self.parameters_after:,} ({share:.2%})",
            "bytes": f"{self.bytes_before:,} → {self.bytes_after:,}",
            "relative error, decomposition": f"{self.decomposition_error:.3e}",
            f"relative error, {self.sweeps} sweeps of least squares": f"{self.relative_error:.3e}",
            "worst row (units of the RMS row)": f"{self.worst_row_error:.3e} (id {self.worst_row})",
            "seconds": f"{self.seconds:.1f}",
        }
        if max_relative_error is not None:
            verdict = "kept" if self.relative_error <= max_relative_error else "refused"
            rows["gate: relative error at most"] = f"{max_relative_error:g}: {verdict}"
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return dataclasses.asdict(self)


class Compressed(NamedTuple):
    """The cores that stand for a table, the permutation of ids before them, and how well they do."""

    cores: tuple[Tensor, ...]
    permutation: Tensor
    report: CompressionReport


@torch.no_grad()
def compress_embedding(
    table: Float[Tensor, "v d"],
    rank: int | Sequence[int] = 16,
    *,
    num_cores: int = 2,
    sweeps: int = 3,
    max_relative_error: float | None = 0.1,
    vocab_factors: Sequence[int] | None = None,
    feature_factors: Sequence[int] | None = None,
    id_permutation: Permutation = "golden",
) -> Compressed:
    """Return the cores of a table, or refuse when they are further away than allowed.

    Args:
        table: E, (V, D), finite.
        rank: of every bond, or one for each.
        num_cores: K, at least 2.
        sweeps: of masked alternating least squares after the decomposition.
        max_relative_error: the largest ‖E − Ê‖ / ‖E‖ that is kept; None keeps everything.
        vocab_factors: v_1 … v_K with Π v_k ≥ V; nearly equal ones by default.
        feature_factors: d_1 … d_K with Π d_k ≥ D; the most equal divisors of D by default.
        id_permutation: π, ``"golden"``, ``"identity"``, or a bijection of [0, V).

    Raises:
        DomainError: the table is no finite real matrix, is all zero, or the error is above the gate; the text names
            the figure and ranks that are enough.
        ConfigError: factors or ranks do not fit each other, sweeps is negative, or π is no bijection.
        ShapeError: the factors do not cover the table.
    """
    if table.ndim != 2 or not table.is_floating_point():
        raise DomainError(
            f"compress_embedding: expected a real floating-point table (V, D), got {table.dtype} "
            f"{tuple(table.shape)}; use ops.tensor_train.decompose for a complex one."
        )
    started = time.perf_counter()
    size, width = table.shape
    factors = factors_of(size, width, num_cores, vocab_factors, feature_factors)
    ranks = ranks_of(rank, len(factors[0]))
    permutation = permutation_of(id_permutation, size, table.device)
    placed = torch.empty_like(table)
    placed[permutation] = table.detach()
    cores = tensor_train.decompose(placed, vocab_factors=factors[0], feature_factors=factors[1], ranks=ranks)
    plain_error, *_ = _errors(table, cores, permutation)
    cores = tensor_train.refine(placed, *cores, sweeps=sweeps)
    error, worst, worst_error = _errors(table, cores, permutation)
    parameters = sum(core.numel() for core in cores)
    report = CompressionReport(
        vocab_size=size,
        d_model=width,
        vocab_factors=factors[0],
        feature_factors=factors[1],
        ranks=ranks,
        sweeps=sweeps,
        decomposition_error=plain_error,
        relative_error=error,
        worst_row=worst,
        worst_row_error=worst_error,
        parameters_before=table.numel(),
        parameters_after=parameters,
        bytes_before=table.numel() * table.element_size(),
        bytes_after=parameters * table.element_size(),
        seconds=time.perf_counter() - started,
    )
    if max_relative_error is not None:
        require_error(report, placed, max_relative_error)
    return Compressed(cores, permutation, report)


def require_error(report: CompressionReport, table: Tensor, max_relative_error: float) -> None:
    """Refuse a compression whose relative error is above the gate.

    Args:
        report: of the compression.
        table: the table in the order of the train, to say which rank would do.
        max_relative_error: the gate, at least 0.

    Raises:
        DomainError: the error is above; the text names it and ranks that are enough.
        ConfigError: the gate is negative or NaN.
    """
    require_gate(max_relative_error)
    if report.relative_error <= max_relative_error:
        return
    ranks = ranks_for_error(
        table, max_relative_error, vocab_factors=report.vocab_factors, feature_factors=report.feature_factors
    )
    sizes = zip((1, *ranks), (*ranks, 1), strict=True)
    parameters = sum(
        v * d * p * q for v, d, (p, q) in zip(report.vocab_factors, report.feature_factors, sizes, strict=True)
    )
    rounding = torch.finfo(table.dtype).eps
    limit = (
        "" if max_relative_error >= rounding else f"; no rank goes below the rounding of {table.dtype}, {rounding:.1g}"
    )
    kind = "rank" if len(ranks) == 1 else "ranks"
    found, enough = (", ".join(map(str, r)) for r in (report.ranks, ranks))
    raise DomainError(
        f"compress_embedding: expected a relative error of at most {max_relative_error:g}, got "
        f"{report.relative_error:.4g} at {kind} {found}; {kind} {enough} would do, with {parameters:,} parameters "
        f"({parameters / report.parameters_before:.0%} of the table), less perhaps by least squares{limit}. "
        "Raise the rank, or allow a larger error."
    )


def require_gate(max_relative_error: float) -> None:
    """Refuse a gate that is no number of at least 0.

    Args:
        max_relative_error: the gate.

    Raises:
        ConfigError: it is negative or NaN.
    """
    if not max_relative_error >= 0:
        raise ConfigError(
            f"compress_embedding: expected max_relative_error ≥ 0, got {max_relative_error!r}; 0.1 is the default."
        )


def ranks_for_error(
    table: Float[Tensor, "v d"],
    relative_error: float,
    *,
    vocab_factors: Sequence[int],
    feature_factors: Sequence[int],
) -> tuple[int, ...]:
    """Return ranks at which the decomposition reaches a relative error: each bond may leave out ε² ‖E‖² / (K − 1).

    Args:
        table: E, (V, D), finite.
        relative_error: ε, in units of ‖E‖; what rounding leaves comes on top.
        vocab_factors: v_1 … v_K.
        feature_factors: d_1 … d_K.

    Returns:
        One rank for each bond. For two cores that cover the table exactly the least one; otherwise least squares
        (which need not fit what is padded) or other shares of the bonds may do with less.
    """
    spectra = bond_spectra(table, vocab_factors=vocab_factors, feature_factors=feature_factors)
    needed = []
    for spectrum in spectra:
        left_out = spectrum.flip(0).cumsum(0).flip(0)
        share = max(relative_error**2 / len(spectra), torch.finfo(spectrum.dtype).eps * len(spectrum))
        needed.append(max(1, int((left_out > share * left_out[0]).sum())))
    sizes = [v * d for v, d in zip(vocab_factors, feature_factors, strict=True)]
    for k, rank in enumerate(needed):
        needed[k] = min(rank, (needed[k - 1] if k else 1) * sizes[k])
    return tuple(needed)


def permutation_of(kind: Permutation, size: int, device: torch.device | str | None = None) -> Int[Tensor, " v"]:
    """Return a bijection of [0, V) as an int32 tensor: the position of every id in the train.

    Args:
        kind: ``"golden"``, ``"identity"``, or the bijection itself.
        size: V.
        device: of the result.

    Raises:
        ConfigError: an unknown name, or a tensor that is no bijection of [0, V).
    """
    ids = torch.arange(size, device=device, dtype=torch.int32)
    if isinstance(kind, Tensor):
        if kind.shape != (size,) or kind.is_floating_point() or not torch.equal(kind.to(ids).sort().values, ids):
            raise ConfigError(f"id_permutation: expected each of 0..{size - 1} once, got a tensor {tuple(kind.shape)}.")
        return kind.to(ids).clone()
    if kind == "identity":
        return ids
    if kind != "golden":
        raise ConfigError(f"id_permutation: expected 'golden', 'identity' or a tensor, got {kind!r}.")
    near = round(size * (math.sqrt(5) - 1) / 2)
    factor = min((g for g in range(1, size + 1) if math.gcd(g, size) == 1), key=lambda g: abs(g - near))
    return (ids.long() * factor % size).int()


def factors_of(
    vocab_size: int,
    d_model: int,
    num_cores: int,
    vocab_factors: Sequence[int] | None,
    feature_factors: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the factors that were given, or those that suit V and D.

    Args:
        vocab_size: V.
        d_model: D.
        num_cores: K.
        vocab_factors: v_1 … v_K, or None.
        feature_factors: d_1 … d_K, or None.

    Raises:
        ConfigError: K < 2, as many factors as cores are not given, or D has no K divisors above 1.
    """
    if num_cores < 2:
        raise ConfigError(f"expected num_cores ≥ 2, got {num_cores}; one core is the table itself.")
    vocab = tuple(vocab_factors) if vocab_factors is not None else padded_factors(vocab_size, num_cores)
    feature = tuple(feature_factors) if feature_factors is not None else balanced_factors(d_model, num_cores)
    if len(vocab) != num_cores or len(feature) != num_cores:
        raise ConfigError(f"expected {num_cores} factors of each kind, one for each core, got {vocab} and {feature}.")
    return vocab, feature


def ranks_of(rank: int | Sequence[int], num_cores: int) -> tuple[int, ...]:
    """Return one rank for each of the K − 1 bonds.

    Args:
        rank: one for all, or one for each.
        num_cores: K.

    Raises:
        ConfigError: it is neither a whole number nor a sequence.
    """
    if not isinstance(rank, (int, Sequence)):
        raise ConfigError(f"expected a whole number for the rank, or one for each bond, got {rank!r}.")
    return (rank,) * (num_cores - 1) if isinstance(rank, int) else tuple(rank)


def _errors(table: Tensor, cores: tuple[Tensor, ...], permutation: Tensor) -> tuple[float, int, float]:
    """Return the relative error, the worst id, and its error in units of the RMS row."""
    size, width = table.shape
    apart, whole = [], []
    for start in range(0, size, _CHUNK):
        rows = table[start : start + _CHUNK].double()
        found = tensor_train.rows(permutation[start : start + _CHUNK], *cores, vocab_size=size, d_model=width)
        apart.append((rows - found.double()).square().sum(1))
        whole.append(rows.square().sum())
    squares, total = torch.cat(apart), float(torch.stack(whole).sum())
    if total == 0.0:
        raise DomainError("compress_embedding: expected a table with an entry other than 0, got zeros alone.")
    worst = int(squares.argmax())
    return math.sqrt(float(squares.sum()) / total), worst, math.sqrt(float(squares[worst]) / (total / size))
