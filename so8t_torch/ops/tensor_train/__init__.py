"""A table of vectors kept as a train of cores: its rows, the tied head, its cross-entropy, and how to find the cores.

    E[i, d] = Σ_ρ Π_k C_k[i_k, ρ_{k−1}, ρ_k, d_k]      i = (i_1 v_2 + i_2) v_3 + …      d = (d_1 w_2 + d_2) w_3 + …
    logits(h) = h Eᵀ      cross_entropy(h, t) = log Σ_{i<V} exp(logits_i) − logits_t

Symbols: core C_k has shape (v_k, r_{k−1}, r_k, w_k) with r_0 = r_K = 1; v_k vocabulary factors, w_k feature factors,
r_k ranks; digits are row-major. The table has V ≤ Π v_k rows and D ≤ Π w_k columns. Complex cores are computed as real
ones of twice the rank. Accumulated in float32, or float64 for float64.
Cost: Σ_k r_{k−1} r_k Π_{j≤k} w_j products per different id; nothing is held beyond the result and a tile, and only ids
and cores are saved. The head never stores logits for the loss.
Twin: so8t_jax/ops/tensor_train.py. Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

import math
from itertools import pairwise
from numbers import Integral

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from so8t_torch.core import forward_mode
from so8t_torch.core.backend import Candidate, choose, explain, triton_reasons
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import without_autocast
from so8t_torch.core.tensors import expect_tensors
from so8t_torch.ops.tensor_train import autograd, eager, head
from so8t_torch.ops.tensor_train.decomposition import decompose, refine

__all__ = ["cross_entropy", "decompose", "logits", "refine", "rows", "table", "topk"]

_KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
_CHECKED_ON_DEVICE = False


def check_ids(on: bool) -> None:
    """Check ids and targets on accelerators too, at the cost of waiting for the device; on the CPU they always are.

    Args:
        on: whether a wrong id on an accelerator raises; without it such an id is undefined behaviour.
    """
    global _CHECKED_ON_DEVICE
    _CHECKED_ON_DEVICE = on


def rows(
    ids: Int[Tensor, "*batch"],
    *cores: Inexact[Tensor, "_ _ _ _"],
    vocab_size: int | None = None,
    d_model: int | None = None,
    padding_idx: int | None = None,
    backend: str = "auto",
) -> Inexact[Tensor, "*batch d"]:
    """Return rows of the table.

    Args:
        ids: numbers of the rows, in [0, vocab_size) or padding_idx.
        *cores: C_k of shape (v_k, r_{k−1}, r_k, w_k), real or complex, of one dtype.
        vocab_size: V; Π v_k by default.
        d_model: D; Π w_k by default.
        padding_idx: the id whose row is zero and sends no gradient; it may lie outside the table.
        backend: ``"triton"``, ``"triton_atomic"`` (the backward adds without order: faster, not reproducible to the
            bit), ``"tiled"`` (CPU), ``"eager"`` (plain operations, the only one with forward-mode derivatives), or
            ``"auto"``, which never takes ``"triton_atomic"``.

    Returns:
        E[ids, :D] in the dtype of the cores.

    Raises:
        ShapeError: the cores do not chain, or the table that is asked for does not fit into them.
        DomainError: ids are no whole numbers or out of range, or dtypes or devices do not agree.
        BackendError: the backend cannot run this call.
    """
    size, width = _table_shape("rows", cores, vocab_size, d_model)
    flat = _checked_ids("rows", ids, cores, size, padding_idx).flatten()
    chosen = choose("tensor_train.rows", backend, _row_candidates(cores))
    used = _used(cores, None, width)
    real, real_width = (eager.real_cores(used), 2 * width) if cores[0].is_complex() else (used, width)
    if chosen == "eager":
        with without_autocast(flat.device):
            found = eager.rows(flat, real, real_width, padding_idx)
    else:
        found = autograd.rows(flat, real, real_width, padding_idx, chosen)
    if cores[0].is_complex():
        found = torch.view_as_complex(found.view(-1, width, 2))
    return found.view(*ids.shape, width)


def table(
    *cores: Inexact[Tensor, "_ _ _ _"], vocab_size: int | None = None, d_model: int | None = None
) -> Inexact[Tensor, "v d"]:
    """Return the whole table E, V·D numbers.

    Args:
        *cores: as in ``rows``.
        vocab_size: V; Π v_k by default.
        d_model: D; Π w_k by default.

    Raises:
        ShapeError, DomainError: as in ``rows``.
    """
    shape = _table_shape("table", cores, vocab_size, d_model)
    with without_autocast(cores[0].device):
        return eager.table(_used(cores, *shape), *shape)


def logits(
    hidden: Float[Tensor, "*batch d"],
    *cores: Float[Tensor, "_ _ _ _"],
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "*batch v"]:
    """Return h Eᵀ: the transpose of the embedding, up to the order of the sums.

    Args:
        hidden: h, whose width D ≤ Π w_k is that of the table.
        *cores: as in ``rows``, real.
        vocab_size: V; Π v_k by default.
        backend: ``"tiled"`` (any device, in tiles of a few megabytes), ``"eager"`` (plain operations), or ``"auto"``.

    Returns:
        One number for each row of the table, in the dtype of h.

    Raises:
        ShapeError: as in ``rows``, or the width of h does not fit.
        DomainError: h or the cores are not real floating-point numbers (a head has no unique complex meaning).
        BackendError: the backend cannot run this call.
    """
    size = _head_size("logits", hidden, cores, vocab_size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    run = head.logits if _tiled_or_eager("logits", backend, hidden, cores) == "eager" else autograd.logits
    with without_autocast(hidden.device):
        return run(flat, _used(cores, size, hidden.shape[-1]), size).view(*hidden.shape[:-1], size)


def cross_entropy(
    hidden: Float[Tensor, "*batch d"],
    targets: Int[Tensor, "*batch"],
    *cores: Float[Tensor, "_ _ _ _"],
    vocab_size: int | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Float[Tensor, "*batch"]:
    """Return −log softmax(h Eᵀ)_t over the V rows of the table; the logits are stored neither forward nor backward.

    Args:
        hidden: h, whose width D ≤ Π w_k is that of the table.
        targets: t in [0, vocab_size), or ignore_index.
        *cores: as in ``rows``, real.
        vocab_size: V; Π v_k by default.
        ignore_index: the target whose loss is 0 and which sends no gradient; what h holds there does not matter.
        backend: ``"triton"`` (two cores), ``"tiled"`` (any device), ``"eager"`` (plain operations, stores the logits,
            the only one with forward-mode derivatives), or ``"auto"``.

    Returns:
        The loss of each token in float32 (float64 for float64).

    Raises:
        ShapeError: as in ``logits``, or targets do not match h.
        DomainError: as in ``logits``, or targets are no whole numbers or out of range.
        BackendError: the backend cannot run this call.
    """
    size = _head_size("cross_entropy", hidden, cores, vocab_size)
    if targets.shape != hidden.shape[:-1]:
        raise ShapeError(
            f"cross_entropy: expected one target per hidden state, shape {tuple(hidden.shape[:-1])}, "
            f"got {tuple(targets.shape)}."
        )
    aims = _checked_ids("cross_entropy", targets, cores, size, ignore_index, "targets").flatten()
    flat = hidden.reshape(-1, hidden.shape[-1])
    used = _used(cores, size, hidden.shape[-1])
    chosen = choose("tensor_train.cross_entropy", backend, _loss_candidates(hidden, cores))
    if chosen == "eager":
        with without_autocast(hidden.device):
            loss = head.cross_entropy(flat, aims, used, size, ignore_index)
    else:
        loss, _ = autograd.cross_entropy(flat, aims, used, size, ignore_index, chosen)
    return loss.view(targets.shape)


def topk(
    hidden: Float[Tensor, "*batch d"],
    *cores: Float[Tensor, "_ _ _ _"],
    k: int,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Return the k largest logits and their ids, largest first; of equal ones the lower id comes first.

    Args:
        hidden: h, whose width D ≤ Π w_k is that of the table.
        *cores: as in ``rows``, real.
        k: how many, 1 ≤ k ≤ V.
        vocab_size: V; Π v_k by default.
        backend: as in ``logits``.

    Returns:
        The logits in the dtype of h, and int64 ids; chosen in float32 (float64 for float64), before any rounding.

    Raises:
        ShapeError, DomainError, BackendError: as in ``logits``.
        ConfigError: k is out of range.
    """
    size = _head_size("topk", hidden, cores, vocab_size)
    if not (_is_whole(k) and 1 <= k <= size):
        raise ConfigError(f"topk: expected a whole number k with 1 ≤ k ≤ {size}, the number of rows, got {k!r}.")
    flat = hidden.reshape(-1, hidden.shape[-1])
    run = head.topk if _tiled_or_eager("topk", backend, hidden, cores) == "eager" else autograd.topk
    with without_autocast(hidden.device):
        values, ids = run(flat, _used(cores, size, hidden.shape[-1]), k, size)
    return values.view(*hidden.shape[:-1], k), ids.view(*hidden.shape[:-1], k)


def explain_backend(*cores: Tensor) -> str:
    """Return one line per backend of ``rows``: that it can run with these cores, or every reason why not."""
    return explain(_row_candidates(cores))


def _row_candidates(cores: tuple[Tensor, ...]) -> list[Candidate]:
    """Return the implementations of rows in order of preference, each with the reasons why it cannot run."""
    one_way = forward_mode.reasons(*cores)
    kernel = (*triton_reasons(*cores), *_kernel_reasons(cores, (2, 3)), *one_way)
    on_host = () if cores[0].device.type == "cpu" else (f"cores are on {cores[0].device}, this one runs on the CPU",)
    # Where its sums have no order a backend is never chosen by itself, so that it stands last.
    return [
        Candidate("triton", kernel),
        Candidate("tiled", (*on_host, *one_way)),
        Candidate("eager"),
        Candidate("triton_atomic", kernel),
    ]


def _loss_candidates(hidden: Tensor, cores: tuple[Tensor, ...]) -> list[Candidate]:
    """Return the implementations of the cross-entropy in order of preference."""
    one_way = forward_mode.reasons(hidden, *cores)
    mixed = () if hidden.dtype == cores[0].dtype else (f"h is {hidden.dtype}, the cores are {cores[0].dtype}",)
    kernel = (*triton_reasons(hidden), *_kernel_reasons(cores, (2,)), *mixed, *one_way)
    return [Candidate("triton", kernel), Candidate("tiled", one_way), Candidate("eager")]


def _tiled_or_eager(op: str, backend: str, hidden: Tensor, cores: tuple[Tensor, ...]) -> str:
    return choose(
        f"tensor_train.{op}",
        backend,
        [Candidate("tiled", forward_mode.reasons(hidden, *cores)), Candidate("eager")],
    )


def _kernel_reasons(cores: tuple[Tensor, ...], counts: tuple[int, ...]) -> tuple[str, ...]:
    """Return what the kernels lack for these cores."""
    found = []
    if len(cores) not in counts:
        found.append(f"kernels exist for {' and '.join(map(str, counts))} cores, got {len(cores)}")
    if cores[0].dtype in (torch.float64, torch.complex128):
        found.append(f"kernels accumulate in float32, the cores are {cores[0].dtype}")
    return tuple(found)


def _checked_ids(
    op: str, ids: Tensor, cores: tuple[Tensor, ...], size: int, allowed: int | None, what: str = "ids"
) -> Tensor:
    """Return the ids as int64; raise unless they are whole numbers in [0, size) or the allowed one."""
    if allowed is not None and not _is_whole(allowed):
        name = "padding_idx" if what == "ids" else "ignore_index"
        raise ConfigError(f"{op}: expected a whole number for {name}, got {allowed!r}.")
    expect_tensors(op, **{what: ids})
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DomainError(f"{op}: expected {what} of an integer dtype, got {ids.dtype}; convert them.")
    if ids.device != cores[0].device:
        raise DomainError(f"{op}: {what} are on {ids.device}, the cores on {cores[0].device}; move them.")
    # widened first: compared as 8 bits, 200 is −56, and a wrong id would pass for another one
    wide = ids.to(torch.int64)
    if ids.device.type != "cpu" and not _CHECKED_ON_DEVICE:
        return wide
    return autograd.checked(wide, size, allowed, op, what)


def _table_shape(op: str, cores: tuple[Tensor, ...], vocab_size: int | None, d_model: int | None) -> tuple[int, int]:
    """Return (V, D); raise unless the cores chain, agree in dtype and device, and hold a table of that shape."""
    _check_cores(op, cores)
    largest = tuple(math.prod([core.shape[axis] for core in cores]) for axis in (0, 3))
    asked = tuple(most if n is None else n for n, most in zip((vocab_size, d_model), largest, strict=True))
    for name, n, most in zip(("vocab_size", "d_model"), asked, largest, strict=True):
        if not (_is_whole(n) and 1 <= n <= most):
            raise ShapeError(
                f"{op}: expected a whole number {name} from 1 to {most}, the product of the factors, got {n!r}."
            )
    return asked[0], asked[1]


def _used(cores: tuple[Tensor, ...], size: int | None, width: int) -> list[Tensor]:
    """Return the cores without the leading digits that only rows at V (if given) and columns at D and beyond have.

    They are multiplied by zeros otherwise, and a NaN among them would not stay where it is.
    """
    first, *others = cores
    if size is not None:
        first = first[: -(-size // math.prod([core.shape[0] for core in others]))]
    kept = -(-width // math.prod([core.shape[3] for core in others]))
    return [first if kept == first.shape[3] else first[..., :kept].contiguous(), *others]


def _is_whole(n: object) -> bool:
    return isinstance(n, (Integral, torch.SymInt)) and not isinstance(n, bool)


def _check_cores(op: str, cores: tuple[Tensor, ...]) -> None:
    """Raise unless the cores are (v_k, r_{k−1}, r_k, w_k), chain from rank 1 to rank 1, and agree in kind."""
    expect_tensors(op, **{f"core {place}": core for place, core in enumerate(cores)})
    shapes = [tuple(core.shape) for core in cores]
    if not cores or any(len(shape) != 4 or 0 in shape for shape in shapes):
        raise ShapeError(f"{op}: expected cores of shape (v_k, r_{{k−1}}, r_k, w_k), all sizes positive, got {shapes}.")
    ranks = [1, *(r for shape in shapes for r in shape[1:3]), 1]
    if any(left != right for left, right in zip(ranks[::2], ranks[1::2], strict=True)):
        raise ShapeError(
            f"{op}: expected ranks that chain from 1 to 1 (each core's third size is the next one's second), "
            f"got shapes {shapes}."
        )
    if cores[0].dtype not in _KINDS:
        raise DomainError(
            f"{op}: expected floating-point cores of 16 bits or more, got {cores[0].dtype}; convert them."
        )
    for one, other in pairwise(cores):
        if (one.dtype, one.device) != (other.dtype, other.device):
            raise DomainError(
                f"{op}: expected cores of one dtype on one device, "
                f"got {one.dtype} on {one.device} and {other.dtype} on {other.device}."
            )


def _head_size(op: str, hidden: Tensor, cores: tuple[Tensor, ...], vocab_size: int | None) -> int:
    """Return V; raise unless hidden states and cores are real, agree, and fit together."""
    expect_tensors(op, hidden=hidden)
    size, width = _table_shape(op, cores, vocab_size, None)
    if hidden.is_complex() or cores[0].is_complex():
        raise DomainError(
            f"{op}: a head has no unique complex meaning, got {hidden.dtype} hidden states and {cores[0].dtype} cores; "
            f"give it real cores."
        )
    if hidden.dtype not in _KINDS:
        raise DomainError(
            f"{op}: expected real floating-point hidden states of 16 bits or more, got {hidden.dtype}; convert them."
        )
    if hidden.ndim == 0 or not 1 <= hidden.shape[-1] <= width:
        raise ShapeError(
            f"{op}: expected hidden states (..., D) with 1 ≤ D ≤ {width}, the product of the feature factors, "
            f"got {tuple(hidden.shape)}."
        )
    if hidden.device != cores[0].device:
        raise DomainError(f"{op}: hidden states are on {hidden.device}, the cores on {cores[0].device}; move one.")
    return size
