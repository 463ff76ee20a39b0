"""Second difference along tokens in PyTorch: a plain differentiable form, and a streamed one for the CPU.

    E_b = Σ_t v_t Σ_d ρ(u_{t,d}),  u_t = h_{t+1} − 2h_t + h_{t−1}      ∂E_b/∂h = 2 Δ²(v c),  c = clip(u, −δ, δ)

The plain form writes what the formula says and is differentiable to any order, in both modes. The streamed form goes
through h in tiles that stay in a core's cache: one pass over h forward, one over h and its gradient backward, and no
temporary of the size of h. Rows are summed one by one, so neither tiling nor batching changes a bit of the result.
Sums over tokens are carried in float64: they cost nothing, and the error of E is that of its terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from so8t_torch.core.precision import accumulation_dtype

TILE_ELEMENTS = 1 << 17
"""Elements of h per tile: half a megabyte in float32, which a core's second-level cache holds."""


def centres(mask: Tensor) -> Tensor:
    """Return where a token and both its neighbours belong to one sequence (..., T)."""
    centre = mask[..., 1:-1]
    inner = (centre != 0) & (mask[..., :-2] == centre) & (centre == mask[..., 2:])
    edge = mask.shape[-1] - inner.shape[-1]
    return pad(inner, (edge // 2, edge - edge // 2))


def mean_square(h: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of h² over unmasked tokens and channels per batch (...) in float64, without a copy of h."""
    rows = torch.linalg.vector_norm(h, dim=-1, dtype=accumulation_dtype(h.dtype)).square()
    inside = mask != 0
    tokens = inside.sum((-2, -1)).clamp(min=1)
    return torch.where(inside, rows, 0.0).sum((-2, -1), dtype=torch.float64) / (tokens * h.shape[-1])


def schedule_weight(progress: Tensor, boundaries: tuple[float, ...], weights: tuple[float, ...]) -> Tensor:
    """Return the weight of the phase that each progress lies in; NaN stays NaN."""
    edges = torch.tensor(boundaries, dtype=progress.dtype, device=progress.device)
    levels = torch.tensor(weights, dtype=progress.dtype, device=progress.device)
    phase = (progress[..., None] >= edges).sum(-1)
    return torch.where(progress.isnan(), progress, levels[phase])


def energy(h: Tensor, valid: Tensor, delta: float) -> Tensor:
    """Return E (B,) in float64 of h (B, T, D) by differentiable operations."""
    bend = _bend(h, valid)
    inner = _clip(bend, delta)
    return (inner * (2 * bend - inner)).sum(-1).sum(-1, dtype=torch.float64)


def gradient(grad: Tensor, h: Tensor, valid: Tensor, delta: float) -> Tensor:
    """Return grad_b · ∂E_b/∂h (B, T, D) by differentiable operations."""
    return _spread(_clip(_bend(h, valid), delta), grad, h)


def second_gradient(grad: Tensor, h: Tensor, valid: Tensor, delta: float, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of ⟨direction, gradient(grad, h)⟩ with respect to grad and h."""
    bend, turned = _bend(h, valid), _bend(direction, valid)
    along = 2 * (_clip(bend, delta) * turned).sum(-1).sum(-1, dtype=torch.float64)
    inside = turned if delta == 0 else torch.where(bend.abs() <= delta, turned, 0.0)
    return along, _spread(inside, grad, h)


def energy_streamed(h: Tensor, valid: Tensor, delta: float) -> Tensor:
    """Return E (B,) in float64 of h (B, T, D) in tiles that fit in cache."""
    batch, length, width = h.shape
    dtype = accumulation_dtype(h.dtype)
    rows = h.new_zeros((batch, max(length - 2, 0)), dtype=dtype)
    tile, tiles = _tiles(batch, rows.shape[1], width)
    buffer = h.new_empty((*tile, width), dtype=dtype)
    for b, t in tiles:
        bend = buffer[: b.stop - b.start, : t.stop - t.start]
        _stencil(h[b, t.start : t.stop + 2].to(dtype), bend)
        torch.sum(_huber_(bend, delta), -1, out=rows[b, t])
    return torch.where(valid[:, 1:-1], rows, 0.0).sum(-1, dtype=torch.float64)


def gradient_streamed(grad: Tensor, h: Tensor, valid: Tensor, delta: float) -> Tensor:
    """Return grad_b · ∂E_b/∂h (B, T, D) in tiles that fit in cache."""
    batch, length, width = h.shape
    dtype = accumulation_dtype(h.dtype)
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    scale = (2 * grad).to(dtype)[:, None, None]
    (together, tokens), tiles = _tiles(batch, length, width)
    buffer = h.new_empty((together, tokens + 2, width), dtype=dtype)
    for b, t in tiles:
        c = buffer[: b.stop - b.start, : t.stop - t.start + 2]
        _fill_centres(c, h[b], valid[b], t, delta)
        c.mul_(scale[b])
        tile = out[b, t]
        if tile.dtype == dtype:
            _stencil(c, tile)
        else:
            tile.copy_(_stencil(c, torch.empty_like(tile, dtype=dtype)))
    return out


def _fill_centres(c: Tensor, h: Tensor, valid: Tensor, t: slice, delta: float) -> None:
    """Write v c of the tokens t and of one more on each side; rows without a centre become zero."""
    first, last = max(t.start - 1, 1), min(t.stop + 1, h.shape[1] - 1)
    before, after = first - t.start + 1, last - t.start + 1
    c[:, :before] = 0.0
    c[:, after:] = 0.0
    if first < last:
        inner = c[:, before:after]
        _clip(_stencil(h[:, first - 1 : last + 1].to(c.dtype), inner), delta, out=inner)
        # Assignment, not a product: a masked token may be infinite.
        inner[~valid[:, first:last]] = 0.0


def _tiles(batch: int, length: int, width: int) -> tuple[tuple[int, int], Iterator[tuple[slice, slice]]]:
    """Return the tile (sequences, tokens) and its slices: whole sequences while they fit, else parts of one."""
    tokens = max(1, min(length, TILE_ELEMENTS // width))
    together = max(1, TILE_ELEMENTS // (width * tokens)) if tokens >= length else 1
    slices = itertools.product(_slices(batch, together), _slices(length, tokens))
    return (min(together, batch), tokens), slices


def _slices(size: int, step: int) -> Iterator[slice]:
    """Yield the slices that cut 0 … size into steps."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _stencil(x: Tensor, out: Tensor) -> Tensor:
    """Write x_{t+1} − 2 x_t + x_{t−1} into out, two tokens shorter than x."""
    return torch.add(x[:, 2:], x[:, 1:-1], alpha=-2, out=out).add_(x[:, :-2])


def _huber_(bend: Tensor, delta: float) -> Tensor:
    """Replace u by ρ(u) = c (2u − c) in place."""
    if delta == 0:
        return bend.mul_(bend)
    inner = bend.clamp(-delta, delta)
    return bend.mul_(2).sub_(inner).mul_(inner)


def _clip(bend: Tensor, delta: float, out: Tensor | None = None) -> Tensor:
    """Return clip(u, −δ, δ), or u itself where δ = 0."""
    return bend if delta == 0 else torch.clamp(bend, -delta, delta, out=out)


def _bend(h: Tensor, valid: Tensor) -> Tensor:
    """Return v Δ²h (B, T − 2, D); what is masked is zero, finite or not."""
    h = h.to(accumulation_dtype(h.dtype))
    return torch.where(valid[:, 1:-1, None], h[:, 2:] - 2 * h[:, 1:-1] + h[:, :-2], 0.0)


def _spread(c: Tensor, grad: Tensor, h: Tensor) -> Tensor:
    """Return 2 grad Δ²c (B, T, D) in the dtype of h, with c = 0 outside its T − 2 tokens."""
    if h.shape[1] < 3:
        return torch.zeros_like(h)
    c = pad(c * (2 * grad).to(c.dtype)[:, None, None], (0, 0, 2, 2))
    return (c[:, 2:] - 2 * c[:, 1:-1] + c[:, :-2]).to(h.dtype)
