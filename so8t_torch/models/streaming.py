"""Text from a language model, piece by piece as it is written, and the bytes of state it carries meanwhile.

The library's ``generate`` runs in a thread of its own and hands over what it has written at the ends of words. What it
carries from token to token is a cache: constant in size for recurrent models, growing with the text for attention.
Where the reader stops, by closing the iterator or by an interrupt, the thread stops behind the token under way.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import Cache

from so8t_torch.core.errors import ConfigError
from so8t_torch.models.stored import model_folder, read_model, read_tokenizer


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    ``temperature`` 0 takes the likeliest, ``top_k`` 0 and ``top_p`` 1 draw from all; ``tokens`` is the most that is
    written.
    """

    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no text can be drawn with."""
        wrong = [
            f"{name} {value} ({what})"
            for name, value, holds, what in (
                ("tokens", self.tokens, self.tokens >= 1, "at least 1"),
                ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
                ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            )
            if not holds
        ]
        if wrong:
            raise ConfigError(f"No text can be drawn with {', '.join(wrong)}.")

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        length = {"max_new_tokens": self.tokens}
        if self.temperature == 0:
            return length | {"do_sample": False}
        return length | {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


class Writing:
    """One text while it is written; iterate over it for the pieces.

    Whoever leaves the iteration early closes the iterator (``contextlib.closing``), which ends the writing.

    Args:
        model: a language model; it is put into evaluation mode, and every part of it back at the end.
        tokenizer: of the model.
        prompt: what the text begins with; it is the first of what is handed over.
        drawing: how tokens are drawn; other random numbers are left alone.

    At the end ``tokens`` were written in ``seconds``, and ``state_bytes`` were carried from the last one.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str = "", drawing: Drawing | None = None
    ) -> None:
        self._model, self._tokenizer, self._drawing = model, tokenizer, drawing or Drawing()
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ConfigError(
                f"The prompt {prompt!a:.200} is no text in UTF-8: expected characters, got bytes of none."
            )
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = [*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise ConfigError("The tokenizer has no token that begins a text: give a prompt.")
        self._ids = torch.tensor([ids], device=next(model.parameters()).device)
        self.tokens, self.state_bytes, self.seconds = 0, 0, 0.0

    def __iter__(self) -> Generator[str, None, None]:
        """Write; what goes wrong in the writing thread is raised here."""
        streamer, left = TextIteratorStreamer(self._tokenizer, skip_special_tokens=True), Event()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self._write, streamer, left)
            try:
                yield from streamer
            finally:
                left.set()
            done.result()

    def _write(self, streamer: TextIteratorStreamer, left: Event) -> None:
        modes, started = {part: part.training for part in self._model.modules()}, time.monotonic()
        self._model.eval()
        try:
            with torch.random.fork_rng(devices=[self._ids.device] if self._ids.device.type == "cuda" else []):
                torch.manual_seed(self._drawing.seed)
                written = self._model.generate(
                    self._ids,
                    attention_mask=torch.ones_like(self._ids),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Left(left)]),
                    use_cache=True,
                    return_dict_in_generate=True,
                    **self._drawing.options(),
                )
            self.tokens = written.sequences.shape[1] - self._ids.shape[1]
            self.state_bytes = sum(map(cache_bytes, cache_of(written).values()))
        finally:
            # the iterator would wait for ever for an end that an error left out
            streamer.end()
            _restore(modes)
            self.seconds = time.monotonic() - started

    def summary(self) -> str:
        """Return length, speed and state in a line."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        size = f"state of {self.state_bytes:,} bytes behind {self._ids.shape[1] + self.tokens:,} tokens"
        return f"{self.tokens} tokens, {rate:.1f} a second; {size}"


class _Left(StoppingCriteria):
    """Ends all rows once nobody reads them any more."""

    def __init__(self, left: Event) -> None:
        self._left = left

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._left.is_set(), device=input_ids.device)


def _restore(modes: dict[nn.Module, bool]) -> None:
    """Put modules back into training or evaluation mode, each for itself."""
    for part, training in modes.items():
        part.training = training


def cache_of(found: Any) -> dict[str, Cache]:
    """Return what a model wants back with the next token, under the name of the argument; empty where it keeps nothing.

    Args:
        found: what a call of the model, or ``generate``, returned.
    """
    names = ("past_key_values", "cache_params")
    return {name: getattr(found, name) for name in names if getattr(found, name, None) is not None}


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all tensors in a cache of the library.

    Args:
        cache: of any kind, or ``None``.
    """
    held = {id(tensor): tensor for layer in getattr(cache, "layers", ()) for tensor in _tensors(vars(layer))}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Read a model that was trained whole, with its tokenizer.

    Args:
        folder: of the run, or of the model itself.

    Raises:
        ConfigError: there is no such model; the text says what is missing.
        CheckpointError: its weights are damaged, incomplete or not finite.
    """
    path = model_folder(folder)
    model = read_model(path)
    return model.eval(), read_tokenizer(path)
