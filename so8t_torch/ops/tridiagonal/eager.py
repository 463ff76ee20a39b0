"""Ratios of minors and linear scans along chains in PyTorch: plain, and in blocks that run side by side.

    x_i = d_i − β/x_before    [u, v] ← [d u − β v, u],  x = u/v    (a product of 2×2 matrices carries x through a block)
    x_i = s_i + m_i x_before                                       (the adjoint)

A chain of N sites is cut into blocks of about √(N/2). First every block reduces its 2×2 matrices to one, divided by its
largest entry now and then, which leaves u/v alone and keeps it in range; then the products of all blocks
before each one are formed by doubling; then every block runs the recurrence from the x that enters it. All steps are
elementwise over the blocks, so a site depends on the sites before it in the sweep and on nothing else, bit for bit.
Everything is carried in double precision and rounded once; no product of eight sites of single precision leaves its
range, and energies of double precision may have any scale from 10⁻⁷⁵ to 10⁷⁵.
Where β = 0 (m = 0) a sweep starts afresh, whatever stands beyond: what precedes the last such place of a block never
enters that block's product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 256
"""Sites per block: below, starting a block costs more than its sites; above, blocks are plenty anyway."""
WIDE = torch.complex128
"""In which sweeps are carried: on a CPU it costs a fraction more than single precision."""
FACTORS = {torch.complex64: 8, torch.complex128: 1}
"""Factors of a product between two divisions: eight numbers of float32, any at all, have a product in float64."""


def inverse(ratio: Tensor, beta: Tensor) -> Tensor:
    """Return 1/x where β/x is meant, and 0 where β = 0 stands over no number that has an inverse."""
    found = ratio.reciprocal()
    return torch.where((beta != 0) | torch.isfinite(found), found, 0.0)


def ratios(d: Tensor, beta: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Return the ratios (S, B, N) of d, β (B, N) in the dtype of β, site by site; differentiable to any order.

    Args:
        d: h − z, of the dtype of β or in double precision.
        beta: β_i couples i and i + 1; the last entry is not read.
        reverse: for each sweep whether it runs from the last site to the first.
    """
    sites, couplings = d.to(WIDE).unbind(-1), beta.to(WIDE).unbind(-1)[:-1]
    sweeps = [
        _sweep(sites[::-1], couplings[::-1])[::-1] if backwards else _sweep(sites, couplings) for backwards in reverse
    ]
    return torch.stack([torch.stack(found, -1) for found in sweeps]).to(beta.dtype)


def onward(beta: Tensor, ratio: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Return ∂x_next/∂x (S, B, N) of every site's ratio x, by which the adjoint of the next comes back: β/x²."""
    coupling = torch.stack([torch.roll(beta, 1, -1) if backwards else beta for backwards in reverse])
    x = inverse(ratio, coupling)
    return coupling * x * x


def coupling_gradient(adjoint: Tensor, ratio: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Return the gradient (B, N) of β, its last entry 0: −x̄_{i+1}/x_i of a sweep forward, −x̄_i/x_{i+1} of one back."""
    parts = [
        x[..., :-1] * y[..., 1:] if backwards else x[..., 1:] * y[..., :-1]
        for x, y, backwards in zip(adjoint, ratio.conj().reciprocal(), reverse, strict=True)
    ]
    return pad(-sum(parts[1:], start=parts[0]), (0, 1))


def shifted(x: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Return at every site (S, B, N) what a sweep met just before it, 0 at its first."""
    sides = (
        pad(side[..., 1:], (0, 1)) if backwards else pad(side[..., :-1], (1, 0))
        for side, backwards in zip(x, reverse, strict=True)
    )
    return torch.stack(list(sides))


def ratios_blocked(d: Tensor, beta: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Return what ``ratios`` returns, in blocks; contiguous."""
    length = d.shape[-1]
    size = block_size(length)
    d = _blocks(torch.stack([_sweeping(d, backwards) for backwards in reverse]), size, fill=1.0)
    before = [beta.flip(-1) if backwards else torch.roll(beta, 1, -1) for backwards in reverse]
    beta = _blocks(torch.stack(before), size, fill=0.0)
    beta[0, :, :, 0] = 0.0
    cut = beta == 0
    x = _entering(*_block_products(d, beta, cut))
    found = torch.empty_like(beta)
    for k in range(size):
        self_energy = x.reciprocal().mul_(beta[k]).masked_fill_(cut[k], 0.0)
        x = torch.sub(d[k], self_energy)
        found[k] = x
    return _chains(found, length, reverse)


def linear_scan_blocked(m: Tensor, s: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Return x_i = s_i + m_i x_before (S, B, N) in blocks, contiguous; 0 starts afresh, and so does a sweep's first m.

    Args:
        m: multipliers.
        s: sources.
        reverse: for each sweep whether it runs from the last site to the first.
    """
    length = s.shape[-1]
    size = block_size(length)
    m, s = (
        _blocks(torch.stack([_sweeping(x, backwards) for x, backwards in zip(both, reverse, strict=True)]), size, 0.0)
        for both in (m, s)
    )
    m[0, :, :, 0] = 0.0
    cut = m == 0
    x = _arriving(*_block_sums(m, s, cut))
    found = torch.empty_like(s)
    for k in range(size):
        x = x.mul_(m[k]).masked_fill_(cut[k], 0.0).add_(s[k])
        found[k] = x
    return _chains(found, length, reverse)


def block_size(length: int) -> int:
    """Return the number of sites per block: the power of two next to √(N/2), for which a sweep has fewest steps."""
    wanted = 2 ** round(math.log2(max(length, 2) / 2) / 2)
    return min(max(wanted, SMALLEST_BLOCK), LARGEST_BLOCK)


def _sweep(sites: Sequence[Tensor], couplings: Sequence[Tensor]) -> list[Tensor]:
    found = [sites[0]]
    for d, beta in zip(sites[1:], couplings, strict=True):
        found.append(d - beta * inverse(found[-1], beta))
    return found


def _sweeping(x: Tensor, backwards: bool) -> Tensor:
    """Return sites in the order in which the sweep meets them."""
    return x.flip(-1) if backwards else x


def _blocks(x: Tensor, size: int, fill: float) -> Tensor:
    """Return (S, B, N) as (size, S, B, blocks), filled up after the last site."""
    x = pad(x, (0, -x.shape[-1] % size), value=fill)
    return x.unflatten(-1, (-1, size)).permute(3, 0, 1, 2).contiguous()


def _chains(x: Tensor, length: int, reverse: Sequence[bool]) -> Tensor:
    """Return (size, S, B, blocks) as (S, B, N) in the order of the chain."""
    x = x.permute(1, 2, 3, 0).flatten(-2)[..., :length]
    return torch.stack([_sweeping(side, backwards) for side, backwards in zip(x, reverse, strict=True)])


def _before_last_cut(cut: Tensor) -> tuple[Tensor, Tensor]:
    """Return which sites (size, …) precede the last cut of their block, and which blocks (…) have a cut."""
    place = torch.arange(1, cut.shape[0] + 1, device=cut.device).view(-1, 1, 1, 1)
    last = (place * cut).amax(0)
    return place < last, last > 0


def _block_products(d: Tensor, beta: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product (2, 2, S, B, blocks) of each block, its largest entry 1, and which blocks forget what enters.

    The first index is the row: u above v.
    """
    hidden, forgets = _before_last_cut(cut)
    d, minus_beta = torch.where(hidden, 1.0, d), torch.where(hidden, 0.0, -beta)
    u, v = torch.eye(2, dtype=WIDE, device=d.device).view(2, 2, 1, 1, 1).repeat(1, 1, *d.shape[1:])
    spare = torch.empty_like(u)
    factors = FACTORS[beta.dtype]
    for k, (d_k, minus_beta_k) in enumerate(zip(d, minus_beta, strict=True), start=1):
        torch.mul(d_k.to(WIDE), u, out=spare).addcmul_(minus_beta_k.to(WIDE), v)
        u, v, spare = spare, u, v
        if k % factors == 0:
            u, v = _normalised(torch.stack([u, v]))
    return torch.stack([u, v]), forgets


def _normalised(product: Tensor) -> Tensor:
    """Return (2, 2, …) divided by its largest real or imaginary part."""
    largest = torch.view_as_real(product).abs().amax((0, 1)).amax(-1)
    return product * largest.reciprocal()


def _entering(product: Tensor, forgets: Tensor) -> Tensor:
    """Return the ratio (S, B, blocks) with which each block starts; 1 for the first, which reads none."""
    blocks = product.shape[-1]
    reach = 1
    while reach < blocks:
        later, earlier = product[..., reach:], product[..., :-reach]
        joined = _normalised(later[:, :1] * earlier[:1] + later[:, 1:] * earlier[1:])
        joined = torch.where(forgets[..., reach:], later, joined)
        product = torch.cat([product[..., :reach], joined], -1)
        forgets = torch.cat([forgets[..., :reach], forgets[..., reach:] | forgets[..., :-reach]], -1)
        reach *= 2
    leaving = product[0, 0] / product[1, 0]
    return pad(leaving[..., :-1], (1, 0), value=1.0)


def _block_sums(m: Tensor, s: Tensor, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and x (S, B, blocks), such that a block sends X to A X + x, and which blocks forget X."""
    hidden, forgets = _before_last_cut(cut)
    m, s = torch.where(hidden, 0.0, m), torch.where(hidden, 0.0, s)
    factor, x = m[0].to(WIDE), s[0].to(WIDE)
    for m_k, s_k in zip(m[1:], s[1:], strict=True):
        m_k = m_k.to(WIDE)
        factor, x = m_k * factor, torch.addcmul(s_k.to(WIDE), m_k, x)
    return factor, x, forgets


def _arriving(factor: Tensor, x: Tensor, forgets: Tensor) -> Tensor:
    """Return the value (S, B, blocks) with which each block starts; 0 for the first."""
    reach = 1
    while reach < x.shape[-1]:
        kept = forgets[..., reach:]
        joined = torch.where(kept, 0.0, factor[..., reach:] * x[..., :-reach]) + x[..., reach:]
        shrunk = torch.where(kept, 0.0, factor[..., reach:] * factor[..., :-reach])
        x = torch.cat([x[..., :reach], joined], -1)
        factor = torch.cat([factor[..., :reach], shrunk], -1)
        forgets = torch.cat([forgets[..., :reach], kept | forgets[..., :-reach]], -1)
        reach *= 2
    return pad(x[..., :-1], (1, 0), value=0.0)
