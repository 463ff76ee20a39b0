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

from so8t_torch.ops.lns.rescaling import Operands, boost_of, lowest, rescale

RUNGS = ("rescaled", "boosted", "blocked", "float64", "streamed")
BLOCK = 64
"""Terms that share a shift on the K-blocked rung."""
STREAM_ELEMENTS = 1 << 17
"""Terms held at once on the streamed rung: one megabyte in float64."""
STREAM_COST = 128
"""Time of one streamed term in multiplications of a GEMM: 3 to 5 ns against 0.02 (float32) or 0.04 ns, on one core."""
EXP_COST = 64
"""Time of one exponential on the same scale."""


class Product(NamedTuple):
    """One product; ``sign`` is empty without signs.

    ``scaled`` is S in units of exp(a_i + b_j), from whichever rung, +∞ where that is zero or lost in the floor.
    """

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


def matmul(x: Operands) -> Product:
    """Return log|Σ_k s s exp(A_ik + B_kj)| and its sign for operands (batch, M, K) and (batch, K, N)."""
    total, shift_a, shift_b, bound, floor, _ = rescale(x, sharp=False)
    rung = torch.zeros((), dtype=torch.int8, device=total.device).expand(total.shape)
    undecided = torch.zeros((), dtype=torch.bool, device=total.device).expand(total.shape)
    magnitude = total.abs() if x.signed else total
    settled = not x.signed and bool(total.amin() > bound)
    rejected = total.new_empty((0, 3), dtype=torch.int64) if settled else (~(magnitude > bound)).nonzero()
    faint = ~(magnitude[rejected.unbind(1)] > floor)
    if x.signed:
        sign = torch.sign(total, out=bound).to(torch.int8)
        log = magnitude.log_().add_(torch.add(shift_a, shift_b, out=bound))
    else:
        sign, log = total.new_empty(0, dtype=torch.int8), total.log().add_(shift_a + shift_b)
    if not rejected.numel():
        return Product(sign, log, total, rung, undecided)
    rung, undecided = rung.clone(), undecided.clone()
    for index in rejected[:, 0].unique().tolist():
        here = rejected[:, 0] == index
        own = (sign[index] if x.signed else None, log[index], total[index], rung[index], undecided[index])
        item = _Item(x.item(index), *own, shift_a[index], shift_b[index], floor)
        _climb(item, Entries(rejected[here, 1], rejected[here, 2], faint[here]))
    return Product(sign, log, total, rung, undecided)


class Entries(NamedTuple):
    """Outputs (i, j) still to be computed; ``faint`` are below the range, the others cancel."""

    i: Tensor
    j: Tensor
    faint: Tensor

    def where(self, chosen: Tensor) -> Entries:
        """Return the chosen ones."""
        return Entries(*(x[chosen] for x in self))

    def frame(self, x: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the rows and columns concerned, and the place of every entry among them."""
        rows, row = _distinct(self.i, x.log_a.shape[0])
        columns, column = _distinct(self.j, x.log_b.shape[1])
        return rows, columns, row, column

    def worth_a_product(self, x: Operands) -> bool:
        """Return whether a GEMM of the rows and columns concerned is cheaper than streaming the outputs singly."""
        rows, columns = (part.numel() for part in self.frame(x)[:2])
        return self.i.numel() * STREAM_COST > rows * columns + (rows + columns) * EXP_COST


def _distinct(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the distinct values of an index, and the place of every element among them."""
    present = torch.zeros(size, dtype=torch.int64, device=index.device).index_fill_(0, index, 1)
    return present.nonzero().squeeze(1), present.cumsum(0)[index] - 1


class _Item(NamedTuple):
    """One batch item and the views of the result into which its rejected outputs are written."""

    x: Operands
    sign: Tensor | None
    log: Tensor
    scaled: Tensor
    rung: Tensor
    undecided: Tensor
    shift_a: Tensor
    shift_b: Tensor
    floor: float

    def write(self, where: tuple[Tensor, Tensor], total: Tensor, shift: Tensor, rung: int) -> None:
        """Write the outputs at ``where``, given S and its shift there."""
        value = total.abs().log_().double() + shift
        self.log[where] = value.to(self.log.dtype)
        self.rung[where] = rung
        own = self.shift_a[where[0], 0].double() + self.shift_b[0, where[1]]
        linear = total * torch.exp(shift - own)
        linear = torch.where(linear.abs() > self.floor, linear, math.inf)
        self.scaled[where] = torch.where(value.isnan(), value, linear).to(self.scaled.dtype)
        if self.sign is not None:
            self.sign[where] = ((value != -math.inf).to(torch.int8) - 2 * (total < 0)).to(torch.int8)


def _climb(item: _Item, rejected: Entries) -> None:
    """Recompute the rejected outputs of one item, each on the first rung that accepts it."""
    rejected = _without_poisoned(item, rejected)
    faint, cancelling = rejected.where(rejected.faint), rejected.where(~rejected.faint)
    if cancelling.worth_a_product(item.x):
        cancelling = _still_cancelling(item, cancelling)
    for rung in (0, 1, 2):
        if faint.i.numel() and faint.worth_a_product(item.x):
            faint = _try_rung(item, faint, rung) if rung else _without_zeros(item, faint)
    rejected = Entries(*(torch.cat(pair) for pair in zip(faint, cancelling, strict=True)))
    if item.x.log_a.dtype == torch.float32 and rejected.worth_a_product(item.x):
        rejected = _try_rung(item, rejected, 3)
    terms = item.x.log_a.shape[-1]
    for where, total, peak, magnitude, _ in streamed(item.x, rejected):
        item.write(where, total, peak, 4)
        if item.x.signed:
            item.undecided[where] = total.abs() <= magnitude * stream_slack(terms)


def _try_rung(item: _Item, entries: Entries, rung: int) -> Entries:
    """Write what this rung accepts and return the rest."""
    rows, columns, row, column = entries.frame(item.x)
    part = item.x.block(rows, columns, torch.float64 if rung == 3 else item.x.log_a.dtype)
    boost = boost_of(part.log_a.dtype, part.log_a.shape[-1])
    if rung == 2:
        total, shift, bound = _blocked(part, boost)
    else:
        found = rescale(part, boost)
        total, shift, bound = found.total, found.shift, found.bound
    value = total[row, column]
    accepted = value.abs() > bound.expand_as(total)[row, column]
    where = entries.i[accepted], entries.j[accepted]
    item.write(where, value[accepted], shift[row, column][accepted], rung)
    return entries.where(~accepted)


def _still_cancelling(item: _Item, entries: Entries) -> Entries:
    """Return those of the entries that the sum of magnitudes itself, in place of its bound, does not accept either."""
    rows, columns, row, column = entries.frame(item.x)
    bound = rescale(item.x.block(rows, columns, item.x.log_a.dtype)).bound[row, column]
    return entries.where(~(item.scaled[entries.i, entries.j].abs() > bound))


def _without_poisoned(item: _Item, rejected: Entries) -> Entries:
    """Write NaN wherever a term is one, beside another factor whose sign is not zero, and return the rest."""
    sign_a, log_a, sign_b, log_b = item.x
    if not bool(log_a.amax().isnan() | log_b.amax().isnan()):
        return rejected
    nan_a, nan_b = (log.isnan().to(log.dtype) for log in (log_a, log_b))
    count_a = torch.ones_like(log_a) if sign_a is None else (sign_a != 0).to(log_a.dtype)
    count_b = torch.ones_like(log_b) if sign_b is None else (sign_b != 0).to(log_b.dtype)
    poisoned = (nan_a @ count_b + count_a @ nan_b)[rejected.i, rejected.j] > 0
    there = rejected.where(poisoned)
    item.write((there.i, there.j), item.log.new_full(there.i.shape, math.nan), torch.zeros(()), 0)
    return rejected.where(~poisoned)


def _without_zeros(item: _Item, rejected: Entries) -> Entries:
    """Write exact zeros where no term is present, which a product of zeros and ones counts, and return the rest."""
    rows, columns, row, column = rejected.frame(item.x)
    part = item.x.block(rows, columns, item.x.log_a.dtype)
    present_a, present_b = ((log != -math.inf).to(log.dtype) for log in (part.log_a, part.log_b))
    zero = (present_a @ present_b)[row, column] == 0
    there = rejected.where(zero)
    item.write((there.i, there.j), item.log.new_zeros(there.i.shape), torch.zeros(()), 0)
    return rejected.where(~zero)


def _blocked(x: Operands, boost: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return S, its shift and its bound with shifts of BLOCK terms each, merged online."""
    total, bound = (x.log_a.new_zeros(x.log_a.shape[0], x.log_b.shape[1]) for _ in range(2))
    shift = total.new_full(total.shape, 2 * lowest(total.dtype), dtype=torch.float64)
    for start in range(0, x.log_a.shape[-1], BLOCK):
        part = rescale(x.terms(slice(start, start + BLOCK)), boost)
        own = part.shift
        peak = torch.maximum(shift, own)
        # a boosted sum times exp(own − peak) has a place where exp(own − peak) has none: its root is applied twice
        kept, new = ((each - peak).mul_(0.5).exp_().to(total.dtype) for each in (shift, own))
        total = total * kept * kept + part.total * new * new
        bound = bound * kept * kept + part.bound * new * new
        shift = peak
    return total, shift, bound


def stream_slack(terms: int) -> float:
    """Return the bound of the rounding error of a streamed sum, relative to the sum of magnitudes."""
    return torch.finfo(torch.float64).eps / 2 * (terms + math.log(terms) + 16)


def streamed(x: Operands, chosen: Entries) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor, Tensor]]:
    """Yield chosen outputs in chunks: where, S, shift, Σ|terms|, and the terms (n, K), all in float64."""
    terms = x.log_a.shape[-1]
    if chosen.i.numel() == 0:
        return
    for where in zip(*(index.split(max(1, STREAM_ELEMENTS // terms)) for index in chosen[:2]), strict=True):
        i, j = where
        exponent, rest = _exact_sum(x.log_a[i].double(), _columns(x.log_b, j).double())
        sign = None if x.sign_a is None or x.sign_b is None else x.sign_a[i].mul_(_columns(x.sign_b, j))
        peak = exponent.amax(-1, keepdim=True)
        if bool(peak.isfinite().all()):
            weight = exponent.sub_(peak).add_(rest).exp_()
        else:
            weight, peak = _weights_at_infinity(exponent, rest, sign)
        magnitude = weight.sum(-1)
        if sign is not None:
            weight.mul_(sign)
        total = weight.sum(-1) if x.signed else magnitude
        total = total.masked_fill((peak.squeeze(-1) == math.inf) & (total.abs() != magnitude), math.nan)
        yield where, total, peak.squeeze(-1), magnitude, weight


def _exact_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return p = a + b and what rounding took from it (Knuth's two-sum), 0 where p is not finite.

    A rounded exponent of 10⁸ would change its term by 10⁻⁸, and what is left of cancelling terms by any amount.
    """
    total = a + b
    part = total - a
    rest = (b - part).add_(a - (total - part))
    return total, rest.masked_fill_(~total.isfinite(), 0.0)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Return the chosen columns as contiguous rows."""
    return x.index_select(1, index).mT.contiguous()


def _weights_at_infinity(exponent: Tensor, rest: Tensor, sign: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return exp(p − max p) and max p where some maxima are infinite: +∞ weighs 1, −∞ and terms of sign 0 nothing."""
    present = exponent if sign is None else exponent.masked_fill(sign == 0, -math.inf)
    peak = present.amax(-1, keepdim=True)
    weight = (present - peak).masked_fill_(present == peak, 0.0).add_(rest).exp_()
    return weight.masked_fill_(peak == -math.inf, 0.0), peak
