"""Triton kernels of cross-entropy under a head tied to a two-core tensor train, and their launchers.

    L_t = Σ_ρ C₁ρ H_t C₂ρᵀ,   loss_t = log Σ_i exp L_t[i] − L_t[target_t],   P_t = softmax(L_t) − onehot(target_t)
    dH_t = g_t Σ_ρ C₁ρᵀ P_t C₂ρ,   dC₁ρ = Σ_t g_t P_t C₂ρ H_tᵀ,   dC₂ρ = Σ_t g_t P_tᵀ C₁ρ H_t

H_t: hidden state of a token as d₁ × d₂, zero beyond d_model; C₁ρ (v₁, d₁), C₂ρ (v₂, d₂): slices of the cores; L_t, P_t:
v₁ × v₂, ids beyond vocab_size excluded; g: gradient of the loss per token. A token of target −1 has loss 0 and no
gradient, whatever its hidden state; one whose target is no id has loss and gradients NaN.

Forward: one program per token and block of i₂ walks the slabs of i₁; H C₂ρᵀ (a d₁ × block of i₂) stays on chip and the
logits live as one tile. The program's log-sum-exp is merged with those of the other blocks in order. Backward: P is
staged for a few tokens at a time (about a thirty-second of them) and used three times; the core gradients are summed
over tokens in a fixed order, so that equal inputs give equal bits. Half-precision operands go to the tensor cores with
float32 sums; P and the products of H or P with one core are rounded to the half type once. float32 is IEEE throughout.
Derivation: docs/math/tensor_train.md
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc, operator"
# Triton reads annotations and knows tl.constexpr only, so that kernels cannot carry ordinary types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import Tile, launch
from so8t_torch.core.rounding import rounded
from so8t_torch.ops.tensor_train.kernels import fetch, product

SPLITS = 2
"""Partial sums of a core gradient, each over its share of every block of tokens."""
MULTIPLE, LARGEST_BLOCK = 16, 256
"""Tokens whose P is staged at once are a multiple of the one and at most the other."""


def _tile(warps: int, stages: int = 1, **sizes: int) -> Tile:
    return Tile(warps=warps, stages=stages, constants=sizes)


LOGIT_TILES = {
    2: (_tile(4, 2, V1=64, V2=64, A=16, B=64), _tile(8, 2, V1=128, V2=64, A=64, B=64)),
    4: (_tile(8, 1, V1=64, V2=64, A=16, B=32),),
}
"""Bytes per element → tiles of the logits and of P: V1 × V2 of them, A × B features at a time.

The partial sums of the loss lie one per V2, so that V2 is the same in each.
"""
HIDDEN_TILES = {
    2: (_tile(4, 2, V1=64, V2=64, A=16, B=64), _tile(4, 2, V1=64, V2=64, A=64, B=64)),
    4: (_tile(4, 1, V1=32, V2=32, A=16, B=64),),
}
CORE_TILES = {
    2: (_tile(8, 1, OWN=64, OTHER=64, D_OWN=64, D_OTHER=64), _tile(8, 1, OWN=64, OTHER=32, D_OWN=64, D_OTHER=64)),
    4: (_tile(8, 1, OWN=32, OTHER=64, D_OWN=64, D_OTHER=32),),
}


@triton.jit
def _narrowed(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round an intermediate to the element type for the tensor cores; the interpreter carries it in float32."""
    return x if INTERPRETED else x.to(dtype)


@triton.jit
def _logits(
    h_ptr, c1_ptr, c2_ptr, i, j, v1, v2, rank, d1, d2, d_model,
    V1: tl.constexpr, V2: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return L[i, j] of one token, zero outside the cores."""
    dtype: tl.constexpr = c1_ptr.dtype.element_ty
    total = tl.zeros([V1, V2], tl.float32)
    for a0 in range(0, d1, A):
        a = a0 + tl.arange(0, A)
        for r in range(rank):
            y = tl.zeros([A, V2], tl.float32)
            for b0 in range(0, d2, B):
                b = b0 + tl.arange(0, B)
                feature = a[:, None] * d2 + b[None, :]
                h = fetch(h_ptr + feature, (a < d1)[:, None] & (b < d2)[None, :] & (feature < d_model), INTERPRETED)
                at2 = c2_ptr + (j[None, :] * rank + r) * d2 + b[:, None]
                y = product(h, fetch(at2, (j < v2)[None, :] & (b < d2)[:, None], INTERPRETED), y, dtype)
            at1 = c1_ptr + (i[:, None] * rank + r) * d1 + a[None, :]
            x1 = fetch(at1, (i < v1)[:, None] & (a < d1)[None, :], INTERPRETED)
            total = product(x1, _narrowed(y, dtype, INTERPRETED), total, dtype)
    return total


@triton.jit
def loss_kernel(
    h_ptr, targets_ptr, c1_ptr, c2_ptr, lse_ptr, hit_ptr, v1, v2, vocab_size, rank, d1, d2, d_model,
    V1: tl.constexpr, V2: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write log Σ exp L and the target's L over one block of i₂ of one token."""
    t = tl.program_id(0).to(tl.int64)
    at = t * tl.num_programs(1) + tl.program_id(1)
    target = tl.load(targets_ptr + t)
    if target != -1:
        j = tl.program_id(1) * V2 + tl.arange(0, V2)
        most = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        hit = tl.where((target >= 0) & (target < vocab_size), 0.0, float("nan"))
        for i0 in range(0, v1, V1):
            i = i0 + tl.arange(0, V1)
            L = _logits(
                h_ptr + t * d_model, c1_ptr, c2_ptr, i, j, v1, v2, rank, d1, d2, d_model, V1, V2, A, B, INTERPRETED
            )
            name = i[:, None] * v2 + j[None, :]
            L = tl.where((j < v2)[None, :] & (name < vocab_size), L, float("-inf"))
            grown = tl.maximum(most, tl.max(tl.max(L, 1), 0))
            shift = tl.where(grown == float("-inf"), 0.0, grown)
            total = total * tl.exp(most - shift) + tl.sum(tl.sum(tl.exp(L - shift), 1), 0)
            hit += tl.sum(tl.sum(tl.where((j < v2)[None, :] & (name == target), L, 0.0), 1), 0)
            most = grown
        shift = tl.where(most == float("-inf"), 0.0, most)
        tl.store(lse_ptr + at, shift + tl.log(total))
        tl.store(hit_ptr + at, hit)
    else:
        tl.store(lse_ptr + at, 0.0)
        tl.store(hit_ptr + at, 0.0)


@triton.jit
def residual_kernel(
    h_ptr, targets_ptr, lse_ptr, c1_ptr, c2_ptr, p_ptr, v1, v2, vocab_size, rank, d1, d2, d_model,
    V1: tl.constexpr, V2: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a tile of P = softmax(L) − onehot(target) of one token."""
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + t)
    i = tl.program_id(1) * V1 + tl.arange(0, V1)
    j = tl.program_id(2) * V2 + tl.arange(0, V2)
    name = i[:, None] * v2 + j[None, :]
    inside = (i < v1)[:, None] & (j < v2)[None, :]
    P = tl.zeros([V1, V2], tl.float32)
    if target != -1:
        L = _logits(h_ptr + t * d_model, c1_ptr, c2_ptr, i, j, v1, v2, rank, d1, d2, d_model, V1, V2, A, B, INTERPRETED)
        P = tl.exp(L - tl.load(lse_ptr + t)) - (name == target).to(tl.float32)
        P = tl.where((target >= 0) & (target < vocab_size), tl.where(name < vocab_size, P, 0.0), float("nan"))
    tl.store(p_ptr + t * v1 * v2 + name, rounded(P, p_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def hidden_kernel(
    g_ptr, targets_ptr, p_ptr, c1_ptr, c2_ptr, dh_ptr, v1, v2, rank, d1, d2, d_model,
    V1: tl.constexpr, V2: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write A × B features of dH = g Σ_ρ C₁ρᵀ P C₂ρ of one token."""
    dtype: tl.constexpr = c1_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * A + tl.arange(0, A)
    b = tl.program_id(2) * B + tl.arange(0, B)
    dh = tl.zeros([A, B], tl.float32)
    if tl.load(targets_ptr + t) != -1:
        for j0 in range(0, v2, V2):
            j = j0 + tl.arange(0, V2)
            for r in range(rank):
                x = tl.zeros([A, V2], tl.float32)
                for i0 in range(0, v1, V1):
                    i = i0 + tl.arange(0, V1)
                    inside = (i < v1)[:, None] & (j < v2)[None, :]
                    P = fetch(p_ptr + t * v1 * v2 + i[:, None] * v2 + j[None, :], inside, INTERPRETED)
                    at1 = c1_ptr + (i[None, :] * rank + r) * d1 + a[:, None]
                    x1 = fetch(at1, (i < v1)[None, :] & (a < d1)[:, None], INTERPRETED)
                    x = product(x1, P, x, dtype)
                at2 = c2_ptr + (j[:, None] * rank + r) * d2 + b[None, :]
                x2 = fetch(at2, (j < v2)[:, None] & (b < d2)[None, :], INTERPRETED)
                dh = product(_narrowed(x, dtype, INTERPRETED), x2, dh, dtype)
        dh = dh * tl.load(g_ptr + t)
    feature = a[:, None] * d2 + b[None, :]
    kept = (a < d1)[:, None] & (b < d2)[None, :] & (feature < d_model)
    tl.store(dh_ptr + t * d_model + feature, rounded(dh, dh_ptr.dtype.element_ty, INTERPRETED), mask=kept)


@triton.jit
def core_kernel(
    g_ptr, targets_ptr, h_ptr, p_ptr, core_ptr, out_ptr, count, share, size,
    v_own, v_other, stride_own, stride_other, rank, d_own, d_other, feature_own, feature_other, d_model,
    OWN: tl.constexpr, OTHER: tl.constexpr, D_OWN: tl.constexpr, D_OTHER: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dC[i, ρ, o] of one split += Σ_t g P[i, j] (Σ_w C'[j, ρ, w] H[o, w]) over its share of a block of tokens.

    Axis 0: blocks of i; axis 1: ranks × blocks of o; axis 2: splits.
    """
    dtype: tl.constexpr = core_ptr.dtype.element_ty
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    r = tl.program_id(1) % rank
    o = (tl.program_id(1) // rank) * D_OWN + tl.arange(0, D_OWN)
    first = tl.program_id(2) * share
    total = tl.zeros([OWN, D_OWN], tl.float32)
    for j0 in range(0, v_other, OTHER):
        j = j0 + tl.arange(0, OTHER)
        for t in range(first, tl.minimum(first + share, count)):
            if tl.load(targets_ptr + t) != -1:
                y = tl.zeros([OTHER, D_OWN], tl.float32)
                for w0 in range(0, d_other, D_OTHER):
                    w = w0 + tl.arange(0, D_OTHER)
                    feature = o[None, :] * feature_own + w[:, None] * feature_other
                    kept = (o < d_own)[None, :] & (w < d_other)[:, None] & (feature < d_model)
                    h = fetch(h_ptr + t * d_model + feature, kept, INTERPRETED)
                    x = fetch(
                        core_ptr + (j[:, None] * rank + r) * d_other + w[None, :],
                        (j < v_other)[:, None] & (w < d_other)[None, :],
                        INTERPRETED,
                    )
                    y = product(x, h, y, dtype)
                names = i[:, None] * stride_own + j[None, :] * stride_other
                known = (i < v_own)[:, None] & (j < v_other)[None, :]
                P = fetch(p_ptr + t * v_own * v_other + names, known, INTERPRETED)
                none = tl.zeros([OWN, D_OWN], tl.float32)
                total += tl.load(g_ptr + t) * product(P, _narrowed(y, dtype, INTERPRETED), none, dtype)
    at = out_ptr + tl.program_id(2).to(tl.int64) * size + (i[:, None] * rank + r) * d_own + o[None, :]
    inside = (i < v_own)[:, None] & (o < d_own)[None, :]
    total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


def head_forward(
    hidden: Tensor, targets: Tensor, core1: Tensor, core2: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return loss and log-sum-exp, both (T,) in float32, 0 where the target is −1.

    Args:
        hidden: (T, d_model) in the dtype of the cores: float32, bfloat16 or float16.
        targets: (T,) integers, −1 where there is nothing to predict; others outside [0, vocab_size) give NaN.
        core1: (v₁, 1, r, d₁).
        core2: (v₂, r, 1, d₂).
        vocab_size: ids counted, at most v₁ v₂.
    """
    hidden, targets, core1, core2 = (x.contiguous() for x in (hidden, targets, core1, core2))
    count = hidden.shape[0]
    if not count:
        empty = torch.zeros(0, dtype=torch.float32, device=hidden.device)
        return empty, empty.clone()
    tiles = LOGIT_TILES[core1.element_size()]
    blocks = triton.cdiv(core2.shape[0], tiles[0].constants["V2"])
    lse, hit = (torch.empty(count * blocks, dtype=torch.float32, device=hidden.device) for _ in range(2))
    launch(
        loss_kernel,
        tiles,
        lambda tile: (count, triton.cdiv(core2.shape[0], tile["V2"])),
        {
            "h_ptr": hidden, "targets_ptr": targets, "c1_ptr": core1, "c2_ptr": core2, "lse_ptr": lse, "hit_ptr": hit,
            "vocab_size": vocab_size, **_sizes(core1, core2, hidden),
        },
        tune_on=("v1", "v2", "rank", "d1", "d2"),
    )  # fmt: skip
    lse = torch.logsumexp(lse.view(count, blocks), 1)
    loss = lse - hit.view(count, blocks).sum(1)
    return torch.where(targets == -1, 0.0, loss), torch.where(targets == -1, 0.0, lse)


def head_backward(
    g: Tensor, hidden: Tensor, targets: Tensor, lse: Tensor, core1: Tensor, core2: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden (in its dtype) and of both cores (float32).

    Args:
        g: gradient of the loss (T,).
        lse: as ``head_forward`` returned it; the others as there.
    """
    hidden, targets, core1, core2 = (x.contiguous() for x in (hidden, targets, core1, core2))
    g, lse = g.to(torch.float32).contiguous(), lse.contiguous()
    dhidden = torch.empty_like(hidden)
    shares = [torch.zeros((SPLITS, *core.shape), dtype=torch.float32, device=core.device) for core in (core1, core2)]
    count = hidden.shape[0]
    block = min(max(count // (32 * MULTIPLE) * MULTIPLE, MULTIPLE), LARGEST_BLOCK, count)
    P = torch.empty((block, core1.shape[0], core2.shape[0]), dtype=core1.dtype, device=core1.device)
    for first in range(0, count, max(block, 1)):
        part = slice(first, first + block)
        tensors = {
            "g_ptr": g[part], "targets_ptr": targets[part], "lse_ptr": lse[part], "h_ptr": hidden[part], "p_ptr": P,
            "c1_ptr": core1, "c2_ptr": core2, "dh_ptr": dhidden[part],
        }  # fmt: skip
        _block_backward(tensors, shares, _sizes(core1, core2, hidden), vocab_size)
    return dhidden, shares[0].sum(0), shares[1].sum(0)


def _sizes(core1: Tensor, core2: Tensor, hidden: Tensor) -> dict[str, int]:
    """Return the integers that every kernel of the head takes."""
    return {
        "v1": core1.shape[0], "v2": core2.shape[0], "rank": core1.shape[2], "d1": core1.shape[3],
        "d2": core2.shape[3], "d_model": hidden.shape[1], "INTERPRETED": interpreting(),
    }  # fmt: skip


def _block_backward(tensors: dict[str, Tensor], shares: list[Tensor], sizes: dict[str, int], vocab_size: int) -> None:
    """Stage P of one block of tokens, write its dH, and add to the core gradients."""
    size, count = tensors["p_ptr"].element_size(), tensors["h_ptr"].shape[0]
    v1, v2, d1, d2 = (sizes[name] for name in ("v1", "v2", "d1", "d2"))
    launch(
        residual_kernel,
        LOGIT_TILES[size],
        lambda tile: (count, triton.cdiv(v1, tile["V1"]), triton.cdiv(v2, tile["V2"])),
        {**_only(tensors, "h", "targets", "lse", "c1", "c2", "p"), **sizes, "vocab_size": vocab_size},
        tune_on=("v1", "v2", "rank", "d1", "d2"),
    )
    launch(
        hidden_kernel,
        HIDDEN_TILES[size],
        lambda tile: (count, triton.cdiv(d1, tile["A"]), triton.cdiv(d2, tile["B"])),
        {**_only(tensors, "g", "targets", "p", "c1", "c2", "dh"), **sizes},
        tune_on=("v1", "v2", "rank", "d1", "d2"),
    )
    _core_backward(tensors, shares[0], tensors["c2_ptr"], (v1, v2, v2, 1), (d1, d2, d2, 1))
    _core_backward(tensors, shares[1], tensors["c1_ptr"], (v2, v1, 1, v2), (d2, d1, 1, d2))


def _core_backward(
    tensors: dict[str, Tensor],
    share: Tensor,
    other: Tensor,
    ids: tuple[int, int, int, int],
    features: tuple[int, int, int, int],
) -> None:
    """Add a block of tokens to the gradient of one core.

    Args:
        ids: parts of an id, own and other, and their strides in P.
        features: parts of a feature, own and other, and their strides in a hidden state.
    """
    count, rank = tensors["h_ptr"].shape[0], other.numel() // (ids[1] * features[1])
    arguments: dict[str, Any] = {
        **_only(tensors, "g", "targets", "h", "p"), "core_ptr": other, "out_ptr": share, "count": count,
        "share": triton.cdiv(count, SPLITS), "size": share[0].numel(), "rank": rank,
        "d_model": tensors["h_ptr"].shape[1], "INTERPRETED": interpreting(),
        **dict(zip(("v_own", "v_other", "stride_own", "stride_other"), ids, strict=True)),
        **dict(zip(("d_own", "d_other", "feature_own", "feature_other"), features, strict=True)),
    }  # fmt: skip
    launch(
        core_kernel,
        CORE_TILES[other.element_size()],
        lambda tile: (triton.cdiv(ids[0], tile["OWN"]), rank * triton.cdiv(features[0], tile["D_OWN"]), SPLITS),
        arguments,
        tune_on=("v_own", "v_other", "rank", "d_own", "d_other"),
        restore=("out_ptr",),
    )


def _only(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Return the tensors that a kernel takes."""
    return {f"{name}_ptr": tensors[f"{name}_ptr"] for name in names}
