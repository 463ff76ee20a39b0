"""What is known about a text without learning a network: an n-gram model of its bytes, and what compressors need.

    p_k(w | h) = max(c_k(h w) − D_k, 0) / c_k(h ·) + D_k N_k(h ·) / c_k(h ·) · p_{k−1}(w | h′),   p_0 = 1 / S

Interpolated Kneser–Ney: c_n counts n-grams, every lower c_k counts the different symbols seen before a k-gram; N_k(h ·)
is the number of different symbols behind h, h′ is h without its first symbol, D_k = n₁ / (n₁ + 2 n₂) with n_j the
number of k-grams that count j. Symbols are the 256 bytes and the end of a document, S = 257.
Cost: one sort of the text per order; 8 bytes per different n-gram and count.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from so8t_torch.core.errors import ConfigError

END = 256
SYMBOLS = 257
_BITS = 9
LONGEST = 64 // _BITS


@dataclass(frozen=True)
class _Order:
    """One order: k-grams (sorted, packed) with their counts, and their contexts with sum and number of followers."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    sums: np.ndarray
    followers: np.ndarray
    discount: float


class ByteNgram:
    """An interpolated Kneser–Ney model of bytes.

    Args:
        documents: to learn from.
        order: n, at most 7.

    Raises:
        ConfigError: an order that is not from 1 to 7.
    """

    def __init__(self, documents: Sequence[bytes], order: int = 6) -> None:
        if not 1 <= order <= LONGEST:
            raise ConfigError(f"The order of the n-gram model must be from 1 to {LONGEST}, got {order}.")
        self.order = order
        symbols = stream(documents)
        self._orders = []
        for length in range(1, order):
            # behind how many different symbols it is seen, not how often
            longer = np.unique(_packed(symbols, length + 1))
            behind = longer & np.uint64((1 << _BITS * length) - 1)
            self._orders.append(_order(*np.unique(behind, return_counts=True)))
        self._orders.append(_order(*np.unique(_packed(symbols, order), return_counts=True)))

    def probabilities(self, symbols: np.ndarray) -> np.ndarray:
        """Return the probability of every symbol but the first, given those before it.

        Args:
            symbols: integers from 0 to 256.
        """
        found = np.full(len(symbols) - 1, 1 / SYMBOLS)
        for length, held in enumerate(self._orders, 1):
            seen = found[max(0, length - 2) :]
            grams = _packed(symbols, length)[1 if length == 1 else 0 :]
            place, known = _find(held.contexts, grams >> np.uint64(_BITS))
            at, present = _find(held.grams, grams)
            count = np.where(present, held.counts[at], 0)
            left = np.maximum(count - held.discount, 0) + held.discount * held.followers[place] * seen
            seen[:] = np.where(known, left / held.sums[place], seen)
        return found

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Return the bits that each byte of the documents takes, their ends included."""
        return float(-np.log2(self.probabilities(stream(documents))).sum()) / sum(map(len, documents))


def stream(documents: Sequence[bytes]) -> np.ndarray:
    """Return the documents as symbols, each behind an end, and one more end behind the last."""
    end = np.array([END], dtype=np.int64)
    parts = [part for text in documents for part in (end, np.frombuffer(text, dtype=np.uint8).astype(np.int64))]
    return np.concatenate([*parts, end])


def _packed(symbols: np.ndarray, length: int) -> np.ndarray:
    """Return every run of ``length`` symbols as one integer, the first symbol in its highest bits."""
    count = max(0, len(symbols) - length + 1)
    packed = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        packed = (packed << np.uint64(_BITS)) | symbols[place : place + count].astype(np.uint64)
    return packed


def _order(grams: np.ndarray, counts: np.ndarray) -> _Order:
    contexts, first, followers = np.unique(grams >> np.uint64(_BITS), return_index=True, return_counts=True)
    once, twice = (int((counts == times).sum()) for times in (1, 2))
    discount = once / (once + 2 * twice) if once else 0.5
    return _Order(grams, counts, contexts, np.add.reduceat(counts, first), followers, min(discount, 0.99))


def _find(held: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each wanted value stands among sorted ones, and whether it does."""
    place = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
    return place, held[place] == wanted


def compressed(train: Sequence[bytes], held_out: Sequence[bytes]) -> dict[str, float]:
    """Return bits per byte of the held-out documents by gzip's method alone, and by xz behind the training documents.

    Args:
        train: what xz has read before.
        held_out: what is measured.
    """
    known, text = b"".join(train), b"".join(held_out)
    window = max(1 << 16, 1 << math.ceil(math.log2(len(known) + len(text))))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": min(window, 1 << 28)}]
    sizes = [len(lzma.compress(part, format=lzma.FORMAT_RAW, filters=filters)) for part in (known, known + text)]
    bits = 8 / len(text)
    return {"gzip": bits * len(zlib.compress(text, 9)), "xz_after_training_text": bits * (sizes[1] - sizes[0])}
