"""Rows of a tensor train in PyTorch: a plain differentiable form, and a tiled one for the CPU.

    X_1 = C_1[i_1]   X_k = X_{k−1} C_k[i_k]   row = X_K          (X_k: Π_{j≤k} w_j × r_k)
    ∂C_k[i_k] = X_{k−1}ᵀ G_k   G_{k−1} = G_k C_k[i_k]ᵀ   G_K = Σ over equal ids of the rows' gradients

The plain form writes what the formula says and is differentiable to any order, in both modes. The tiled form sorts the
ids, so that a repeated id is computed once forward, and its gradients are summed before they meet a core backward. It
keeps nothing but the ids; beyond the output or the gradients of the cores it holds one tile of rows. Sums run in the
order of the sorted ids, so the result is the same bits on every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from so8t_torch.core.pages import allocate
from so8t_torch.core.precision import accumulation_dtype

TILE_ELEMENTS = 5 << 15
"""Numbers per tile of rows: five eighths of a megabyte in float32, which a core's second-level cache holds."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Segments(NamedTuple):
    """The tokens of a batch, sorted by id.

    Attributes:
        order: positions of the tokens (N,), equal ids side by side, in the order in which they came.
        unique: the different ids (U,), ascending.
        starts: where each of them begins in ``order`` (U + 1,), with N at the end.
        segment: for every entry of ``order`` the place of its id in ``unique`` (N,).
    """

    order: Tensor
    unique: Tensor
    starts: Tensor
    segment: Tensor


def digits(ids: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """Return the digits i_1, …, i_K of the ids, row-major."""
    found = []
    for core in reversed(cores):
        found.append(ids % core.shape[0])
        ids = ids // core.shape[0]
    return found[::-1]


def rows(ids: Tensor, cores: list[Tensor], d_model: int, padding: int | None) -> Tensor:
    """Return the rows (T, D) of ids (T,) by differentiable operations."""
    dtype = accumulation_dtype(cores[0].dtype)
    kept = None if padding is None else ids != padding
    parts = digits(ids if kept is None else torch.where(kept, ids, 0), cores)
    # Widened before it is gathered: the gradients of equal ids then meet in the wide dtype.
    chosen = [core.to(dtype)[part] for core, part in zip(cores, parts, strict=True)]
    if kept is not None:
        chosen = [torch.where(kept[:, None, None, None], core, 0.0) for core in chosen]
    matrices = [core.transpose(2, 3).flatten(2) for core in chosen]
    return chain(matrices)[:, :d_model].to(cores[0].dtype)


def table(cores: list[Tensor], vocab_size: int, d_model: int) -> Tensor:
    """Return the whole table (V, D) by differentiable operations."""
    dtype = cores[0].dtype if cores[0].is_complex() else accumulation_dtype(cores[0].dtype)
    state = cores[0].to(dtype)[:, 0].transpose(1, 2)
    for core in cores[1:]:
        state = torch.einsum("vdr,wrsb->vwdbs", state, core.to(dtype)).flatten(0, 1).flatten(1, 2)
    return state[:vocab_size, :d_model, 0].to(cores[0].dtype)


def rows_gradient(grad: Tensor, ids: Tensor, cores: list[Tensor], padding: int | None) -> tuple[Tensor, ...]:
    """Return the gradients of the cores for a gradient (T, D) of the rows, by differentiable operations."""
    pull = torch.func.vjp(lambda *c: rows(ids, list(c), grad.shape[1], padding), *cores)[1]
    return pull(grad)


def rows_second(
    directions: list[Tensor], grad: Tensor, ids: Tensor, cores: list[Tensor], padding: int | None
) -> tuple[Tensor, ...]:
    """Return the derivatives of Σ ⟨direction, gradient of a core⟩ with respect to the rows' gradient and the cores."""
    pull = torch.func.vjp(lambda g, *c: rows_gradient(g, ids, list(c), padding), grad, *cores)[1]
    return pull(tuple(directions))


def real_cores(cores: list[Tensor]) -> list[Tensor]:
    """Return real cores whose row, read in pairs, is (Re, Im) of the row of complex cores.

    A complex number acts as [[re, im], [−im, re]] on pairs; ranks double, and so does the last feature factor.
    """
    *inner, last = [core.resolve_conj() for core in cores]
    found = []
    for k, core in enumerate(inner):
        upper = torch.cat((core.real, core.imag), 2)
        found.append(upper if k == 0 else torch.cat((upper, torch.cat((-core.imag, core.real), 2)), 1))
    tail = torch.view_as_real(last).flatten(3)
    if not inner:
        return [tail]
    turned = torch.view_as_real(torch.complex(-last.imag, last.real)).flatten(3)
    return [*found, torch.cat((tail, turned), 1)]


def segments(ids: Tensor, padding: int | None) -> Segments:
    """Sort ids (T,); tokens of the padding id are left out."""
    kept = torch.arange(ids.numel(), device=ids.device) if padding is None else (ids != padding).nonzero()[:, 0]
    ordered, order = torch.sort(ids[kept], stable=True)
    unique, segment, counts = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    return Segments(kept[order], unique, pad(counts.cumsum(0), (1, 0)), segment)


def rows_tiled(ids: Tensor, cores: list[Tensor], d_model: int, padding: int | None) -> Tensor:
    """Return the rows (T, D) of ids (T,), each different id computed once."""
    found = segments(ids, padding)
    train = Train(found.unique, cores)
    out = allocate((ids.numel(), d_model), cores[0].dtype)
    if found.order.numel() < ids.numel():
        out[ids == padding] = 0.0
    order, starts, target = found.order.numpy(), found.starts.numpy(), _array(out)
    first, repeated = order[starts[:-1]], starts[1:] - starts[:-1] > 1
    for begin, end in train.tiles():
        values = _array(train.rows(begin, end)[:, :d_model].to(out.dtype))
        target[first[begin:end]] = values
        for at in repeated[begin:end].nonzero()[0].tolist():
            target[order[starts[begin + at] + 1 : starts[begin + at + 1]]] = values[at]
    return out


def rows_gradient_tiled(grad: Tensor, ids: Tensor, cores: list[Tensor], padding: int | None) -> list[Tensor]:
    """Return the gradients of the cores for a gradient (T, D) of the rows; equal ids are summed first."""
    found = segments(ids, padding)
    train = Train(found.unique, cores)
    train.start_sums()
    cropped = math.prod([core.shape[3] for core in cores]) - grad.shape[1]
    starts = found.starts.tolist()
    for begin, end in train.tiles():
        total = segment_sums(grad, found, begin, end, starts)
        train.add_gradient(pad(total, (0, cropped)) if cropped else total, begin, end)
    return train.gradients()


def segment_sums(grad: Tensor, found: Segments, begin: int, end: int, starts: list[int]) -> Tensor:
    """Return the sums of the rows of grad over the tokens of each id in unique[begin:end], in order of the tokens."""
    dtype = accumulation_dtype(grad.dtype)
    order = found.order[starts[begin] : starts[end]]
    if grad.dtype == dtype and grad.is_contiguous():
        return embedding_bag(order, grad, found.starts[begin:end] - starts[begin], mode="sum")
    total = torch.zeros((end - begin, grad.shape[1]), dtype=dtype, device=grad.device)
    place = found.segment[starts[begin] : starts[end]] - begin
    for chunk, row in zip(order.split(end - begin), place.split(end - begin), strict=True):
        total.index_add_(0, row, grad.index_select(0, chunk).to(dtype))
    return total


def step_matrices(cores: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return C_k as (v_k, r_{k−1}, w_k r_k) in the given dtype: a row is then a chain of matrix products."""
    return [core.to(dtype).transpose(2, 3).flatten(2).contiguous() for core in cores]


class Train:
    """The rows of ascending ids and their gradients, a range of ids at a time.

    A beginning i_1 … i_k, k > 1, that several ids share is taken once.
    """

    def __init__(self, ids: Tensor, cores: list[Tensor]) -> None:
        self.cores, self.count = cores, ids.numel()
        self.matrices = step_matrices(cores, accumulation_dtype(cores[0].dtype))
        width = math.prod([core.shape[3] for core in cores])
        self.step = max(1, TILE_ELEMENTS // max(width, *(core[0].numel() for core in cores), 1))
        self.digits: list[Tensor] = []
        self.places: list[Tensor] = []
        for core in reversed(cores):
            self.digits.insert(0, ids % core.shape[0])
            ids, place = torch.unique_consecutive(ids // core.shape[0], return_inverse=True)
            self.places.insert(0, place)
        self.leading = self.digits[0][self.places[1]] if len(cores) > 1 else self.digits[0]
        self.edges = [place.numpy() for place in self.places]

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Yield begin and end of the ids that are taken together."""
        for begin in range(0, self.count, self.step):
            yield begin, min(begin + self.step, self.count)

    def rows(self, begin: int, end: int) -> Tensor:
        """Return the rows (n, Π w_k) of the ids begin … end − 1."""
        return self._products(len(self.cores) - 1, begin, end).flatten(1)

    def start_sums(self) -> None:
        """Begin to add up the gradients of the matrices; that of the first is laid out as its core."""
        first, *others = self.matrices
        self.sums = [first.new_zeros(self.cores[0].shape), *(torch.zeros_like(m) for m in others)]

    def add_gradient(self, grad: Tensor, begin: int, end: int) -> None:
        """Add the gradients of the matrices for a gradient (n, Π w_k) of the rows of the ids begin … end − 1."""
        self._add(len(self.cores) - 1, grad, begin, end)

    def gradients(self) -> list[Tensor]:
        """Return the sums as gradients of the cores."""
        first, *others = self.cores
        later = (core_shaped(acc, core) for acc, core in zip(self.sums[1:], others, strict=True))
        return [self.sums[0].to(first.dtype), *later]

    def _products(self, k: int, begin: int, end: int) -> Tensor:
        """Return X_k (n, Π_{j≤k} w_j, r_k) of the beginnings begin … end − 1, all counted from zero."""
        matrix = self._chosen(k, begin, end)
        if k:
            matrix = torch.bmm(self._left(k, begin, end), matrix)
        rank = self.cores[k].shape[2]
        return matrix.view(matrix.shape[0], matrix.shape[1] * matrix.shape[2] // rank, rank)

    def _left(self, k: int, begin: int, end: int) -> Tensor:
        """Return X_{k−1} of the beginnings begin … end − 1 of length k."""
        if k == 1:
            first = self.matrices[0].view(-1, self.cores[0].shape[3], self.cores[0].shape[2])
            return first.index_select(0, self.leading[begin:end])
        low, high = self._shorter(k, begin, end)
        products = self._products(k - 1, low, high)
        return products.index_select(0, self.places[k][begin:end] - low)

    def _add(self, k: int, grad: Tensor, begin: int, end: int) -> None:
        """Add the gradients of the matrices up to the k-th for a gradient of X_k; that of X_1 comes transposed."""
        digit = self.digits[k][begin:end]
        if k == 0:
            self.sums[0].flatten(1).index_add_(0, digit, grad)
            return
        left, matrix = self._left(k, begin, end), self._chosen(k, begin, end)
        grad = grad.view(*left.shape[:2], matrix.shape[2])
        self.sums[k].index_add_(0, digit, torch.bmm(left.transpose(1, 2), grad))
        if k == 1:
            # Transposed, the product is a quarter cheaper, and laid out as its core.
            back = torch.bmm(matrix, grad.transpose(1, 2))
            self.sums[0].flatten(1).index_add_(0, self.leading[begin:end], back.flatten(1))
            return
        back = torch.bmm(grad, matrix.transpose(1, 2)).flatten(1)
        low, high = self._shorter(k, begin, end)
        total = back.new_zeros((high - low, back.shape[1]))
        self._add(k - 1, total.index_add_(0, self.places[k][begin:end] - low, back), low, high)

    def _shorter(self, k: int, begin: int, end: int) -> tuple[int, int]:
        """Return the range of the beginnings of length k − 1 that those of length k extend."""
        return int(self.edges[k][begin]), int(self.edges[k][end - 1]) + 1

    def _chosen(self, k: int, begin: int, end: int) -> Tensor:
        return self.matrices[k].index_select(0, self.digits[k][begin:end])


def chain(matrices: list[Tensor]) -> Tensor:
    """Return X_K (n, Π w_k) from the gathered matrices (n, r_{k−1}, w_k r_k)."""
    return torch.bmm(_prefixes(matrices)[-1], matrices[-1]).flatten(1) if len(matrices) > 1 else matrices[0].flatten(1)


def _prefixes(matrices: list[Tensor]) -> list[Tensor]:
    """Return the products to the left of the matrices 2, …, K, each (n, Π_{j<k} w_j, r_{k−1})."""
    products: list[Tensor] = []
    for before, matrix in pairwise(matrices):
        state = torch.bmm(products[-1], before) if products else before
        # The size is written out: −1 means nothing where there are no rows.
        width = state.shape[1] * state.shape[2] // matrix.shape[1]
        products.append(state.reshape(state.shape[0], width, matrix.shape[1]))
    return products


def chain_gradient(grad: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the gathered matrices for a gradient (n, Π w_k) of the rows."""
    found = []
    for matrix, left in zip(matrices[:0:-1], _prefixes(matrices)[::-1], strict=True):
        grad = grad.reshape(left.shape[0], left.shape[1], matrix.shape[2])
        found.append(torch.bmm(left.transpose(1, 2), grad))
        grad = torch.bmm(grad, matrix.transpose(1, 2))
    return [*found, grad.reshape(matrices[0].shape)][::-1]


def core_shaped(matrix: Tensor, core: Tensor) -> Tensor:
    """Return (v, r_{k−1}, w r_k) as (v, r_{k−1}, r_k, w), in the dtype of the core."""
    v, left, right, width = core.shape
    shaped = matrix.reshape(v, left, width, right).transpose(2, 3)
    return torch.empty(core.shape, dtype=core.dtype, device=core.device).copy_(shaped)


def _array(x: Tensor) -> np.ndarray:
    """Return the memory of x as integers of its size: NumPy moves whole rows several times faster than PyTorch."""
    return x.view(_INTEGERS[x.dtype.itemsize]).numpy()
