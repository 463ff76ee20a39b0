"""Sign–log matrix product on the CPU: rescale to one real GEMM, and climb a ladder where that is not proven exact.

    a_i ≥ max_k A_ik,  b_j ≥ max_k B_kj      E_ik = s_ik exp(A_ik − a_i),  F_kj = s_kj exp(B_kj − b_j)
    S = E F      C = ln|S| + (a_i + b_j),  sign C = sign S

Symbols: A (M, K), B (K, N) logs with signs s; u unit roundoff; R the exponent range of the dtype, exp(−R) its smallest
normal number; β a boost, E exp(β) and F exp(β) using the upper half of the range. Shifts are whole numbers, so that
a_i + b_j is exact. A factor or product below exp(−R) is lost: at most K exp(β − R) in all. The others are formed with
relative errors u(|A−a| + |B−b| + 4), and since Σ t|ln t| ≤ T (ln K − ln T) for T = Σ t = Σ|terms|, ln T > −2 or lost
in the floor, what is computed differs from S by at most u (K + ln K + 12 + 2β) T ≤ … ‖E_i‖ ‖F_j‖ (Cauchy–Schwarz).
An output is accepted where

    |S| > K exp(β − R) / u  +  [signed] u (K + ln K + 16 + 2β) ‖E_i‖₂ ‖F_j‖₂

so that at most u is lost to the range, and the sign is exact. Only rows and columns with rejected outputs climb:
rescaled (β = 0) → boosted → K-blocked shifts with online merge → float64 → streamed log-sum-exp of single outputs.
Cost: one GEMM and MK + KN + MN exponentials where all is accepted; temporaries O(MK + KN + MN) always.
Derivation: docs/math/lns.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

RUNGS = ("rescaled", "boosted", "blocked", "float64", "streamed")
EXPONENT_RANGE = {torch.float32: 87.3, torch.float64: 708.0}
BLOCK = 64
"""Terms that share a shift on the K-blocked rung."""
STREAM_ELEMENTS = 1 << 17
"""Terms held at once on the streamed rung: one megabyte in float64."""
STREAM_COST = 128
"""Time of one streamed term in units of one multiplication of a GEMM (measured 100 to 200 on one core)."""


class Operands(NamedTuple):
    """Logs (…, M, K) and (…, K, N) with their signs, or with None where every number is positive."""

    sign_a: Tensor | None
    log_a: Tensor
    sign_b: Tensor | None
    log_b: Tensor

    @property
    def signed(self) -> bool:
        """Whether the operands carry signs."""
        return self.sign_a is not None

    def item(self, index: int) -> Operands:
        """Return the two-dimensional operands of one batch item."""
        sign_a, sign_b = (None if x is None else x[index] for x in (self.sign_a, self.sign_b))
        return Operands(sign_a, self.log_a[index], sign_b, self.log_b[index])

    def block(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Operands:
        """Return the chosen rows of A and columns of B in a dtype."""
        sign_a = None if self.sign_a is None else self.sign_a[rows]
        sign_b = None if self.sign_b is None else self.sign_b[:, columns]
        return Operands(sign_a, self.log_a[rows].to(dtype), sign_b, self.log_b[:, columns].to(dtype))

    def terms(self, part: slice) -> Operands:
        """Return the operands of a range of the summation index k."""
        sign_a = None if self.sign_a is None else self.sign_a[..., part]
        sign_b = None if self.sign_b is None else self.sign_b[..., part, :]
        return Operands(sign_a, self.log_a[..., part], sign_b, self.log_b[..., part, :])


class Rescaled(NamedTuple):
    """Linear factors, their product and what it takes to accept it; the true product is exp(shift) times larger."""

    left: Tensor
    right: Tensor
    total: Tensor
    shift: Tensor
    bound: Tensor


class Product(NamedTuple):
    """One product: ``scaled`` is S of the first rung, +∞ where it was not accepted; ``sign`` is empty without signs."""

    sign: Tensor
    log: Tensor
    scaled: Tensor
    rung: Tensor
    undecided: Tensor


class Report(NamedTuple):
    """A product, how each output was computed, and where its sign could not be decided.

    Attributes:
        sign: int8 (…, M, N).
        log: (…, M, N).
        rung: int8 (…, M, N): 0 rescaled, 1 boosted, 2 K-blocked, 3 float64, 4 streamed.
        undecided: True where float64 leaves the sign in doubt.
        condition: κ where undecided, 1 elsewhere.
    """

    sign: Tensor
    log: Tensor
    rung: Tensor
    undecided: Tensor
    condition: Tensor

    def shares(self) -> dict[str, float]:
        """Return the share of the outputs that each rung computed, by its name."""
        total = max(self.rung.numel(), 1)
        return {name: int((self.rung == code).sum()) / total for code, name in enumerate(RUNGS)}


def operands(sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor) -> Operands:
    """Return the operands with log −∞ wherever the sign is zero."""
    zero_a = log_a if sign_a is None or bool(sign_a.all()) else log_a.masked_fill(sign_a == 0, -math.inf)
    zero_b = log_b if sign_b is None or bool(sign_b.all()) else log_b.masked_fill(sign_b == 0, -math.inf)
    return Operands(sign_a, zero_a, sign_b, zero_b)


def boost_of(dtype: torch.dtype, terms: int) -> float:
    """Return the largest whole β for which K exp(2β) is finite."""
    return float(math.floor((EXPONENT_RANGE[dtype] - math.log(max(terms, 1))) / 2))


def shifts(log: Tensor, dim: int) -> Tensor:
    """Return the maxima along ``dim`` rounded up to whole numbers, a finite number below all others where all is −∞."""
    return log.amax(dim, keepdim=True).ceil_().clamp_(min=_lowest(log.dtype))


def _lowest(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).max / 8


def rescale(x: Operands, boost: float = 0.0) -> Rescaled:
    """Return the factors, their real product and the bound above which an entry of it is accepted."""
    shift_a, shift_b = shifts(x.log_a, -1) - boost, shifts(x.log_b, -2) - boost
    left, right = factors(x, shift_a, shift_b)
    return Rescaled(left, right, torch.matmul(left, right), shift_a + shift_b, _bound(x, left, right, boost))


def factors(x: Operands, shift_a: Tensor, shift_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return E = s exp(A − a) and F = s exp(B − b)."""
    left = torch.sub(x.log_a, shift_a).exp_()
    right = torch.sub(x.log_b, shift_b).exp_()
    if x.sign_a is not None and x.sign_b is not None:
        left.mul_(x.sign_a)
        right.mul_(x.sign_b)
    return left, right


def _bound(x: Operands, left: Tensor, right: Tensor, boost: float) -> Tensor:
    """Return what |S| must exceed to be accepted: a number, or (…, M, N) for signed operands."""
    dtype, terms = left.dtype, left.shape[-1]
    roundoff = torch.finfo(dtype).eps / 2
    floor = terms * math.exp(boost - EXPONENT_RANGE[dtype]) / roundoff
    if not x.signed:
        return left.new_tensor(floor)
    slack = roundoff * (terms + math.log(terms) + 16 + 2 * boost)
    norms = torch.linalg.vector_norm(left, dim=-1, keepdim=True).mul_(slack)
    return torch.mul(norms, torch.linalg.vector_norm(right, dim=-2, keepdim=True)).add_(floor)


def matmul(x: Operands) -> Product:
    """Return log|Σ_k s s exp(A_ik + B_kj)| and its sign for operands (batch, M, K) and (batch, K, N)."""
    first = rescale(x)
    total = first.total
    accepted = _accepted(total, first.bound)
    sign = total.sign().to(torch.int8) if x.signed else total.new_empty(0, dtype=torch.int8)
    log = (total.abs() if x.signed else total).log().add_(first.shift)
    rung = torch.zeros((), dtype=torch.int8).expand(total.shape)
    undecided = torch.zeros((), dtype=torch.bool).expand(total.shape)
    if accepted is None:
        return Product(sign, log, total, rung, undecided)
    rung, undecided = rung.clone(), undecided.clone()
    total.masked_fill_(~accepted, math.inf)
    for index in range(total.shape[0]):
        item = _Item(x.item(index), sign[index] if x.signed else None, log[index], rung[index], undecided[index])
        _climb(item, ~accepted[index])
    total.masked_fill_(log.isnan(), math.nan)
    return Product(sign, log, total, rung, undecided)


def _accepted(total: Tensor, bound: Tensor) -> Tensor | None:
    """Return where |S| exceeds its bound, or None where it does so everywhere."""
    if bound.ndim == 0 and bool(total.amin() > bound):
        return None
    accepted = total.abs() > bound
    return None if bool(accepted.all()) else accepted


class _Item(NamedTuple):
    """One batch item and the views of the result into which its rejected outputs are written."""

    x: Operands
    sign: Tensor | None
    log: Tensor
    rung: Tensor
    undecided: Tensor

    def write(self, where: tuple[Tensor, Tensor], total: Tensor, shift: Tensor, rung: int) -> None:
        """Write the outputs at ``where``, given S and its shift there."""
        value = total.abs().log_().add_(shift)
        self.log[where] = value.to(self.log.dtype)
        self.rung[where] = rung
        if self.sign is not None:
            self.sign[where] = ((value != -math.inf).to(torch.int8) - 2 * (total < 0)).to(torch.int8)


def _climb(item: _Item, rejected: Tensor) -> None:
    """Recompute the rejected outputs (M, N) of one item, each on the first rung that accepts it."""
    _settle_poisoned(item, rejected)
    if worth_a_product(rejected):
        _settle_zeros(item, rejected)
    dtype = item.x.log_a.dtype
    for rung in (1, 2, 3) if dtype == torch.float32 else (1, 2):
        if not worth_a_product(rejected):
            break
        rows, columns = rejected.any(1).nonzero().squeeze(1), rejected.any(0).nonzero().squeeze(1)
        part = item.x.block(rows, columns, torch.float64 if rung == 3 else dtype)
        boost = boost_of(part.log_a.dtype, part.log_a.shape[-1])
        total, shift, bound = _blocked(part, boost) if rung == 2 else rescale(part, boost)[2:]
        accepted = (total.abs() > bound) & rejected[rows][:, columns]
        i, j = accepted.nonzero(as_tuple=True)
        where = rows[i], columns[j]
        item.write(where, total[i, j], shift[i, j], rung)
        rejected[where] = False
    for where, total, peak, magnitude, _ in streamed(item.x, rejected):
        item.write(where, total, peak, 4)
        if item.x.signed:
            item.undecided[where] = total.abs() <= magnitude * stream_slack(item.x.log_a.shape[-1])


def worth_a_product(rejected: Tensor) -> bool:
    """Return whether a GEMM of the rows and columns concerned is cheaper than streaming the outputs one by one."""
    rows, columns = rejected.any(1).sum(), rejected.any(0).sum()
    return bool(rejected.sum() * STREAM_COST > rows * columns)


def _settle_poisoned(item: _Item, rejected: Tensor) -> None:
    """Write NaN wherever a term is one: beside another factor whose sign is not zero."""
    sign_a, log_a, sign_b, log_b = item.x
    nan_a, nan_b = (log.isnan().to(log.dtype) for log in (log_a, log_b))
    if not bool(nan_a.any() | nan_b.any()):
        return
    count_a = torch.ones_like(log_a) if sign_a is None else (sign_a != 0).to(log_a.dtype)
    count_b = torch.ones_like(log_b) if sign_b is None else (sign_b != 0).to(log_b.dtype)
    poisoned = (nan_a @ count_b + count_a @ nan_b) > 0
    item.log.masked_fill_(poisoned, math.nan)
    if item.sign is not None:
        item.sign.masked_fill_(poisoned, 1)
    rejected.logical_and_(~poisoned)


def _settle_zeros(item: _Item, rejected: Tensor) -> None:
    """Write exact zeros where no term is present: a product of zeros and ones counts them exactly."""
    rows, columns = rejected.any(1).nonzero().squeeze(1), rejected.any(0).nonzero().squeeze(1)
    part = item.x.block(rows, columns, item.x.log_a.dtype)
    present_a, present_b = ((log != -math.inf).to(log.dtype) for log in (part.log_a, part.log_b))
    i, j = ((present_a @ present_b == 0) & rejected[rows][:, columns]).nonzero(as_tuple=True)
    item.write((rows[i], columns[j]), item.log.new_zeros(i.shape), item.log.new_zeros(()), 0)
    rejected[rows[i], columns[j]] = False


def _blocked(x: Operands, boost: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return S, its shift and its bound with shifts of BLOCK terms each, merged online."""
    shape = (x.log_a.shape[0], x.log_b.shape[1])
    shift = x.log_a.new_full(shape, 2 * _lowest(x.log_a.dtype))
    total, bound = x.log_a.new_zeros(shape), x.log_a.new_zeros(shape)
    for start in range(0, x.log_a.shape[-1], BLOCK):
        part = rescale(x.terms(slice(start, start + BLOCK)), boost)
        peak = torch.maximum(shift, part.shift)
        kept, new = (shift - peak).exp_(), (part.shift - peak).exp_()
        total.mul_(kept).add_(part.total * new)
        bound.mul_(kept).add_(part.bound * new)
        shift = peak
    return total, shift, bound


def stream_slack(terms: int) -> float:
    """Return the bound of the rounding error of a streamed sum, relative to the sum of magnitudes."""
    return torch.finfo(torch.float64).eps / 2 * (terms + math.log(terms) + 16)


def streamed(x: Operands, chosen: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Tensor]]:
    """Yield chosen outputs in chunks: where, S, shift, Σ|terms|, and the terms (n, K), all in float64."""
    terms = x.log_a.shape[-1]
    i, j = chosen.nonzero(as_tuple=True)
    if i.numel() == 0:
        return
    log_b = x.log_b.t().contiguous()
    sign_b = None if x.sign_b is None else x.sign_b.t().contiguous()
    for where in zip(*(index.split(max(1, STREAM_ELEMENTS // terms)) for index in (i, j)), strict=True):
        exponent = x.log_a[where[0]].double().add_(log_b[where[1]])
        sign = None if x.sign_a is None or sign_b is None else x.sign_a[where[0]] * sign_b[where[1]]
        peak = exponent.amax(-1, keepdim=True)
        if bool(peak.isfinite().all()):
            weight = exponent.sub_(peak).exp_()
        else:
            weight, peak = _weights_at_infinity(exponent, sign)
        magnitude = weight.sum(-1)
        if sign is not None:
            weight.mul_(sign)
        total = weight.sum(-1) if x.signed else magnitude
        total = total.masked_fill((peak.squeeze(-1) == math.inf) & (total == 0), math.nan)
        yield where, total, peak.squeeze(-1), magnitude, weight


def _weights_at_infinity(exponent: Tensor, sign: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return exp(p − max p) and max p where some maxima are infinite: +∞ weighs 1, −∞ and terms of sign 0 nothing."""
    present = exponent if sign is None else exponent.masked_fill(sign == 0, -math.inf)
    peak = present.amax(-1, keepdim=True)
    weight = (present - peak).masked_fill_(present == peak, 0.0).exp_()
    return weight.masked_fill_(peak == -math.inf, 0.0), peak
