"""Causal mixing by a semiseparable matrix of rank R, a band beside its diagonal, and the state of the two.

    operator: y_t = Σ_{s≤t} v_tᵀ diag(Π_{s<q≤t} α_q) u_s x_s        S_t = diag(α_t) S_{t−1} + u_t x_tᵀ,  y_t = S_tᵀ v_t
    compat:   y_t = k_t ⊙ v_t,  k_t = α_t ⊙ k_{t−1} + u_t           banded: y_t = Σ_{0≤j<K} taps_j ⊙ x_{t−j}

Symbols: t = 0 … T−1 counts tokens; x_t (D,) inputs; u_t, v_t (R,) what is written and read, zero where a rank channel
is closed; α_t (R,) decays in [0, 1]; S (R, D) and k (R,) the states. Below and on its diagonal the matrix of the
operator has the entries v_tᵀ diag(Π α) u_s, so that every block below the diagonal has rank at most R.
A run starts anew where the segment of a token differs from that of the token before it. Carried in float32, or float64
for float64, autocast or not.
Cost: T (2R + L) D multiplications in chunks of L tokens, T (2R' + L) D where R' of the rank channels are open, counted
in tiles of 16 that are closed for a chunk (on the CPU). Saved for the backward pass: the arguments.
Twin: so8t_jax/ops/semiseparable.py. Derivation: docs/math/semiseparable.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from so8t_torch.core import forward_mode
from so8t_torch.core.backend import Candidate, choose, explain
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none
from so8t_torch.ops.linear_recurrence import linear_recurrence
from so8t_torch.ops.semiseparable import autograd, eager

__all__ = ["banded", "compat", "operator"]


def operator(
    x: Float[Tensor, "*batch t d"],
    u: Float[Tensor, "*batch t r"],
    v: Float[Tensor, "*batch t r"],
    decay: Float[Tensor, "*#shape"],
    initial: Float[Tensor, "*#batch r d"] | None = None,
    segment_ids: Int[Tensor, "*#batch t"] | None = None,
    *,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*batch t d"], Float[Tensor, "*batch r d"]]:
    """Return y_t = S_tᵀ v_t of S_t = diag(α_t) S_{t−1} + u_t x_tᵀ, and the last state.

    Args:
        x: inputs, any strides.
        u: what each token writes.
        v: what each token reads.
        decay: α in [0, 1] of a shape that broadcasts to that of u: (..., T, R), (R,), (T, 1).
        initial: the state that enters the segment of the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.
        chunk: tokens that are taken together, a power of two. The fewest operations are near the number of open rank
            channels.
        backend: ``"chunked"``, ``"eager"`` (one step per token in plain operations, the only one with forward-mode
            derivatives), or ``"auto"``.

    Returns:
        y in the dtype of x, and the state in the dtype of initial, or of x without: a float32 initial state keeps the
        carried state of a half-precision stream in float32.

    Raises:
        ShapeError: the shapes do not fit, or there is no token, rank channel or input channel.
        DomainError: a dtype or a device does not fit, or a decay is outside of [0, 1]; off the CPU and in compiled
            graphs, which do not wait for values, such a decay multiplies as any number.
        ConfigError: the chunk is not a power of two.
        BackendError: the backend cannot run this call.

    Numerics:
        Editing token t, to a number or not, changes no bit of the outputs before it. Decays are only multiplied.

    Source: T. Dao, A. Gu, "Transformers are SSMs" (2024), sections 3.2 and 6, with a decay per rank channel.
    """
    expect_tensors("semiseparable.operator", x=x, u=u, v=v, decay=decay)
    expect_tensors_or_none("semiseparable.operator", initial=initial, segment_ids=segment_ids)
    _check_tokens("operator", x=x)
    *batch, length, width = x.shape
    _check_rank("operator", (*batch, length), u, v, decay)
    rank = u.shape[-1]
    _check_state("operator", x, initial, (*batch, rank, width))
    _check_segments("operator", x, segment_ids, (*batch, length))
    if chunk < 1 or chunk & (chunk - 1):
        raise ConfigError(f"semiseparable.operator: expected a chunk that is a power of two, got {chunk!r}.")
    chosen = choose("semiseparable.operator", backend, _candidates(x, u, v, decay, initial))
    rows, kind = math.prod(batch), accumulation_dtype(x.dtype)
    given = (x, u, v, decay.to(kind).expand(u.shape))
    values, written, read, alpha = (z.to(kind).reshape(rows, length, z.shape[-1]) for z in given)
    state = _start(initial, x, (*batch, rank, width), kind).reshape(rows, rank, width)
    restart = None if segment_ids is None else _restarts(segment_ids, (*batch, length)).reshape(rows, length)
    with without_autocast(x.device):
        if chosen == "eager":
            y, final = eager.recurrence(values, written, read, alpha, state, restart)
        else:
            y, final = _in_chunks(values, written, read, alpha, state, restart, chunk)
    kept = x.dtype if initial is None else initial.dtype
    return y.reshape(x.shape).to(x.dtype), final.reshape(*batch, rank, width).to(kept)


def compat(
    u: Float[Tensor, "*batch t r"],
    v: Float[Tensor, "*batch t r"],
    decay: Float[Tensor, "*#shape"],
    initial: Float[Tensor, "*#batch r"] | None = None,
    segment_ids: Int[Tensor, "*#batch t"] | None = None,
) -> tuple[Float[Tensor, "*batch t r"], Float[Tensor, "*batch r"]]:
    """Return k_t ⊙ v_t of k_t = α_t ⊙ k_{t−1} + u_t, and the last k; with α = 1, k sums what was written.

    Args:
        u: what each token writes.
        v: what each token reads.
        decay: α in [0, 1] of a shape that broadcasts to that of u: (..., T, R), (R,), (T, 1).
        initial: the state that enters the segment of the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.

    Returns:
        k ⊙ v in the dtype of u, and the state in the dtype of initial, or of u without.

    Raises:
        ShapeError, DomainError: as in ``operator``.
    """
    expect_tensors("semiseparable.compat", u=u, v=v, decay=decay)
    expect_tensors_or_none("semiseparable.compat", initial=initial, segment_ids=segment_ids)
    _check_tokens("compat", u=u)
    *batch, length, rank = u.shape
    _check_rank("compat", (*batch, length), u, v, decay)
    _check_state("compat", u, initial, (*batch, rank))
    _check_segments("compat", u, segment_ids, (*batch, length))
    kind = accumulation_dtype(u.dtype)
    start = _start(initial, u, (*batch, rank), kind)
    k, final = linear_recurrence(decay.to(kind), u.to(kind), start, segment_ids)
    return (k * v.to(kind)).to(u.dtype), final.to(u.dtype if initial is None else initial.dtype)


def banded(
    x: Float[Tensor, "*batch t d"],
    taps: Float[Tensor, "k d"],
    initial: Float[Tensor, "*#batch k-1 d"] | None = None,
    segment_ids: Int[Tensor, "*#batch t"] | None = None,
) -> tuple[Float[Tensor, "*batch t d"], Float[Tensor, "*batch k-1 d"]]:
    """Return y_t = Σ_j taps_j ⊙ x_{t−j} over the tokens of a segment, and its last K − 1 inputs.

    Args:
        x: inputs, any strides.
        taps: taps_j multiplies the input j tokens back.
        initial: the K − 1 inputs before the first token, in the segment of the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.

    Returns:
        y in the dtype of x, and the last K − 1 inputs, zero where they belong to another segment than the last token,
        in the dtype of initial, or of x without.

    Raises:
        ShapeError, DomainError: as in ``operator``.
    """
    expect_tensors("semiseparable.banded", x=x, taps=taps)
    expect_tensors_or_none("semiseparable.banded", initial=initial, segment_ids=segment_ids)
    _check_tokens("banded", x=x)
    *batch, length, width = x.shape
    if taps.ndim != 2 or taps.shape[0] == 0 or taps.shape[1] != width:
        raise ShapeError(
            f"semiseparable.banded: expected taps (K, {width}) with K ≥ 1 for inputs {tuple(x.shape)}, "
            f"got {tuple(taps.shape)}."
        )
    _check_kind("banded", x, taps=taps)
    before, kind = taps.shape[0] - 1, accumulation_dtype(x.dtype)
    _check_state("banded", x, initial, (*batch, before, width))
    _check_segments("banded", x, segment_ids, (*batch, length))
    inputs = torch.cat([_start(initial, x, (*batch, before, width), kind), x.to(kind)], -2)
    run = None if segment_ids is None else pad(_restarts(segment_ids, (*batch, length)).cumsum(-1), (before, 0))
    weights = taps.to(kind)
    y = weights[0] * inputs[..., before:, :]
    for j in range(1, before + 1):
        sources = slice(before - j, before - j + length)
        y = torch.addcmul(y, weights[j], _of_segment(inputs, run, sources, slice(before, None)))
    last = _of_segment(inputs, run, slice(length, None), slice(-1, None))
    return y.to(x.dtype), last.to(x.dtype if initial is None else initial.dtype, copy=True)


def _of_segment(inputs: Tensor, run: Tensor | None, sources: slice, readers: slice) -> Tensor:
    """Return inputs (..., T, D) of some tokens, zero where they are of another run than the tokens that read them."""
    found = inputs[..., sources, :]
    return found if run is None else torch.where((run[..., sources] == run[..., readers])[..., None], found, 0.0)


def explain_backend(x: Tensor) -> str:
    """Return one line per backend of ``operator``: that it can run with x, or every reason why not."""
    return explain(_candidates(x))


def _in_chunks(
    x: Tensor, u: Tensor, v: Tensor, decay: Tensor, initial: Tensor, restart: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return y (N, T, D) and the last state; the last chunk is filled with tokens that write and read nothing."""
    length = x.shape[1]
    size = min(chunk, 1 << (length - 1).bit_length())
    missing = -length % size
    run = None if restart is None else pad(restart, (0, missing)).unflatten(1, (-1, size)).cumsum(-1)
    values, written, read = (_cut(z, size, missing, 0.0) for z in (x, u, v))
    y, final = autograd.chunked(values, written, read, _cut(decay, size, missing, 1.0), initial, run)
    return y.flatten(1, 2)[:, :length], final


def _cut(z: Tensor, size: int, missing: int, value: float) -> Tensor:
    """Return z (N, T, C) as chunks (N, n, L, C), filled up with a value."""
    padded = pad(z, (0, 0, 0, missing), value=value) if missing else z
    return padded.unflatten(1, (-1, size))


def _start(initial: Tensor | None, like: Tensor, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """Return the state that enters."""
    return like.new_zeros(shape, dtype=kind) if initial is None else initial.to(kind).expand(shape)


def _restarts(segment_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return where a token (..., T) does not continue the segment of the token before it."""
    change = segment_ids[..., 1:] != segment_ids[..., :-1]
    return pad(change, (1, 0)).expand(shape)


def _candidates(*tensors: Tensor | None) -> list[Candidate]:
    """Return the implementations in order of preference, each with the reasons why it cannot run."""
    one_way = forward_mode.reasons(*(x for x in tensors if x is not None))
    return [Candidate("chunked", one_way), Candidate("eager")]


def _check_tokens(name: str, **given: Tensor) -> None:
    """Raise unless there are real tokens with channels."""
    ((label, x),) = given.items()
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ShapeError(
            f"semiseparable.{name}: expected {label} (..., T, C) with at least one token and one channel, "
            f"got {tuple(x.shape)}."
        )
    if not x.is_floating_point():
        raise DomainError(
            f"semiseparable.{name}: expected {label} of a real floating dtype, got {x.dtype}; convert it."
        )


def _check_rank(name: str, tokens: tuple[int, ...], u: Tensor, v: Tensor, decay: Tensor) -> None:
    """Raise unless u and v have rank channels for all tokens, and decays fit them and are in [0, 1]."""
    if u.ndim != len(tokens) + 1 or tuple(u.shape[:-1]) != tokens or u.shape[-1] == 0:
        raise ShapeError(
            f"semiseparable.{name}: expected u {(*tokens, 'R')} with at least one rank channel, got {tuple(u.shape)}."
        )
    if v.shape != u.shape:
        raise ShapeError(f"semiseparable.{name}: expected v of the shape of u {tuple(u.shape)}, got {tuple(v.shape)}.")
    _fits(name, "decays", decay, tuple(u.shape), "give one per token and rank channel, (R,) or (T, 1)")
    _check_kind(name, u, v=v, decay=decay)
    if u.device.type == "cpu" and decay.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(decay.detach())
        if low < 0 or high > 1:
            raise DomainError(
                f"semiseparable.{name}: expected decays in [0, 1], got {float(low):g} … {float(high):g}; a rate λ ≥ 0 "
                "decays by exp(−λ)."
            )


def _check_state(name: str, x: Tensor, initial: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless the initial state broadcasts to its shape."""
    if initial is not None:
        _fits(name, "an initial state", initial, shape, "give back the state that an earlier call returned")
        _check_kind(name, x, initial=initial)


def _check_segments(name: str, x: Tensor, segment_ids: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless there is one whole number per token."""
    if segment_ids is None:
        return
    _fits(name, "segment_ids", segment_ids, shape, "give one number per token")
    if segment_ids.shape[-1:] != shape[-1:]:
        raise ShapeError(
            f"semiseparable.{name}: expected segment_ids of shape {shape}, one number per token, "
            f"got {tuple(segment_ids.shape)}."
        )
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise DomainError(f"semiseparable.{name}: expected whole numbers in segment_ids, got {segment_ids.dtype}.")
    if segment_ids.device != x.device:
        raise DomainError(
            f"semiseparable.{name}: the inputs are on {x.device}, segment_ids on {segment_ids.device}; move one."
        )


def _check_kind(name: str, x: Tensor, **others: Tensor) -> None:
    """Raise unless the others are real and on the device of x."""
    for label, z in others.items():
        if not z.is_floating_point():
            raise DomainError(
                f"semiseparable.{name}: expected {label} of a real floating dtype, got {z.dtype}; convert it."
            )
        if z.device != x.device:
            raise DomainError(f"semiseparable.{name}: the inputs are on {x.device}, {label} on {z.device}; move one.")


def _fits(name: str, what: str, x: Tensor, shape: tuple[int, ...], advice: str) -> None:
    """Raise unless x broadcasts to a shape."""
    sizes = tuple(x.shape)
    if len(sizes) > len(shape) or any(n != 1 and n != m for n, m in zip(sizes[::-1], shape[::-1], strict=False)):
        raise ShapeError(
            f"semiseparable.{name}: expected {what} of shape {shape} or one that broadcasts to it, got {sizes}; "
            f"{advice}."
        )
