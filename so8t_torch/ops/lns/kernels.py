"""Triton kernels of the sign–log matrix product and their launchers.

    rescaled   S_ij = Σ_k s e^{a_ik − α_i} t e^{b_kj − β_j},  c = ln|S| + α_i + β_j,  accepted where no rounding matters
    blocked    the same with maxima of 32 indices k at a time, merged online, for tiles where much was not accepted
               (float32 only: the range of float64 leaves it nothing to do)
    streamed   m ← max(m, p), S ← S e^{m − m'} + s t e^{p − m'} term by term, p = a_ik + b_kj: any range
    entry      streamed in float64, one output at a time: what is left, where the sign is in doubt
    largest    max_k (a_ik + b_kj), the first of equals
    gradient   da_ik = s Σ_j [g_ij s_c e^{α_i + β_j − c_ij}] [t e^{b_kj − β_j}] · e^{a_ik − α_i}, α and β of a tile

Each kernel of the ladder leaves at once where nothing is pending, so that only rejected tiles pay, and the host never
waits. Sums run in float32 (IEEE, never TF32), in float64 for float64. Derivation of the bounds: docs/math/lns.md.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# Triton reads annotations and knows tl.constexpr only, so that kernels cannot carry ordinary types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.launch import Grid, Tile, launch
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops.lns.tile_kernels import corner, counted, factor, finite, sign_of, signed, two_sum, usual


def _tile(rows: int, columns: int, depth: int, stages: int, warps: int) -> Tile:
    return Tile(warps=warps, stages=stages, constants={"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth})


ORIGINAL_TILES = (
    _tile(128, 256, 64, 3, 8), _tile(64, 256, 32, 4, 4), _tile(128, 128, 32, 4, 4), _tile(128, 64, 32, 4, 4),
    _tile(64, 128, 32, 4, 4), _tile(128, 32, 32, 4, 4), _tile(64, 32, 32, 5, 2), _tile(32, 64, 32, 5, 2),
)  # fmt: skip
"""The configurations that the design began from; those that the compile gate lets pass are tuned with our own."""
PRUNED = {**dict.fromkeys(range(5), ("spills", "shared")), 7: ("spills",)}
"""Position in ORIGINAL_TILES → why it cannot run on every card: the verdict of the compile gate on sm_86."""
FORWARD_TILES = (
    _tile(64, 64, 32, 2, 4),
    _tile(128, 32, 32, 2, 4),
    _tile(32, 64, 32, 2, 2),
    _tile(128, 64, 32, 2, 8),
    _tile(64, 128, 32, 2, 8),
    *(tile for position, tile in enumerate(ORIGINAL_TILES) if position not in PRUNED),
)
LADDER_TILE = _tile(32, 32, 32, 1, 8)
SHORT = 16
"""Up to so many terms the rescaled product, whose least depth this is, saves no time: they are streamed."""
STREAMED_TILES = (Tile(warps=8, constants={"BLOCK_M": 32, "BLOCK_N": 32}),)
ENTRY_TILES = (Tile(warps=4, constants={"BLOCK_N": 128, "BLOCK_K": 256}),)
LARGEST_TILES = tuple(Tile(warps=w, constants={"BLOCK_M": m, "BLOCK_N": 64}) for m, w in ((32, 4), (64, 8)))
SHIFT_TILES = (Tile(warps=4, constants={"ROWS": 32, "BLOCK_K": 32}),)
GRADIENT_TILES = (_tile(64, 32, 64, 1, 8), _tile(32, 32, 64, 1, 8))
BEYOND_TILE = _tile(16, 32, 64, 1, 8)
"""One BLOCK_K with GRADIENT_TILES, so that shifts agree between both launches, and roundings between tiles."""
SCATTER_TILES = (Tile(warps=4, constants={"BLOCK_M": 32, "BLOCK_K": 64}),)


@triton.jit
def shift_kernel(
    sign_ptr, log_ptr, shift_ptr, norm_ptr, rows, K, stride_batch, stride_row, stride_k,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """α_i = max_k a_ik, +∞ where a row is not finite, and n_i² = Σ_k ((1 + y) e^{−y})², y = α_i − a_ik."""
    dtype: tl.constexpr = shift_ptr.dtype.element_ty
    strips = tl.cdiv(rows, ROWS)
    matrix = (tl.program_id(0) // strips).to(tl.int64)
    i = (tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)
    first = matrix * stride_batch + i.to(tl.int64) * stride_row
    peak = tl.full([ROWS], float("-inf"), dtype)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_range = (i[:, None] < rows) & (k[None, :] < K)
        _, log = counted(sign_ptr, log_ptr, first[:, None] + k[None, :].to(tl.int64) * stride_k, in_range, dtype)
        peak = tl.maximum(peak, tl.max(tl.where(log < float("inf"), log, float("inf")), axis=1))
    tl.store(shift_ptr + matrix * rows + i, peak, mask=i < rows)
    if norm_ptr is not None:
        total = tl.zeros([ROWS], dtype)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_range = (i[:, None] < rows) & (k[None, :] < K)
            _, log = counted(sign_ptr, log_ptr, first[:, None] + k[None, :].to(tl.int64) * stride_k, in_range, dtype)
            y = finite(peak)[:, None] - log
            weight = tl.where(log == float("-inf"), 0.0, (1.0 + y) * tl.exp(-y))
            total += tl.sum(weight * weight, axis=1)
        tl.store(norm_ptr + matrix * rows + i, tl.sqrt(total), mask=i < rows)


@triton.jit
def forward_kernel(
    sign_a_ptr, log_a_ptr, sign_b_ptr, log_b_ptr, shift_a_ptr, norm_a_ptr, shift_b_ptr, norm_b_ptr,
    sign_c_ptr, log_c_ptr, low_c_ptr, rung_ptr, M, N, K, SMALLEST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c_ij = ln|S_ij| + α_i + β_j; rung 0 where |S_ij| exceeds what rounding and underflow can do to it, else −1."""
    dtype: tl.constexpr = log_c_ptr.dtype.element_ty
    matrix, top, left = corner(M, N, BLOCK_M, BLOCK_N)
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_in, column_in = i < M - top, j < N - left
    row, column = matrix * M + top, matrix * N + left
    alpha = tl.load(shift_a_ptr + row + i, mask=row_in, other=0.0)
    beta = tl.load(shift_b_ptr + column + j, mask=column_in, other=0.0)
    # beyond the last row it is computed again, and not stored
    at_a = tl.minimum(i, M - 1 - top)[:, None] * K
    S = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        deep = k < K - start
        from_b = (matrix * K + start) * N + left
        EA = factor(sign_a_ptr, log_a_ptr, row * K + start, at_a + k[None, :], deep[None, :], alpha[:, None], dtype)
        EB = factor(
            sign_b_ptr, log_b_ptr, from_b, k[:, None] * N + j[None, :], deep[:, None] & column_in[None, :],
            beta[None, :], dtype,
        )  # fmt: skip
        # fma keeps the sums of BLOCK_K terms apart: their rounding then grows as BLOCK_K + K / BLOCK_K, not as K
        S = tl.fma(tl.dot(EA, EB, input_precision="ieee", out_dtype=dtype), tl.full(S.shape, 1.0, dtype), S)
    size = tl.abs(S)
    bound = tl.full(S.shape, SMALLEST, dtype) * K
    if sign_c_ptr is not None:
        n = tl.load(norm_a_ptr + row + i, mask=row_in, other=0.0)
        m = tl.load(norm_b_ptr + column + j, mask=column_in, other=0.0)
        bound = tl.maximum(bound, (UNIT * (BLOCK_K + K // BLOCK_K + 10) * n)[:, None] * m[None, :])
    bounded = tl.maximum(alpha[:, None], beta[None, :]) < float("inf")
    zero = (tl.minimum(alpha[:, None], beta[None, :]) == float("-inf")) & bounded
    accepted = zero | ((size > bound) & (size < float("inf")) & bounded)
    inside = row_in[:, None] & column_in[None, :]
    first = row * N + left
    at = i[:, None] * N + j[None, :]
    shift, beneath = two_sum(alpha[:, None], beta[None, :])
    c, low = two_sum(shift, tl.log(size))
    tl.store(log_c_ptr + first + at, tl.where(zero, float("-inf"), c), mask=inside)
    tl.store(low_c_ptr + first + at, usual(low + beneath), mask=inside)
    tl.store(rung_ptr + first + at, tl.where(accepted, 0, -1).to(tl.int8), mask=inside)
    if sign_c_ptr is not None:
        tl.store(sign_c_ptr + first + at, sign_of(tl.where(zero, 0.0, S)), mask=inside)


@triton.jit
def blocked_kernel(
    sign_a_ptr, log_a_ptr, sign_b_ptr, log_b_ptr, sign_c_ptr, log_c_ptr, low_c_ptr, rung_ptr, M, N, K, few,
    SMALLEST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Where more than ``few`` outputs of a tile are pending: maxima of BLOCK_K indices at a time, merged online."""
    dtype: tl.constexpr = log_c_ptr.dtype.element_ty
    matrix, top, left = corner(M, N, BLOCK_M, BLOCK_N)
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_in, column_in = i < M - top, j < N - left
    row = matrix * M + top
    at_c = row * N + left + i[:, None] * N + j[None, :]
    pending = tl.load(rung_ptr + at_c, mask=row_in[:, None] & column_in[None, :], other=0) == -1
    if tl.sum(pending.to(tl.int32)) > few:
        m = tl.full([BLOCK_M, BLOCK_N], float("-inf"), dtype)
        S = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        T = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        m_low = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at_a = row * K + i[:, None] * K + k[None, :]
            at_b = (matrix * K + start) * N + left + (k - start)[:, None] * N + j[None, :]
            s, a = counted(sign_a_ptr, log_a_ptr, at_a, row_in[:, None] & (k[None, :] < K), dtype)
            t, b = counted(sign_b_ptr, log_b_ptr, at_b, (k[:, None] < K) & column_in[None, :], dtype)
            alpha = tl.max(a, axis=1)
            beta = tl.max(b, axis=0)
            EA = tl.exp(a - finite(alpha)[:, None])
            EB = tl.exp(b - finite(beta)[None, :])
            here, beneath = two_sum(alpha[:, None], beta[None, :])
            highest = tl.maximum(m, here)
            highest_low = tl.where(here > m, usual(beneath), m_low)
            before = tl.exp((m - finite(highest)) + (m_low - highest_low))
            fresh = tl.exp((here - finite(highest)) + (usual(beneath) - highest_low))
            m = highest
            m_low = highest_low
            T = T * before + fresh * tl.dot(EA, EB, input_precision="ieee", out_dtype=dtype)
            if sign_c_ptr is not None:
                S = S * before + fresh * tl.dot(signed(s, EA), signed(t, EB), input_precision="ieee", out_dtype=dtype)
        if sign_c_ptr is None:
            S = T
        size = tl.abs(S)
        bound = tl.full(S.shape, SMALLEST, dtype) * K
        if sign_c_ptr is not None:
            # Σ t ln(1/t) ≤ T ln(K/T): what rounding of the exponents costs
            rounding = BLOCK_K + 4 * (K // BLOCK_K) + 20 + 3.0 * tl.log(K / T)
            bound = tl.maximum(bound, UNIT * T * rounding)
        zero = (m == float("-inf")) & (T == 0.0)
        accepted = pending & (zero | ((size > bound) & (size < float("inf"))))
        c, low = two_sum(m, tl.log(size))
        tl.store(log_c_ptr + at_c, tl.where(zero, float("-inf"), c), mask=accepted)
        tl.store(low_c_ptr + at_c, usual(low + m_low), mask=accepted)
        tl.store(rung_ptr + at_c, tl.full(S.shape, 2, tl.int8), mask=accepted)
        if sign_c_ptr is not None:
            tl.store(sign_c_ptr + at_c, sign_of(S), mask=accepted)


@triton.jit
def streamed_kernel(
    sign_a_ptr, log_a_ptr, sign_b_ptr, log_b_ptr, sign_c_ptr, log_c_ptr, low_c_ptr, rung_ptr, M, N, K, few,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where more than ``few`` outputs of a tile are pending: one exponential per term, exact for every range."""
    dtype: tl.constexpr = log_c_ptr.dtype.element_ty
    matrix, top, left = corner(M, N, BLOCK_M, BLOCK_N)
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_in, column_in = i < M - top, j < N - left
    row = matrix * M + top
    at_c = row * N + left + i[:, None] * N + j[None, :]
    pending = tl.load(rung_ptr + at_c, mask=row_in[:, None] & column_in[None, :], other=0) == -1
    if tl.sum(pending.to(tl.int32)) > few:
        at_a = row * K + i * K
        at_b = matrix * K * N + left + j
        m = tl.full([BLOCK_M, BLOCK_N], -3e38, dtype)
        S = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        T = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        m_low = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        special = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        for k in range(K):
            s, a = counted(sign_a_ptr, log_a_ptr, at_a + k, row_in, dtype)
            t, b = counted(sign_b_ptr, log_b_ptr, at_b + tl.cast(k, tl.int64) * N, column_in, dtype)
            p, beneath = two_sum(a[:, None], b[None, :])
            sign = s[:, None] * t[None, :]
            p = tl.where(sign == 0.0, float("-inf"), p)
            special += tl.where(p < float("inf"), 0.0, sign * p)
            p = tl.where(p < float("inf"), p, float("-inf"))
            beneath = usual(beneath)
            difference = (p - m) + (beneath - m_low)
            small = tl.exp(-tl.abs(difference))
            grows = difference > 0.0
            S = tl.where(grows, S * small + sign, S + sign * small)
            T = tl.where(grows, T * small + 1.0, T + small)
            m = tl.where(grows, p, m)
            m_low = tl.where(grows, beneath, m_low)
        zero = T == 0.0
        ordinary = special == 0.0
        enough = T > 0.0
        if sign_c_ptr is not None:
            enough = tl.abs(S) > UNIT * T * (6.0 * K + 32.0)
        decided = ~ordinary | zero | enough
        c, low = two_sum(m, tl.log(tl.abs(S)))
        value = tl.where(ordinary, tl.where(zero, float("-inf"), c), tl.abs(special))
        tl.store(log_c_ptr + at_c, value, mask=pending & decided)
        tl.store(low_c_ptr + at_c, usual(low + m_low), mask=pending & decided)
        tl.store(rung_ptr + at_c, tl.full(S.shape, 4, tl.int8), mask=pending & decided)
        if sign_c_ptr is not None:
            tl.store(sign_c_ptr + at_c, sign_of(tl.where(ordinary, S, special)), mask=pending & decided)


@triton.jit
def entry_kernel(
    sign_a_ptr, log_a_ptr, sign_b_ptr, log_b_ptr, sign_c_ptr, log_c_ptr, low_c_ptr, rung_ptr, M, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each pending output of a strip of a row in float64: rung 3, or −3 where even that leaves the sign in doubt."""
    strips = tl.cdiv(N, BLOCK_N)
    i = (tl.program_id(0) // strips).to(tl.int64)
    j = (tl.program_id(0) % strips) * BLOCK_N + tl.arange(0, BLOCK_N)
    pending = (tl.load(rung_ptr + i * N + j, mask=j < N, other=0) == -1).to(tl.int32)
    order = tl.cumsum(pending, axis=0) * pending
    at_b = i // M * K * N
    for entry in range(1, tl.sum(pending) + 1):
        column = tl.sum(tl.where(order == entry, j, 0))
        m = tl.full([1], float("-inf"), tl.float64)
        S = tl.zeros([1], tl.float64)
        T = tl.zeros([1], tl.float64)
        special = tl.zeros([1], tl.float64)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            s, a = counted(sign_a_ptr, log_a_ptr, i * K + k, k < K, tl.float64)
            t, b = counted(sign_b_ptr, log_b_ptr, at_b + k.to(tl.int64) * N + column, k < K, tl.float64)
            sign = tl.where(k < K, s * t, 0.0)
            p = tl.where(sign == 0.0, float("-inf"), a + b)
            special += tl.sum(tl.where(p < float("inf"), 0.0, sign * p), axis=0)
            p = tl.where(p < float("inf"), p, float("-inf"))
            highest = tl.maximum(m, tl.max(p, axis=0))
            before = tl.exp(m - finite(highest))
            term = tl.exp(p - finite(highest))
            S = S * before + tl.sum(sign * term, axis=0)
            T = T * before + tl.sum(term, axis=0)
            m = highest
        zero = T == 0.0
        ordinary = special == 0.0
        decided = ~ordinary | zero | (tl.abs(S) > 1.2e-16 * T * (2.0 * K + 16.0 + tl.abs(finite(m))))
        value = tl.where(ordinary, tl.where(zero, float("-inf"), tl.log(tl.abs(S)) + m), tl.abs(special))
        at_c = i * N + column + tl.arange(0, 1)
        c = value.to(log_c_ptr.dtype.element_ty)
        tl.store(log_c_ptr + at_c, c)
        tl.store(low_c_ptr + at_c, usual(value - c.to(tl.float64)).to(log_c_ptr.dtype.element_ty))
        tl.store(rung_ptr + at_c, tl.where(decided, 3, -3).to(tl.int8))
        if sign_c_ptr is not None:
            tl.store(sign_c_ptr + at_c, sign_of(tl.where(ordinary, S, special)))


@triton.jit
def largest_kernel(
    sign_a_ptr, log_a_ptr, sign_b_ptr, log_b_ptr, sign_c_ptr, log_c_ptr, index_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """c_ij = max_k (a_ik + b_kj), and which k came first, −1 where every term is zero; the first NaN wins."""
    dtype: tl.constexpr = log_c_ptr.dtype.element_ty
    matrix, top, left = corner(M, N, BLOCK_M, BLOCK_N)
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_in, column_in = i < M - top, j < N - left
    from_a = (matrix * M + top) * K
    from_b = matrix * K * N + left
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), dtype)
    index = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
    for k in range(K):
        s, a = counted(sign_a_ptr, log_a_ptr, from_a + k + i * K, row_in, dtype)
        t, b = counted(sign_b_ptr, log_b_ptr, from_b + tl.cast(k, tl.int64) * N + j, column_in, dtype)
        p = a[:, None] + b[None, :]
        if sign_a_ptr is not None:
            p = tl.where(s[:, None] * t[None, :] == 0.0, float("-inf"), p)
        better = (p > best) | ((p != p) & (best == best))
        best = tl.where(better, p, best)
        index = tl.where(better, k, index)
    at_c = (matrix * M + top) * N + left + i[:, None] * N + j[None, :]
    inside = row_in[:, None] & column_in[None, :]
    tl.store(log_c_ptr + at_c, best, mask=inside)
    if index_ptr is not None:
        tl.store(index_ptr + at_c, index, mask=inside)
    if sign_c_ptr is not None:
        found = inside & (index >= 0)
        s = tl.load(sign_a_ptr + from_a + i[:, None] * K + index, mask=found, other=0)
        t = tl.load(sign_b_ptr + from_b + index.to(tl.int64) * N + j[None, :], mask=found, other=0)
        tl.store(sign_c_ptr + at_c, tl.where(best == best, s * t, 1).to(tl.int8), mask=inside)


@triton.jit
def scatter_kernel(
    g_ptr, index_ptr, da_ptr, rows, columns, K, stride_row, stride_column, stride_da_row, stride_da_k,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da_ik = Σ_j g_ij [k is the first largest of (i, j)], in the order of j: no atomics."""
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    matrix, top, left = corner(rows, K, BLOCK_M, BLOCK_K)
    i, k = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_K)
    row = i < rows
    first = matrix * rows * columns + i.to(tl.int64) * stride_row
    da = tl.zeros([BLOCK_M, BLOCK_K], dtype)
    for j in range(columns):
        at = first + tl.cast(j, tl.int64) * stride_column
        index = tl.load(index_ptr + at, mask=row, other=-1)
        g = tl.load(g_ptr + at, mask=row, other=0.0)
        da += tl.where(index[:, None] == k[None, :], g[:, None], 0.0)
    at_da = matrix * rows * K + i[:, None].to(tl.int64) * stride_da_row + k[None, :].to(tl.int64) * stride_da_k
    tl.store(da_ptr + at_da, da, mask=row[:, None] & (k[None, :] < K))


@triton.jit
def gradient_kernel(
    sign_a_ptr, log_a_ptr, sign_b_ptr, log_b_ptr, sign_c_ptr, log_c_ptr, low_c_ptr, g_ptr, da_ptr, wide_ptr,
    rows, columns, K, stride_a_row, stride_a_k, stride_b_k, stride_b_column, stride_c_row, stride_c_column,
    LIMIT: tl.constexpr, BEYOND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da_ik = Σ_j g_ij s_ik t_kj s_ij exp(a_ik + b_kj − c_ij); zero where c_ij or a_ik is −∞.

    Pairs (i, j) with α_i + β_j − c_ij > LIMIT cannot be factored. They are left out and their rows noted in ``wide``;
    a second launch with BEYOND adds them term by term, and leaves at once where no row is noted.
    """
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    matrix, top, left = corner(rows, K, BLOCK_M, BLOCK_K)
    i, k, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    row_in, depth_in = i < rows - top, k < K - left
    inside = row_in[:, None] & depth_in[None, :]
    from_a = matrix * rows * K + tl.cast(top, tl.int64) * stride_a_row + tl.cast(left, tl.int64) * stride_a_k
    from_b = matrix * K * columns + tl.cast(left, tl.int64) * stride_b_k
    from_c = matrix * rows * columns + tl.cast(top, tl.int64) * stride_c_row
    at_a = from_a + i[:, None] * stride_a_row + k[None, :] * stride_a_k
    at_wide = wide_ptr + matrix * rows + top + i
    step = BLOCK_N
    if BEYOND:
        if tl.max(tl.load(at_wide, mask=row_in, other=0), axis=0) == 0:
            return
        step = 1
    s, a = counted(sign_a_ptr, log_a_ptr, at_a, inside, dtype)
    alpha = tl.max(a, axis=1)
    total = tl.zeros([BLOCK_M, BLOCK_K], dtype)
    highest = tl.full([BLOCK_M], float("-inf"), dtype)
    for start in range(0, columns, step):
        at_b = from_b + tl.cast(start, tl.int64) * stride_b_column
        at_c = from_c + tl.cast(start, tl.int64) * stride_c_column
        if BEYOND:
            t, b = counted(sign_b_ptr, log_b_ptr, at_b + k * stride_b_k, depth_in, dtype)
            sign, c = counted(sign_c_ptr, log_c_ptr, at_c + i * stride_c_row, row_in, dtype)
            low = tl.load(low_c_ptr + at_c + i * stride_c_row, mask=row_in, other=0.0)
            g = tl.load(g_ptr + at_c + i * stride_c_row, mask=row_in, other=0.0)
            chosen = (c > float("-inf")) & (alpha + tl.max(b, axis=0) - c > LIMIT)
            if tl.max(chosen.to(tl.int32), axis=0) > 0:
                p, beneath = two_sum(a, b[None, :])
                weight = tl.exp((p - c[:, None]) + (usual(beneath) - low[:, None])) * (g * sign)[:, None] * t[None, :]
                total += tl.where(chosen[:, None] & (b > float("-inf"))[None, :], weight, 0.0)
        else:
            column_in = j < columns - start
            at_b += j[:, None] * stride_b_column + k[None, :] * stride_b_k
            t, b = counted(sign_b_ptr, log_b_ptr, at_b, column_in[:, None] & depth_in[None, :], dtype)
            at_c += i[:, None] * stride_c_row + j[None, :] * stride_c_column
            sign, c = counted(sign_c_ptr, log_c_ptr, at_c, row_in[:, None] & column_in[None, :], dtype)
            g = tl.load(g_ptr + at_c, mask=row_in[:, None] & column_in[None, :], other=0.0)
            beta = tl.max(b, axis=1)
            low = tl.load(low_c_ptr + at_c, mask=row_in[:, None] & column_in[None, :], other=0.0)
            shift, beneath = two_sum(alpha[:, None], beta[None, :])
            excess = tl.where(c == float("-inf"), float("-inf"), shift - c)
            highest = tl.maximum(highest, tl.max(excess, axis=1))
            W = tl.where(
                (excess == float("-inf")) | (excess > LIMIT), 0.0, g * sign * tl.exp(excess + (usual(beneath) - low))
            )
            EB = signed(t, tl.exp(b - finite(beta)[:, None]))
            total += tl.dot(W, EB, input_precision="ieee", out_dtype=dtype)
    s, a = counted(sign_a_ptr, log_a_ptr, at_a, inside, dtype)
    da = tl.load(da_ptr + at_a, mask=inside, other=0.0)
    if BEYOND:
        da += s * total
    else:
        da += s * tl.exp(a - finite(alpha)[:, None]) * total
        tl.store(at_wide, tl.full([BLOCK_M], 1, tl.int8), mask=row_in & (highest > LIMIT))
    tl.store(da_ptr + at_a, tl.where(a == float("-inf"), 0.0, da), mask=inside)


def matmul(
    sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor, mode: str
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return sign, log, its low part and rung of (batch, M, K) · (batch, K, N); no sign means that all are +1.

    Returns:
        sign (int8, or None without signs), log in the accumulation dtype and what rounding left out of it, from which
        the gradient of far logs is as exact as that of near ones, rung (int8): 0 rescaled, 2 blocked,
        3 float64, 4 streamed, and −3 where float64 leaves the sign in doubt. Mode ``"max"`` is rung 0 throughout.
    """
    operands, (batch, M, N, K) = _operands(sign_a, log_a, sign_b, log_b)
    dtype = accumulation_dtype(log_a.dtype)
    log = torch.empty(batch, M, N, dtype=dtype, device=log_a.device)
    sign = None if operands["sign_a_ptr"] is None else torch.empty(log.shape, dtype=torch.int8, device=log.device)
    low = torch.zeros_like(log)
    rung = torch.zeros(log.shape, dtype=torch.int8, device=log.device)
    if K == 0 or log.numel() == 0:
        return None if sign is None else sign.zero_(), log.fill_(-torch.inf), low, rung
    shared = {**operands, "sign_c_ptr": sign, "log_c_ptr": log, "M": M, "N": N, "K": K}
    grid, sizes, scale = _over("BLOCK_M", "BLOCK_N", batch, M, N), ("M", "N", "K"), _scale(dtype)
    if mode == "max":
        launch(largest_kernel, LARGEST_TILES, grid, {**shared, "index_ptr": None}, sizes)
        return sign, log, low, rung
    shared |= {"low_c_ptr": low, "rung_ptr": rung}
    few = {"few": LADDER_TILE.constants["BLOCK_M"] * LADDER_TILE.constants["BLOCK_N"] // 64}
    if K <= SHORT:
        rung.fill_(-1)
        few = {"few": 0}
    else:
        shifts = _shifts(operands, batch, M, N, K, dtype)
        launch(forward_kernel, _fitting(FORWARD_TILES, dtype), grid, {**shared, **shifts, **scale}, sizes)
        if dtype == torch.float32:
            launch(blocked_kernel, (LADDER_TILE,), grid, {**shared, **few, **scale})
    launch(streamed_kernel, STREAMED_TILES, grid, {**shared, **few, "UNIT": scale["UNIT"]})
    launch(entry_kernel, ENTRY_TILES, lambda tile: (batch * M * triton.cdiv(N, tile["BLOCK_N"]),), shared)
    return sign, log, low, rung


def matmul_backward(
    g: Tensor, guard: Tensor | None, sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor,
    sign_c: Tensor | None, log_c: Tensor, low_c: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of Σ g c in the accumulation dtype; ``guard`` is True where an output gives none."""
    operands, (batch, M, N, K) = _operands(sign_a, log_a, sign_b, log_b)
    dtype = accumulation_dtype(log_a.dtype)
    da = torch.zeros(batch, M, K, dtype=dtype, device=g.device)
    db = torch.zeros(batch, K, N, dtype=dtype, device=g.device)
    if 0 in (batch, M, N, K):
        return da, db
    signs = operands["sign_a_ptr"] is not None and sign_c is not None
    weights = {
        "sign_c_ptr": _wide_sign(sign_c, dtype) if signs else None,
        "log_c_ptr": log_c.to(dtype).contiguous(),
        "low_c_ptr": low_c.contiguous(),
        "g_ptr": (g.to(dtype) if guard is None else torch.where(guard, 0.0, g.to(dtype))).contiguous(),
        "LIMIT": 60.0 if dtype == torch.float32 else 600.0,
    }
    left = {"stride_a_row": K, "stride_a_k": 1, "stride_b_k": N, "stride_b_column": 1}
    right = {"stride_a_row": 1, "stride_a_k": N, "stride_b_k": 1, "stride_b_column": K}
    swapped = {
        "sign_a_ptr": operands["sign_b_ptr"], "log_a_ptr": operands["log_b_ptr"],
        "sign_b_ptr": operands["sign_a_ptr"], "log_b_ptr": operands["log_a_ptr"],
    }  # fmt: skip
    for factors, strides, rows, columns, out, down in (
        (operands, left, M, N, da, (N, 1)), (swapped, right, N, M, db, (1, N)),
    ):  # fmt: skip
        arguments = {
            **factors, **weights, **strides, "da_ptr": out, "rows": rows, "columns": columns, "K": K,
            "wide_ptr": torch.zeros(batch, rows, dtype=torch.int8, device=g.device),
            "stride_c_row": down[0], "stride_c_column": down[1],
        }  # fmt: skip
        grid, tune_on = _over("BLOCK_M", "BLOCK_K", batch, rows, K), ("rows", "columns", "K", "stride_a_row")
        tiles = _fitting(GRADIENT_TILES, dtype)
        launch(gradient_kernel, tiles, grid, {**arguments, "BEYOND": False}, tune_on, ("da_ptr",))
        launch(gradient_kernel, _fitting((BEYOND_TILE,), dtype), grid, {**arguments, "BEYOND": True})
    return da, db


def max_backward(
    g: Tensor, sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of Σ g c for mode ``"max"``: each g_ij goes to the first largest term of (i, j)."""
    operands, (batch, M, N, K) = _operands(sign_a, log_a, sign_b, log_b)
    dtype = accumulation_dtype(log_a.dtype)
    da = torch.zeros(batch, M, K, dtype=dtype, device=g.device)
    db = torch.zeros(batch, K, N, dtype=dtype, device=g.device)
    if 0 in (batch, M, N, K):
        return da, db
    log = torch.empty(batch, M, N, dtype=dtype, device=g.device)
    index = torch.empty(log.shape, dtype=torch.int32, device=g.device)
    arguments = {**operands, "sign_c_ptr": None, "log_c_ptr": log, "index_ptr": index, "M": M, "N": N, "K": K}
    launch(largest_kernel, LARGEST_TILES, _over("BLOCK_M", "BLOCK_N", batch, M, N), arguments, ("M", "N", "K"))
    shared = {"g_ptr": g.to(dtype).contiguous(), "index_ptr": index, "K": K}
    for out, rows, columns, index_strides, strides in ((da, M, N, (N, 1), (K, 1)), (db, N, M, (1, N), (1, N))):
        arguments = {
            **shared, "da_ptr": out, "rows": rows, "columns": columns, "stride_row": index_strides[0],
            "stride_column": index_strides[1], "stride_da_row": strides[0], "stride_da_k": strides[1],
        }  # fmt: skip
        launch(scatter_kernel, SCATTER_TILES, _over("BLOCK_M", "BLOCK_K", batch, rows, K), arguments)
    return da, db


def _shifts(operands: dict[str, Any], batch: int, M: int, N: int, K: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return α, β and, with signs, their norms, by the forward kernel's names."""
    found: dict[str, Any] = {}
    for side, rows, strides in (("a", M, (M * K, K, 1)), ("b", N, (K * N, 1, N))):
        shift = torch.empty(batch, rows, dtype=dtype, device=operands["log_a_ptr"].device)
        norm = None if operands["sign_a_ptr"] is None else torch.empty_like(shift)
        arguments = {
            "sign_ptr": operands[f"sign_{side}_ptr"], "log_ptr": operands[f"log_{side}_ptr"], "shift_ptr": shift,
            "norm_ptr": norm, "rows": rows, "K": K, "stride_batch": strides[0], "stride_row": strides[1],
            "stride_k": strides[2],
        }  # fmt: skip
        programs = batch * triton.cdiv(rows, SHIFT_TILES[0].constants["ROWS"])
        launch(shift_kernel, SHIFT_TILES, lambda _, programs=programs: (programs,), arguments)
        found |= {f"shift_{side}_ptr": shift, f"norm_{side}_ptr": norm}
    return found


def _operands(
    sign_a: Tensor | None, log_a: Tensor, sign_b: Tensor | None, log_b: Tensor
) -> tuple[dict[str, Any], tuple[int, int, int, int]]:
    """Return contiguous factors by the kernels' names and (batch, M, N, K); a missing sign beside one is +1."""
    if sign_a is None and sign_b is not None:
        sign_a = torch.ones(log_a.shape, dtype=torch.int8, device=log_a.device)
    if sign_b is None and sign_a is not None:
        sign_b = torch.ones(log_b.shape, dtype=torch.int8, device=log_b.device)
    a, b = (x.to(accumulation_dtype(x.dtype)) for x in (log_a, log_b))
    sign_a, sign_b = _wide_sign(sign_a, a.dtype), _wide_sign(sign_b, b.dtype)
    operands = {"sign_a_ptr": sign_a, "log_a_ptr": a.contiguous(), "sign_b_ptr": sign_b, "log_b_ptr": b.contiguous()}
    return operands, (log_a.shape[0], log_a.shape[1], log_b.shape[2], log_a.shape[2])


def _wide_sign(sign: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return contiguous signs: beside float64 in float64, whose matrix instructions take no operand made of bytes."""
    return None if sign is None else sign.to(torch.float64 if dtype == torch.float64 else sign.dtype).contiguous()


def _scale(dtype: torch.dtype) -> dict[str, float]:
    """Return what underflow may cost per term, times 2^mantissa, and the unit of rounding."""
    mantissa = 53 if dtype == torch.float64 else 24
    return {"SMALLEST": torch.finfo(dtype).tiny * 2.0**mantissa, "UNIT": 2.0**-mantissa}


def _fitting(tiles: tuple[Tile, ...], dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return the tiles; in float64 only the one whose registers hold twice the bytes."""
    return (LADDER_TILE,) if dtype == torch.float64 else tiles


def _over(down: str, across: str, batch: int, rows: int, columns: int) -> Grid:
    """Return the grid of one program per matrix and tile."""
    return lambda tile: (batch * triton.cdiv(rows, tile[down]) * triton.cdiv(columns, tile[across]),)
