"""The linear factors of a sign–log matrix product, their product, and what an entry of it must exceed to be trusted.

    E_ik = s_ik exp(A_ik − a_i + β),  F_kj = s_kj exp(B_kj − b_j + β),   a_i ≥ max_k A_ik,  b_j ≥ max_k B_kj
    S = E F,   trusted where |S| > K exp(β − R)/u  +  [signed] u (n + ln K + 16 + 2β) ‖E_i‖₂ ‖F_j‖₂

Symbols: A (M, K), B (K, N) logs with signs s; u unit roundoff; R the exponent range of the dtype; β a boost;
n = min(K, 128) + ⌈K/128⌉ the longest chain of additions. Shifts a, b are whole numbers.
Cost: MK + KN exponentials and one GEMM, two where Σ|terms| itself is asked for; temporaries O(128 (M + N)) and S.
Derivation: docs/math/lns.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

EXPONENT_RANGE = {torch.float32: 87.3, torch.float64: 708.0}
PANEL = 128
"""Terms of a signed sum that are added in one chain; the fewer, the tighter the bound of its rounding error."""


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
        sign_b = None if self.sign_b is None else self.sign_b.index_select(1, columns)
        return Operands(sign_a, self.log_a[rows].to(dtype), sign_b, self.log_b.index_select(1, columns).to(dtype))

    def terms(self, part: slice) -> Operands:
        """Return the operands of a range of the summation index k."""
        sign_a = None if self.sign_a is None else self.sign_a[..., part]
        sign_b = None if self.sign_b is None else self.sign_b[..., part, :]
        return Operands(sign_a, self.log_a[..., part], sign_b, self.log_b[..., part, :])


class Rescaled(NamedTuple):
    """The product of linear factors and what it takes to accept it; the true product is exp(shift) times larger."""

    total: Tensor
    shift_a: Tensor
    shift_b: Tensor
    bound: Tensor
    floor: float
    boost: float

    @property
    def shift(self) -> Tensor:
        """The sums a_i + b_j − 2β, exact in float64 also where the shifts' own dtype would round them."""
        return self.shift_a.double() + self.shift_b.double() - 2 * self.boost


def operands(sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor) -> Operands:
    """Return the operands with log −∞ wherever the sign is zero."""
    return Operands(sign_a, _counted(sign_a, log_a), sign_b, _counted(sign_b, log_b))


def _counted(sign: Tensor | None, log: Tensor) -> Tensor:
    if sign is None or bool(sign.abs().amin() > 0):
        return log
    return log.masked_fill(sign == 0, -math.inf)


def boost_of(dtype: torch.dtype, terms: int) -> float:
    """Return the largest whole β for which K exp(2β) is finite."""
    return float(math.floor((EXPONENT_RANGE[dtype] - math.log(max(terms, 1))) / 2))


def shifts(log: Tensor, dim: int) -> Tensor:
    """Return the maxima along ``dim`` rounded up to whole numbers, a finite number below all others where all is −∞."""
    return log.amax(dim, keepdim=True).ceil_().clamp_(min=lowest(log.dtype))


def lowest(dtype: torch.dtype) -> float:
    """Return a finite number so far below all logs that sums of a few of it are finite too."""
    return -torch.finfo(dtype).max / 8


def rescale(x: Operands, boost: float = 0.0, sharp: bool = True) -> Rescaled:
    """Return the real product of the factors and what an entry of it must exceed to be accepted.

    With signs Σ|terms| is a second product if ``sharp``, else the Cauchy–Schwarz bound of it.
    """
    shift_a, shift_b = shifts(x.log_a, -1), shifts(x.log_b, -2)
    dtype, terms = x.log_a.dtype, x.log_a.shape[-1]
    roundoff = torch.finfo(dtype).eps / 2
    floor = terms * math.exp(boost - EXPONENT_RANGE[dtype]) / roundoff
    total = x.log_a.new_empty(*x.log_a.shape[:-1], x.log_b.shape[-1])
    if not x.signed:
        for part, left, right in panels(x, shift_a, shift_b, boost):
            _add_product(total, left, right, first=part.start == 0)
        return Rescaled(total, shift_a, shift_b, total.new_tensor(floor), floor, boost)
    slack = roundoff * (min(terms, PANEL) + math.ceil(terms / PANEL) + math.log(terms) + 16 + 2 * boost)
    square_a, square_b, bound = torch.zeros_like(shift_a), torch.zeros_like(shift_b), torch.empty_like(total)
    size = torch.zeros_like(total) if sharp else None
    for part, left, right in panels(x, shift_a, shift_b, boost):
        if part.start == 0:
            torch.matmul(left, right, out=total)
        else:
            total.add_(torch.matmul(left, right, out=bound))
        if size is None:
            square_a += left.square().sum(-1, keepdim=True)
            square_b += right.square().sum(-2, keepdim=True)
        else:
            size.add_(torch.matmul(left.abs_(), right.abs_(), out=bound))
    if size is not None:
        bound = size.mul_(slack + roundoff * EXPONENT_RANGE[dtype]).add_(floor)
    else:
        torch.mul(square_a.sqrt_().mul_(slack), square_b.sqrt_(), out=bound).add_(floor)
    return Rescaled(total, shift_a, shift_b, bound, floor, boost)


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add a product of factors without signs to the total, which nothing is in at first."""
    add = total.addmm_ if total.ndim == 2 else total.baddbmm_
    add(left, right, beta=0 if first else 1)


def panels(x: Operands, shift_a: Tensor, shift_b: Tensor, boost: float = 0.0) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield E = s exp(A − a + β) and F = s exp(B − b + β), PANEL values of k at a time, each over the one before.

    β is added last: a − β would be rounded where a is large, and E be out of range.
    """
    terms = x.log_a.shape[-1]
    width = min(terms, PANEL)
    rows = x.log_a.new_empty(*x.log_a.shape[:-1], width)
    columns = x.log_b.new_empty(*x.log_b.shape[:-2], width, x.log_b.shape[-1])
    for start in range(0, terms, PANEL):
        part = slice(start, min(start + PANEL, terms))
        own = x.terms(part)
        left = torch.sub(own.log_a, shift_a, out=rows[..., : part.stop - start])
        right = torch.sub(own.log_b, shift_b, out=columns[..., : part.stop - start, :])
        for factor in (left, right):
            (factor.add_(boost) if boost else factor).exp_()
        if own.sign_a is not None and own.sign_b is not None:
            left.mul_(own.sign_a)
            right.mul_(own.sign_b)
        yield part, left, right
