"""An embedding whose table is a tensor train, with the phase of the holographic original.

    E[i] = Σ_ρ f(θ_ρ) C_1[j_1, 1, ρ_1, :] ⊗ C_2[j_2, ρ_1, ρ_2, :] ⊗ …      j = π(i) = (j_1 v_2 + j_2) v_3 + …
    real cores: f(θ) = cos θ      complex cores, and ``forward_complex``: f(θ) = exp(iθ)
    initial core entries: std s = (σ² / (Σ_ρ |f(θ_ρ)|² r_2 ⋯ r_{K−1}))^(1/2K), so that E has standard deviation σ

Symbols: π a stored permutation of ids, θ the phase of the first rank, C_k cores (v_k, r_{k−1}, r_k, d_k), σ init_scale.
With real cores cos θ is a diagonal that C_1 can absorb, and its gradient vanishes at θ = 0: it adds nothing that can be
expressed and is kept for fidelity. With complex cores exp(iθ) is absorbed as well, yet the output is truly complex; no
imaginary part is ever dropped.
Cost: that of ``ops.tensor_train.rows``; only ids and cores are saved. Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from jaxtyping import Complex, Float, Inexact, Int
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.nn.tensor_train_compression import Compressed, Permutation, factors_of, permutation_of, ranks_of
from so8t_torch.ops import tensor_train
from so8t_torch.ops.tensor_train.decomposition import check_factors

__all__ = ["NOWHERE", "HolographicTTEmbedding"]

NOWHERE = -(2**31)
"""Position of padding and of ignored labels: outside every table, whatever the permutation."""


class HolographicTTEmbedding(nn.Module):
    """Rows of a tensor train by id; a drop-in for ``nn.Embedding`` with a fraction of its parameters.

    Parameters ``core1`` … ``coreK`` have shape (v_k, r_{k−1}, r_k, d_k), with two more numbers at the end (real and
    imaginary part) for complex cores; ``phase_shift`` (r_1,) is a parameter with ``phase_encoding``, else a zero
    buffer. The buffer ``id_permutation`` is π and travels with the state dict.

    Args:
        vocab_size: V.
        d_model: D, width of a row; complex numbers if the cores are complex.
        rank: of every bond, or one for each; at most that of the bond's matrix.
        num_cores: K, 2 or 3.
        phase_encoding: whether θ is trained, from N(0, 0.1²).
        init_scale: σ, standard deviation of the initial output.
        complex_cores: cores and output are complex. ``forward`` then needs ``emit="pair"``.
        padding_idx: the id whose row is zero and sends no gradient.
        vocab_factors: v_1 … v_K with Π v_k ≥ V; nearly equal ones by default.
        feature_factors: d_1 … d_K with Π d_k ≥ D; the most equal divisors of D by default.
        id_permutation: π, ``"golden"``, ``"identity"``, or a bijection of [0, V) as a tensor.
        emit: ``"real"``, or ``"pair"``: with complex cores ``forward`` returns [Re, Im], 2D real numbers.
        backend: of ``ops.tensor_train``.
        device: of the parameters.
        dtype: of the parameters, a real one; float32 or float64 if the cores are complex.

    Raises:
        ConfigError: a size, rank, factor, permutation or option is out of range.
        ShapeError: the factors do not cover V × D.
        DomainError: complex cores in a half dtype.
    """

    phase_shift: Tensor
    id_permutation: Tensor

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        rank: int | Sequence[int] = 16,
        num_cores: int = 2,
        phase_encoding: bool = True,
        init_scale: float = 0.02,
        *,
        complex_cores: bool = False,
        padding_idx: int | None = None,
        vocab_factors: Sequence[int] | None = None,
        feature_factors: Sequence[int] | None = None,
        id_permutation: Permutation = "golden",
        emit: Literal["real", "pair"] = "real",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(vocab_size, d_model, num_cores, init_scale, padding_idx, complex_cores, emit)
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise DomainError(f"HolographicTTEmbedding: expected a real floating dtype, got {dtype}.")
        if complex_cores:
            _refuse_half(dtype)
        vocab, feature = factors_of(vocab_size, d_model, num_cores, vocab_factors, feature_factors)
        ranks = (1, *ranks_of(rank, num_cores), 1)
        check_factors("HolographicTTEmbedding", (vocab_size, d_model), vocab, feature, ranks[1:-1])
        self.vocab_size, self.d_model, self.ranks = vocab_size, d_model, ranks[1:-1]
        self.num_cores, self.phase_encoding, self.init_scale = num_cores, phase_encoding, init_scale
        self.complex_cores, self.padding_idx, self.emit, self.backend = complex_cores, padding_idx, emit, backend
        self.vocab_factors, self.feature_factors = vocab, feature
        parts = (2,) if complex_cores else ()
        for k in range(num_cores):
            shape = (vocab[k], ranks[k], ranks[k + 1], feature[k], *parts)
            setattr(self, f"core{k + 1}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        phase = torch.zeros(ranks[1], device=device, dtype=dtype)
        if phase_encoding:
            self.phase_shift = nn.Parameter(phase)
        else:
            self.register_buffer("phase_shift", phase)
        self.register_buffer("id_permutation", permutation_of(id_permutation, vocab_size, device))
        self.reset_parameters()

    @classmethod
    def from_compressed(
        cls, found: Compressed, *, padding_idx: int | None = None, phase_encoding: bool = False, backend: str = "auto"
    ) -> HolographicTTEmbedding:
        """Return the layer of a compressed table; its phase starts at zero, so its rows are those of the cores.

        Args:
            found: what ``compress_embedding`` returned.
            padding_idx: as for the class.
            phase_encoding: whether θ is trained; at θ = 0 it gets no gradient.
            backend: as for the class.
        """
        report, first = found.report, found.cores[0]
        layer = cls(
            report.vocab_size,
            report.d_model,
            report.ranks,
            len(found.cores),
            phase_encoding,
            padding_idx=padding_idx,
            vocab_factors=report.vocab_factors,
            feature_factors=report.feature_factors,
            id_permutation=found.permutation,
            backend=backend,
            device=first.device,
            dtype=first.dtype,
        )
        with torch.no_grad():
            layer.phase_shift.zero_()
            for parameter, core in zip(layer.stored_cores(), found.cores, strict=True):
                parameter.copy_(core)
        return layer

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw phases and cores so that the output has standard deviation ``init_scale``.

        Args:
            generator: source of the numbers; PyTorch's global one by default.
        """
        if self.phase_encoding:
            self.phase_shift.normal_(0.0, 0.1, generator=generator)
        carried = self.phase_shift.new_tensor(float(self.ranks[0]), dtype=torch.float64)
        if not self.complex_cores:
            carried = self.phase_shift.double().cos().square().sum()
        for rank in self.ranks[1:]:
            carried = carried * rank
        scale = (self.init_scale**2 / carried) ** (0.5 / self.num_cores)
        if self.complex_cores:
            scale = scale / 2**0.5
        for core in self.stored_cores():
            core.normal_(0.0, 1.0, generator=generator).mul_(scale)

    def forward(self, input_ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        """Return the rows of ids, real: [Re, Im] if the cores are complex and ``emit`` is ``"pair"``.

        Args:
            input_ids: in [0, V), any shape, usually (B, L).

        Raises:
            DomainError: an id is out of range (on an accelerator only with ``ops.tensor_train.check_ids(True)``), or
                the cores are complex and ``emit`` is ``"real"``.
        """
        if not self.complex_cores:
            return self._rows(input_ids, self.cores())
        if self.emit == "real":
            raise DomainError(
                "HolographicTTEmbedding: the rows are complex and forward returns real numbers; call forward_complex, "
                'or build the layer with emit="pair" to get [Re, Im] of width 2·d_model.'
            )
        rows = self.forward_complex(input_ids)
        return torch.cat([rows.real, rows.imag], -1)

    def forward_complex(self, input_ids: Int[Tensor, "*batch"]) -> Complex[Tensor, "*batch d"]:
        """Return the rows with f(θ) = exp(iθ), complex64 or complex128.

        Args:
            input_ids: in [0, V).

        Raises:
            DomainError: an id is out of range, as for ``forward``.
        """
        if self.complex_cores:
            return self._rows(input_ids, self.cores())
        first, *others = self.stored_cores()
        phase = self.phase_shift.float() if self.phase_shift.dtype.itemsize < 4 else self.phase_shift
        parts = [
            self._rows(input_ids, (_scaled(first, wave), *others)).to(phase.dtype)
            for wave in (phase.cos(), phase.sin())
        ]
        return torch.complex(*parts)

    def cores(self) -> tuple[Inexact[Tensor, "_ _ _ _"], ...]:
        """Return the cores with the phase folded into the first: what ``ops.tensor_train`` takes, with gradients."""
        first, *others = self.stored_cores()
        if not self.complex_cores:
            return (_scaled(first, self.phase_shift.cos()) if self.phase_encoding else first, *others)
        _refuse_half(first.dtype)
        turned = torch.view_as_complex(first)
        if self.phase_encoding:
            turned = turned * torch.polar(torch.ones_like(self.phase_shift), self.phase_shift)[:, None]
        return (turned, *(torch.view_as_complex(core) for core in others))

    def stored_cores(self) -> list[Tensor]:
        """Return the parameters ``core1`` … ``coreK``."""
        return [getattr(self, f"core{k + 1}") for k in range(self.num_cores)]

    def dense_table(self) -> Inexact[Tensor, "v d"]:
        """Return all rows in the order of the ids; V·D numbers, complex if the cores are."""
        ids = torch.arange(self.vocab_size, device=self.id_permutation.device)
        return self._rows(ids, self.cores())

    def positions(self, ids: Int[Tensor, "*batch"], nowhere: int | None) -> Int[Tensor, "*batch"]:
        """Return π of the ids; what is out of range stays so, for the operation to refuse.

        Args:
            ids: of an integer dtype.
            nowhere: the id that gets the position ``NOWHERE``; None for none.

        Raises:
            DomainError: ids are no whole numbers.
        """
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DomainError(f"HolographicTTEmbedding: expected ids of an integer dtype, got {ids.dtype}.")
        ids = ids.long()
        inside = (ids >= 0) & (ids < self.vocab_size)
        placed = self.id_permutation[ids.clamp(0, self.vocab_size - 1)]
        placed = torch.where(inside, placed, ids.clamp(min=-1))
        return placed if nowhere is None else torch.where(ids == nowhere, NOWHERE, placed)

    def get_compression_ratio(self) -> float:
        """Return trained numbers over those of the full table; below 1 is smaller."""
        standard, found = self.get_parameter_counts()
        return found / standard

    def get_parameter_counts(self) -> tuple[int, int]:
        """Return the numbers of a full table with rows of the same kind, and those trained here."""
        numbers = 2 if self.complex_cores else 1
        return self.vocab_size * self.d_model * numbers, sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:
        """Return what the constructor was told, for ``print``."""
        factors = " · ".join(f"{v}×{d}" for v, d in zip(self.vocab_factors, self.feature_factors, strict=True))
        kind = ", complex" if self.complex_cores else ""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.vocab_size}, {self.d_model}, ranks={self.ranks}, factors {factors}{padding}{kind}"

    def _rows(self, ids: Tensor, cores: Sequence[Tensor]) -> Tensor:
        return tensor_train.rows(
            self.positions(ids, self.padding_idx),
            *cores,
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            padding_idx=None if self.padding_idx is None else NOWHERE,
            backend=self.backend,
        )


def _scaled(first: Tensor, factor: Tensor) -> Tensor:
    """Return core 1 with every rank scaled, in its own dtype."""
    return first * factor.to(first.dtype)[:, None]


def _refuse_half(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise DomainError(f"HolographicTTEmbedding: expected float32 or float64 for complex cores, got {dtype}.")


def _check_options(
    vocab_size: int, d_model: int, num_cores: int, init_scale: float, padding_idx: int | None, whole: bool, emit: str
) -> None:
    name = "HolographicTTEmbedding"
    for n in (vocab_size, d_model, *(() if padding_idx is None else (padding_idx,))):
        if not isinstance(n, Integral) or isinstance(n, bool):
            raise ConfigError(f"{name}: expected whole numbers for vocab_size, d_model and padding_idx, got {n!r}.")
    if vocab_size < 1 or d_model < 1:
        raise ConfigError(f"{name}: expected vocab_size and d_model ≥ 1, got {vocab_size} and {d_model}.")
    if num_cores not in (2, 3):
        raise ConfigError(f"{name}: expected num_cores 2 or 3, got {num_cores}.")
    if not 0 < init_scale < math.inf:
        raise ConfigError(f"{name}: expected a finite init_scale > 0, got {init_scale!r}.")
    if padding_idx is not None and not 0 <= padding_idx < vocab_size:
        raise ConfigError(f"{name}: expected padding_idx in [0, {vocab_size}), got {padding_idx}.")
    if emit not in ("real", "pair"):
        raise ConfigError(f"{name}: expected emit 'real' or 'pair', got {emit!r}.")
    if emit == "pair" and not whole:
        raise ConfigError(f"{name}: emit='pair' needs complex_cores=True; real cores have no imaginary part to emit.")
