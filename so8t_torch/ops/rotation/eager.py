"""Rotations acting on channels, in plain PyTorch: rotate and its gradient, compose, measure, fold.

    y_k = R_k x_k,   ∂x_k = R_kᵀ ∂y_k,   ∂R_k = Σ_t ∂y_tk x_tkᵀ       on block k of eight channels

Sums are carried in float32, in float64 for float64 input; nothing the size of x outlives a call except the answer.
Folding is carried in float64 and rounded once; no dense D×D matrix is ever formed.

On a CPU 8×8 products are too small to be fast, so that rows go through block-diagonal matrices 16 or 32 wide, a few
hundred rows at a time. The zeros of those matrices would spread a non-finite value to its neighbours (0·∞ = NaN), so
that a chunk whose sum is not finite is computed again block by block. Derivation: docs/math/rotation.md
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops.rotation import charts

FEW_ROWS = 12
"""Below this many rows building block-diagonal matrices costs more than it saves."""
WIDTH, ROWS = 16, 128
"""Blocks are paired into 16×16 matrices and rows taken 128 at a time: the working set stays in the L2 cache."""
BFLOAT16_WIDTH, BFLOAT16_ROWS = 32, 256
ROW_PADDING = 16
"""Extra elements per buffered row: rows a multiple of 4096 bytes apart would all fall into the same cache sets."""
NEGLIGIBLE = 2.0**-10
"""Row norm of what bfloat16 loses of a rotation that may be left out: a quarter of the rounding of the answer."""


def rotate(rotation: Tensor, x: Tensor) -> Tensor:
    """Return R x per block, by the fastest way this device and dtype have."""
    return _rotate(rotation, x, finite=False)


def _rotate(rotation: Tensor, x: Tensor, finite: bool) -> Tensor:
    """Rotate; ``finite`` says that x is known to hold no infinity and no NaN, so that nothing need be checked."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x
    if x.device.type != "cpu" or x.numel() < FEW_ROWS * x.shape[-1]:
        return rotate_plain(rotation, x)
    if x.dtype == torch.bfloat16 and x.shape[-1] % BFLOAT16_WIDTH == 0 and _bfloat16_products():
        return _rotate_rows_bfloat16(rotation, rows.contiguous(), finite).view(x.shape)
    return _rotate_rows(rotation, rows, finite).view(x.shape)


def rotate_backward(
    dy: Tensor, rotation: Tensor, x: Tensor, need_rotation: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Return (dR, dx), empty where not needed; dR in the dtype of the rotation."""
    dR, dx = rotation.new_empty(0), dy.new_empty(0)
    finite = False
    if need_rotation:
        dR = _outer(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        dR = dR.sum(0, keepdim=True) if len(rotation) == 1 else dR
        # every entry of dy enters dR, so that a finite dR vouches for dy without another pass over it
        finite = dR.device.type == "cpu" and bool(dR.isfinite().all())
    if need_x:
        dx = _rotate(rotation.mT, dy, finite)
    return dR.to(rotation.dtype), dx


def rotate_plain(rotation: Tensor, x: Tensor) -> Tensor:
    """Return R x per block by one product per block; every derivative of it exists, forward and backward."""
    wide = accumulation_dtype(x.dtype)
    R = rotation.to(wide).expand(x.shape[-1] // 8, 8, 8)
    return torch.einsum("nij,...nj->...ni", R, x.to(wide).unflatten(-1, (-1, 8))).flatten(-2).to(x.dtype)


def _rotate_rows(rotation: Tensor, x: Tensor, finite: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    matrices = _block_diagonal(rotation.mT.to(accumulation_dtype(x.dtype)), x.shape[1] // 8, WIDTH)
    whole = x.shape[1] // WIDTH
    for rows, (buffer,) in _chunks(x):
        product = torch.bmm(buffer, matrices)
        if finite or math.isfinite(float(product.sum())):
            y[rows, : whole * WIDTH].unflatten(1, (whole, WIDTH)).copy_(product[:whole].transpose(0, 1))
            if len(product) > whole:
                y[rows, -8:] = product[whole, :, :8]
        else:
            y[rows] = rotate_plain(rotation, x[rows])
    return y


def _rotate_rows_bfloat16(rotation: Tensor, x: Tensor, finite: bool) -> Tensor:
    """Return x R_hi + (x, or x R_lo) with R − I, or R, split into bfloat16 parts, rounded to bfloat16 once.

    A rotation rounded to bfloat16 is off by 4e-3; what the rounding loses is carried by the first term, in which the
    product accumulates. Near the identity that term is x itself, so that one product is enough and R = I is exact.
    """
    groups = x.shape[1] // BFLOAT16_WIDTH
    R = rotation.mT.float()
    near = R - torch.eye(8)
    lost = near - near.bfloat16().float()
    squares, ones = lost.square(), torch.ones(8)
    one_product = bool(max((squares @ ones).max(), (ones @ squares).max()) <= NEGLIGIBLE**2)
    high = (near if one_product else R).bfloat16()
    high_matrices = _block_diagonal(high, x.shape[1] // 8, BFLOAT16_WIDTH)
    if not one_product:
        low_matrices = _block_diagonal((R - high.float()).bfloat16(), x.shape[1] // 8, BFLOAT16_WIDTH)
    y = torch.empty_like(x)
    for start in range(0, len(x), BFLOAT16_ROWS):
        rows = slice(start, start + BFLOAT16_ROWS)
        tokens, answer = (m[rows].unflatten(1, (groups, BFLOAT16_WIDTH)).transpose(0, 1) for m in (x, y))
        if one_product:
            y[rows].copy_(x[rows])
        else:
            y[rows].zero_()
            answer.baddbmm_(tokens, low_matrices)
        answer.baddbmm_(tokens, high_matrices)
        if not finite and not math.isfinite(float(y[rows].sum())):
            y[rows] = rotate_plain(rotation, x[rows])
    return y


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    """Return Σ_t dy_t x_tᵀ per block, (n, 8, 8) in the accumulation dtype."""
    blocks = x.shape[1] // 8
    wide = accumulation_dtype(x.dtype)
    if x.device.type != "cpu" or len(x) < FEW_ROWS:
        return torch.einsum("tni,tnj->nij", dy.to(wide).unflatten(1, (-1, 8)), x.to(wide).unflatten(1, (-1, 8)))
    total = torch.zeros((blocks + 1) // 2, WIDTH, WIDTH, dtype=wide)
    for _, (dy_rows, x_rows) in _chunks(dy, x):
        total.baddbmm_(dy_rows.mT, x_rows)
    diagonal = total.view(-1, 2, 8, 2, 8).diagonal(dim1=1, dim2=3)
    return diagonal.permute(0, 3, 1, 2).reshape(-1, 8, 8)[:blocks]


def _chunks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield row ranges and, per tensor, those rows as (groups, rows, 16) in the accumulation dtype, zeros beyond D."""
    rows, channels = tensors[0].shape
    groups = -(-channels // WIDTH)
    wide = accumulation_dtype(tensors[0].dtype)
    buffers = [torch.zeros(min(ROWS, rows), groups * WIDTH + ROW_PADDING, dtype=wide) for _ in tensors]
    for start in range(0, rows, ROWS):
        chunk = slice(start, min(start + ROWS, rows))
        count = chunk.stop - start
        for tensor, buffer in zip(tensors, buffers, strict=True):
            buffer[:count, :channels].copy_(tensor[chunk])
        views = [b[:count, : groups * WIDTH].unflatten(1, (groups, WIDTH)).transpose(0, 1) for b in buffers]
        yield chunk, views


def _block_diagonal(matrices: Tensor, blocks: int, width: int) -> Tensor:
    """Return the blocks (n or 1, 8, 8) on the diagonals of (⌈8n/width⌉, width, width) matrices."""
    per_group = width // 8
    groups = -(-blocks // per_group)
    padded = matrices.new_zeros(groups * per_group, 8, 8)
    padded[:blocks] = matrices
    wide = matrices.new_zeros(groups, per_group, 8, per_group, 8)
    wide.diagonal(dim1=1, dim2=3).copy_(padded.view(groups, per_group, 8, 8).permute(0, 2, 3, 1))
    return wide.view(groups, width, width)


@functools.cache
def _bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compose(safe: Tensor, cmd: Tensor) -> Tensor:
    """Return R_cmd R_safe."""
    dtype = torch.promote_types(safe.dtype, cmd.dtype)
    wide = accumulation_dtype(dtype)
    return (cmd.to(wide) @ safe.to(wide)).to(dtype)


def bracket(a: Tensor, b: Tensor) -> Tensor:
    """Return the coordinates of AB − BA."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = accumulation_dtype(dtype)
    AB = charts.skew(a.to(wide)) @ charts.skew(b.to(wide))
    return charts.unskew(AB - AB.mT).to(dtype)


def commutator_distance(safe: Tensor, cmd: Tensor) -> Tensor:
    """Return the Frobenius norm of R_c R_s R_cᵀ R_sᵀ − I."""
    dtype = torch.promote_types(safe.dtype, cmd.dtype)
    s, c = safe.double(), cmd.double()
    commutator = c @ s @ c.mT @ s.mT
    identity = torch.eye(8, dtype=commutator.dtype, device=commutator.device)
    return torch.linalg.matrix_norm(commutator - identity).to(dtype)


def orthogonality_error(rotation: Tensor) -> Tensor:
    """Return the largest entry of |RᵀR − I| of each matrix."""
    R = rotation.double()
    return (R.mT @ R - torch.eye(8, dtype=R.dtype, device=R.device)).abs().amax((-2, -1))


def determinant_error(rotation: Tensor) -> Tensor:
    """Return |det R − 1| of each matrix."""
    return (torch.linalg.det(rotation.double()) - 1).abs()


def isometry_error(rotation: Tensor, x: Tensor) -> Tensor:
    """Return the largest relative change of a block's length; a block of zeros keeps its length."""
    x = x.double()
    before, after = (
        torch.linalg.vector_norm(v.unflatten(-1, (-1, 8)), dim=-1) for v in (x, rotate_plain(rotation.double(), x))
    )
    return torch.where(before == 0, 0.0, (after / before - 1).abs()).amax(-1)


def fold_output(weight: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (R W, R b): rows 8k … 8k+7 of W are multiplied by R_k."""
    R = rotation.double()
    W = (R @ weight.double().unflatten(-2, (-1, 8))).flatten(-3, -2).to(weight.dtype)
    if bias is None:
        return W, None
    return W, (R @ bias.double().unflatten(-1, (-1, 8, 1))).flatten(-3).to(bias.dtype)


def fold_input(weight: Tensor, rotation: Tensor) -> Tensor:
    """Return W R: columns 8k … 8k+7 of W are multiplied by R_k from the right."""
    W = weight.double().unflatten(-1, (-1, 8)).transpose(-3, -2)
    return (W @ rotation.double()).transpose(-3, -2).flatten(-2).to(weight.dtype)
