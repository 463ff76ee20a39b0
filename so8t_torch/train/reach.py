"""How far a language model reaches back: the gradient of its last loss at the tokens before, and its speed at a length.

r_s = ‖∂loss_last/∂embedding_s‖,   loss_last the cross-entropy of the last token alone
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.models.streaming import cache_bytes, cache_of

__all__ = ["Speed", "gradient_reach", "measure_speed"]


class Speed(NamedTuple):
    """Tokens per second of one row of a length, and what is carried from token to token after it.

    A second is one of CPU time of a single thread, or off the CPU one of wall clock.

    Attributes:
        length: tokens of the row.
        prefill: tokens per second, the row at once.
        decode: tokens per second, one at a time behind the row.
        state: bytes.
    """

    length: int
    prefill: float
    decode: float
    state: int


def gradient_reach(model: PreTrainedModel, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, " t-1"]:
    """Return r of every token before the last one, at place d − 1 that of d tokens before the last.

    The mean over rows is the root of the mean square. The gradient is that of the exact backward pass through all
    tokens; zero says that nothing arrives from there.

    Args:
        model: causal language model; its parameters get no gradient.
        input_ids: rows whose last token is to be told from the others.

    Raises:
        ShapeError: rows with fewer than two tokens.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ShapeError(f"gradient_reach: expected rows (B, T) with T ≥ 2, got {tuple(input_ids.shape)}.")
    input_ids = input_ids.to(model.device)
    embedded = model.get_input_embeddings()(input_ids[:, :-1]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[:, -1]
    loss = cross_entropy(logits.to(accumulation_dtype(logits.dtype)), input_ids[:, -1], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, embedded)
    return gradient.square().sum(-1).mean(0).sqrt().flip(0)


@torch.no_grad()
def measure_speed(model: PreTrainedModel, length: int, *, decoded: int = 16, seed: int = 0) -> Speed:
    """Return the speed of a model behind a row of random tokens, and the size of what it carries.

    The row is taken three times: once to warm up, and then the smaller time of two counts.

    Args:
        model: causal language model in evaluation mode.
        length: tokens of the row, at least 1.
        decoded: tokens that are then taken one at a time, at least 1.
        seed: of the tokens.

    Raises:
        ShapeError: there is no token.
        ConfigError: the model gives no cache.
    """
    if length < 1 or decoded < 1:
        raise ShapeError(f"measure_speed: expected at least one token of each kind, got {length} and {decoded}.")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (1, length + decoded), generator=generator).to(model.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _timed(model, tokens, length)
        first, second = (_timed(model, tokens, length) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    row, rest = (min(pair) for pair in zip(first[:2], second[:2], strict=True))
    return Speed(length, length / row, decoded / rest, second[2])


def _timed(model: PreTrainedModel, tokens: Tensor, length: int) -> tuple[float, float, int]:
    """Return the seconds for the first tokens at once and for the others one by one, and the bytes carried."""
    begun = _seconds(model)
    found = model(input_ids=tokens[:, :length], use_cache=True, logits_to_keep=1)
    if not cache_of(found):
        raise ConfigError(f"measure_speed: expected a model with a cache, got {type(model).__name__} without one.")
    middle = _seconds(model)
    for place in range(length, tokens.shape[1]):
        found = model(input_ids=tokens[:, place : place + 1], use_cache=True, **cache_of(found))
    ended = _seconds(model)
    return middle - begun, ended - middle, sum(map(cache_bytes, cache_of(found).values()))


def _seconds(model: PreTrainedModel) -> float:
    """Return a clock that counts what the model's device has done up to now."""
    if model.device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize(model.device)
    return time.perf_counter()
