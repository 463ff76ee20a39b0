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
    begun = time.perf_counter()
    found = model(input_ids=tokens[:, :length], use_cache=True, logits_to_keep=1)
    _wait(model)
    if not cache_of(found):
        raise ConfigError(f"measure_speed: expected a model with a cache, got {type(model).__name__} without one.")
    middle = time.perf_counter()
    for place in range(length, length + decoded):
        found = model(input_ids=tokens[:, place : place + 1], use_cache=True, **cache_of(found))
    _wait(model)
    ended = time.perf_counter()
    carried = sum(map(cache_bytes, cache_of(found).values()))
    return Speed(length, length / (middle - begun), decoded / (ended - middle), carried)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
