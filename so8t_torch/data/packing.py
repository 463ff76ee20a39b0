"""Documents as rows of one length, packed without padding.

    stream   ⟨end⟩ document ⟨end⟩ document …      row r   tokens r L … (r + 1) L, both included

Rows share one token, so that every token of the stream but the first is predicted once. ⟨end⟩ begins a segment: it is
predicted from the document before it, and nothing behind it reads what stands before it. L is ``length``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from so8t_torch.core.errors import DataError
from so8t_torch.data.chat import IGNORED, Encoded, EncodingReport

END = "<|endoftext|>"
"""The token between documents."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer whose token ids are the bytes of the text, and 256 for ``END``."""
    alphabet = {character: byte for byte, character in _byte_characters().items()}
    return _wrapped(Tokenizer(models.BPE(vocab=alphabet, merges=[])))


def pair_tokenizer(documents: Iterable[bytes], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on documents.

    Args:
        documents: UTF-8 text.
        vocabulary: number of tokens, ``END`` among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_decoded(document) for document in documents), trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[int, str]:
    """Return the character by which byte-level tokenizers write each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _decoded(document: bytes) -> str:
    try:
        return document.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end == len(document) and error.reason == "unexpected end of data":
            return document[: error.start].decode("utf-8")
        raise DataError(
            f"data.text: a document is not valid UTF-8 at byte {error.start}; set data.text.tokenizer=bytes, which "
            "reads any."
        ) from error


class PackedRows(Sequence[Encoded]):
    """The rows of packed documents, made when they are asked for.

    Args:
        documents: as bytes.
        tokenizer: one of this module's.
        length: tokens that a row predicts.
        name: of the text, for errors.

    Raises:
        DataError: the documents do not fill one row.
    """

    def __init__(self, documents: Sequence[bytes], tokenizer: PreTrainedTokenizerFast, length: int, name: str) -> None:
        self.length, self.name = length, name
        self.end = int(tokenizer.eos_token_id)
        self.ids = pack(documents, tokenizer)
        self._count = (len(self.ids) - 1) // length
        if self._count < 1:
            raise DataError(
                f"{name}: {len(self.ids):,} tokens do not fill a row of {length:,}; give more text or a smaller "
                "data.text.length."
            )
        sizes = np.zeros(max(tokenizer.vocab_size, self.end + 1), dtype=np.int64)
        for token, index in tokenizer.get_vocab().items():
            sizes[index] = 0 if index == self.end else len(token)
        self.bytes = int(sizes[self.ids[1 : self._count * length + 1]].sum())
        """Bytes of text that the rows predict together."""

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        """Return a row; its first token is predicted by the row before it."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        place = range(self._count)[index]
        ids = tuple(self.ids[place * self.length : (place + 1) * self.length + 1].tolist())
        return Encoded(ids, (IGNORED, *ids[1:]), None, f"{self.name}:row {place + 1}")

    def report(self) -> EncodingReport:
        """Return the counts of the rows."""
        tokens = self._count * self.length
        return EncodingReport(self._count, tokens + self._count, tokens, (), ())


def pack(documents: Sequence[bytes], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the stream of token ids: each document behind an ``END``, and one more at the end."""
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    if len(tokenizer) == 257:
        pieces = [np.frombuffer(document, dtype=np.uint8).astype(np.int32) for document in documents]
    else:
        texts = [_decoded(document) for document in documents]
        encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        pieces = [np.array(each.ids, dtype=np.int32) for each in encoded]
    return np.concatenate([*(part for piece in pieces for part in (end, piece)), end])


@dataclass(frozen=True)
class PackedCollator:
    """Stack packed rows into one batch.

    Args:
        end: id of the token that begins a segment.
    """

    end: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels``, ``attention_mask``, ``position_ids`` and ``segment_ids``, each (B, T).

        Positions count from the beginning of their segment.
        """
        ids = torch.tensor([row.input_ids for row in rows], dtype=torch.int64)
        begins = ids == self.end
        place = torch.arange(ids.shape[1]).expand_as(ids)
        first = torch.where(begins, place, 0).cummax(1).values
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": torch.tensor([row.labels for row in rows], dtype=torch.int64),
            "attention_mask": torch.ones_like(ids),
            "position_ids": place - first,
            "segment_ids": begins.cumsum(1),
        }
        return batch
