"""Sign–log numbers in plain differentiable PyTorch: elementwise arithmetic, and products by rescaling in float64.

    x = s exp(ℓ)      a + b: ℓ = max + ln(1 ± exp(−d)), d = |ℓ_a − ℓ_b|      Σ: ℓ = m + ln|Σ s exp(ℓ − m)|, m = max ℓ
    C = ln|S| + a + b,  S = E F,  E = s exp(A − a),  F = s exp(B − b)      (float64, whatever the dtype)

Every function here is differentiable to any order and in both modes. What is exactly zero has ℓ = −∞, and no gradient
passes through it: values that would be NaN are replaced before the operation that would make them, not after it.
The float64 product has a range of about 690 between the largest and the smallest number of a row; beyond it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from so8t_torch.core.errors import DomainError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops.lns import ladder, rescaling
from so8t_torch.ops.lns.arguments import Factors

Search = Callable[[Tensor, Tensor], Tensor]
"""``search`` below, or its registered form."""

NEAR = math.log(2.0)
"""Below this distance of two logs 1 − exp(−d) is taken by expm1, above by log1p, each without cancellation."""

RangeCheck = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``in_range`` below, or its registered form."""

SEARCH_ELEMENTS = 1 << 18
"""Sums A_ik + B_kj held at once while the largest is searched: one megabyte in float32."""


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return sign and log of x; NaN keeps a sign, so that it stays NaN."""
    present = x != 0
    magnitude = torch.where(present, x, 1.0).to(accumulation_dtype(x.dtype)).abs()
    return _sign(present, x < 0), torch.where(present, magnitude.log(), -math.inf).to(x.dtype)


def decode(sign: Tensor, log: Tensor) -> Tensor:
    """Return s exp(ℓ), 0 where the sign is 0 whatever the log."""
    wide = torch.where(sign == 0, -math.inf, log.to(accumulation_dtype(log.dtype)))
    return (sign * wide.exp()).to(log.dtype)


def mul(sign_a: Tensor, log_a: Tensor, sign_b: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product."""
    sign = sign_a * sign_b
    log = torch.where(sign == 0, -math.inf, log_a + log_b)
    return sign.masked_fill(log == -math.inf, 0), log


def add(sign_a: Tensor, log_a: Tensor, sign_b: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum; where two equal numbers cancel it is an exact zero without gradient."""
    dtype = torch.promote_types(log_a.dtype, log_b.dtype)
    wide = accumulation_dtype(dtype)
    a, b = masked(sign_a, log_a.to(wide)), masked(sign_b, log_b.to(wide))
    first, second = torch.where(a >= b, a, b), torch.where(a >= b, b, a)
    sign, other = torch.where(a >= b, sign_a, sign_b), torch.where(a >= b, sign_b, sign_a)
    opposed = sign * other < 0
    tied = first == second
    settled = (first.isinf() & ~second.isnan()) | (tied & opposed)
    gap = torch.where(settled, 1.0, first - second)
    grown = first + torch.exp(-gap).log1p()
    distant = ~opposed | (gap > NEAR)
    far, near = torch.where(gap > NEAR, gap, 1.0), torch.where(distant, NEAR, gap)
    shrunk = first + torch.where(gap > NEAR, torch.log1p(-torch.exp(-far)), torch.log(-torch.expm1(-near)))
    undefined = tied & opposed & (first == math.inf)
    limit = torch.where(undefined, math.nan, torch.where(tied & opposed, -math.inf, first.detach()))
    log = torch.where(settled, limit, torch.where(opposed, shrunk, grown)).to(dtype)
    return torch.where(log.isnan(), 1, torch.where(log == -math.inf, 0, sign)).to(torch.int8), log


def sum_last(sign: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ s exp(ℓ) over the last axis, summed in float64."""
    if log.shape[-1] == 0:
        return sign.new_zeros(log.shape[:-1], dtype=torch.int8), log.new_full(log.shape[:-1], -math.inf)
    wide = masked(sign, log.double())
    peak = wide.detach().amax(-1, keepdim=True)
    infinite = peak == math.inf
    shift = torch.where(peak.isinf(), 0.0, peak)
    weight = torch.where(infinite, (wide == math.inf).double(), (wide - shift).exp())
    total = (sign * weight).sum(-1)
    opposed = infinite.squeeze(-1) & (total.abs() != weight.sum(-1))
    shift = torch.where(infinite, peak, shift).squeeze(-1)
    found, out = _logarithm(torch.where(opposed, math.nan, total), shift)
    return found, out.to(log.dtype)


def matmul(sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return sign and log of the product of (…, M, K) and (…, K, N) in float64."""
    if not bool((log_a.amax() < math.inf) & (log_b.amax() < math.inf)):
        return _without_derivative(sign_a, log_a, sign_b, log_b)
    left, right, shift = _factors(sign_a, log_a, sign_b, log_b, in_range)
    return _logarithm(left @ right, shift)


def _without_derivative(
    sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the product of logs among which are +∞ or NaN, which has values but no derivative."""
    if ((log_a.requires_grad or log_b.requires_grad) and torch.is_grad_enabled()) or _has_tangent(log_a, log_b):
        raise DomainError(
            "lns: expected finite logs or −∞ where derivatives are taken, got +∞ or NaN; mask them first."
        )
    found = ladder.matmul(rescaling.operands(sign_a, log_a.double(), sign_b, log_b.double()))
    return found.sign, found.log


def _has_tangent(*tensors: Tensor) -> bool:
    return any(unpack_dual(x).tangent is not None for x in tensors)


def second_gradient(
    g: Tensor,
    factors: Factors,
    sign_c: Tensor | None,
    log_c: Tensor,
    directions: tuple[Tensor, Tensor],
    in_range: RangeCheck,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the derivatives of ⟨U, Ā⟩ + ⟨V, B̄⟩ with respect to g, A, B and C, in float64.

    Ā_ik = Σ_j g_ij w_ikj and B̄_kj = Σ_i g_ij w_ikj are what ``gradient.matmul`` returns, with w a function of A, B, C.
    """
    left, right, shift = _factors(*factors, in_range)
    turned_left, turned_right = left * directions[0], right * directions[1]
    zero = log_c == -math.inf
    inverse = torch.where(zero, 0.0, torch.where(zero, 0.0, shift - log_c).exp())
    inverse = inverse if sign_c is None else inverse * sign_c
    weight = g * inverse
    mixed = inverse * (turned_left @ right + left @ turned_right)
    da = turned_left * (weight @ right.mT) + left * (weight @ turned_right.mT)
    db = turned_right * (left.mT @ weight) + right * (turned_left.mT @ weight)
    return mixed, da, db, -g * mixed


def largest(
    sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor, search: Search
) -> tuple[Tensor, Tensor]:
    """Return sign and log of the first largest term (…, M, N); a gradient reaches only its two factors."""
    a, b = masked(sign_a, log_a), masked(sign_b, log_b)
    index = search(a.detach(), b.detach())
    log = a.gather(-1, index) + b.gather(-2, index)
    log = torch.where(log == -math.inf, -math.inf, log)
    if sign_a is None or sign_b is None:
        return log.new_empty(0, dtype=torch.int8), log
    sign = sign_a.gather(-1, index) * sign_b.gather(-2, index)
    return torch.where(log.isnan(), 1, sign.masked_fill(log == -math.inf, 0)).to(torch.int8), log


def along_largest(factors: Factors, directions: tuple[Tensor, Tensor], search: Search) -> Tensor:
    """Return the change of the largest terms along the directions (U, V) of A and B."""
    sign_a, log_a, sign_b, log_b = factors
    a, b = masked(sign_a, log_a.detach()), masked(sign_b, log_b.detach())
    index = search(a, b)
    zero = a.gather(-1, index) + b.gather(-2, index) == -math.inf
    return torch.where(zero, 0.0, directions[0].gather(-1, index) + directions[1].gather(-2, index))


def search(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return the first k (batch, M, N) at which A_ik + B_kj is largest, a few rows at a time."""
    batch, rows, terms = log_a.shape
    columns = log_b.mT.contiguous()
    out = torch.empty((batch, rows, log_b.shape[-1]), dtype=torch.int64, device=log_a.device)
    tile = max(1, SEARCH_ELEMENTS // max(1, terms * log_b.shape[-1]))
    for index in range(batch):
        for start in range(0, rows, tile):
            part = slice(start, start + tile)
            out[index, part] = (log_a[index, part, None, :] + columns[index]).max(-1).indices
    return out


def masked(sign: Tensor | None, log: Tensor) -> Tensor:
    """Return the logs with −∞ wherever the sign is 0."""
    return log if sign is None else torch.where(sign == 0, -math.inf, log)


def _factors(
    sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor, check: RangeCheck
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E, F and the shift a_i + b_j in float64; the shifts are constants of the differentiation."""
    wide_a, wide_b = masked(sign_a, log_a).double(), masked(sign_b, log_b).double()
    shift_a, shift_b = rescaling.shifts(wide_a.detach(), -1), rescaling.shifts(wide_b.detach(), -2)
    left, right = (wide_a - shift_a).exp(), (wide_b - shift_b).exp()
    left = left * check(wide_a.detach(), wide_b.detach(), left.detach() @ right.detach())
    if sign_a is not None and sign_b is not None:
        left, right = left * sign_a, right * sign_b
    return left, right, shift_a + shift_b


def in_range(log_a: Tensor, log_b: Tensor, total: Tensor) -> Tensor:
    """Return 1, or raise unless every sum of magnitudes is finite and in the range of float64, or has no term."""
    roundoff = torch.finfo(torch.float64).eps / 2
    lost = ~(total > log_a.shape[-1] * math.exp(-rescaling.EXPONENT_RANGE[torch.float64]) / roundoff)
    if not bool(lost.any()):
        return total.new_ones(())
    present_a, present_b = ((log != -math.inf).double() for log in (log_a, log_b))
    if bool((lost & (present_a @ present_b > 0)).any()):
        raise DomainError(
            "lns: expected logs that float64 factors can carry, none NaN or +∞ and at most about 600 between what "
            "matters and the largest of its row or column, got others; use backend='rescaled' (CPU) or 'triton', which "
            "are exact for every range but have first derivatives only there, in reverse mode."
        )
    return total.new_ones(())


def _logarithm(total: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return sign and log of total · exp(shift); zero has log −∞ and no gradient."""
    zero = total == 0
    log = torch.where(zero, 1.0, total).abs().log() + torch.where(zero, 0.0, shift)
    return _sign(~zero, total < 0), torch.where(zero, -math.inf, log)


def _sign(present: Tensor, negative: Tensor) -> Tensor:
    """Return +1, −1, or 0 where nothing is present."""
    return present.to(torch.int8) - 2 * negative.to(torch.int8)
