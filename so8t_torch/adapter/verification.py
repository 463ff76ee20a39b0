"""Compares two models' logits on prompts, beside the noise that threads and batch size make by themselves.

Δ = max |z' − z|,   KL = max over positions of Σ p log(p / p'),   p = softmax z, in float64
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from so8t_torch.core.errors import AdapterError
from so8t_torch.core.files import read_text
from so8t_torch.core.json_text import parse_object, parse_value

MAX_PROMPT_BYTES = 1 << 24

BUILT_IN_PROMPTS = (
    "The committee met in the morning and postponed its decision.",
    "Explain step by step why the sum of two odd numbers is even.",
    "def area(radius):\n    return",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take?",
    "次の文章を一文で要約してください。会議は午前に開かれ、結論は翌週に持ち越されました。",
    "この装置の電源を切ってもよいですか。理由も述べてください。",
)


@dataclass(frozen=True)
class Difference:
    """How far one set of logits is from another.

    ``max_abs`` in logits, ``kl`` in nats at the worst position, ``argmax_changes`` in positions out of ``positions``.
    """

    max_abs: float
    kl: float
    argmax_changes: int
    positions: int

    def within(self, max_abs: float, kl: float) -> bool:
        """Whether both figures are at most the given ones; NaN never is.

        Args:
            max_abs: bound on the logits.
            kl: bound in nats.
        """
        return self.max_abs <= max_abs and self.kl <= kl


@dataclass(frozen=True)
class Prompts:
    """Token sequences, one (1, tokens) tensor each, and where they came from."""

    token_ids: tuple[Int[Tensor, "1 tokens"], ...]
    source: str


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from JSON (``{"texts": [...]}`` or a list of strings) or from text, one per line.

    Args:
        path: of a UTF-8 file.

    Raises:
        AdapterError: there is no such file, it cannot be read, or it holds no prompts.
    """
    path = Path(path)
    if not path.exists():
        raise AdapterError(f"bake: no prompts at {path}; give a JSON or text file, or leave prompts out.")
    text = read_text(path, AdapterError, limit=MAX_PROMPT_BYTES)
    if path.suffix != ".json":
        found: Any = [line.strip() for line in text.splitlines() if line.strip()]
    elif text.lstrip().startswith("["):
        found = parse_value(text, str(path), AdapterError)
    else:
        found = parse_object(text, str(path), AdapterError).get("texts", [])
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise AdapterError(f'{path}: expected prompts as {{"texts": [strings]}}, a list of strings, or lines of text.')
    return found


def find_tokenizer(*places: str | Path | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the first folder that has one, None if no folder has."""
    for place in places:
        if place is not None and any((Path(place) / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
            return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
    return None


def encode(
    prompts: str | Path | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    max_tokens: int,
) -> Prompts:
    """Turn prompts into token sequences.

    Args:
        prompts: a file, the texts themselves, or None for the built-in ones.
        tokenizer: None if the model has none; then the built-in prompts are replaced by seeded token ids.
        vocabulary: number of ids the model accepts.
        max_tokens: longer prompts are cut.

    Raises:
        AdapterError: texts are given but there is no tokenizer, or a prompt has no tokens.
    """
    if tokenizer is None:
        if prompts is not None:
            raise AdapterError("bake: prompts are given but neither the adapter nor the base folder has a tokenizer.")
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(vocabulary, (1, max_tokens), generator=generator) for _ in BUILT_IN_PROMPTS]
        return Prompts(tuple(drawn), "seeded token ids (no tokenizer found)")
    if isinstance(prompts, (str, Path)):
        texts, source = read_prompts(prompts), str(prompts)
    else:
        texts, source = list(prompts or BUILT_IN_PROMPTS), "given texts" if prompts else "built-in prompts"
    encoded = [tokenizer(text, return_tensors="pt")["input_ids"][:, :max_tokens] for text in texts]
    if any(ids.shape[1] == 0 for ids in encoded):
        raise AdapterError(f"bake: a prompt of {source} has no tokens.")
    return Prompts(tuple(encoded), source)


@torch.no_grad()
def logits(model: nn.Module, prompts: Prompts) -> list[Float[Tensor, "positions vocabulary"]]:
    """Return the model's logits for each prompt, in float32.

    Args:
        model: any transformers model with logits.
        prompts: one forward pass each.
    """
    return [_logits(model, ids) for ids in prompts.token_ids]


def difference(
    reference: list[Float[Tensor, "positions vocabulary"]], other: list[Float[Tensor, "positions vocabulary"]]
) -> Difference:
    """Return how far ``other`` is from ``reference``.

    Args:
        reference: as from ``logits``.
        other: of the same shapes.
    """
    largest, worst, changed, positions = [], [], 0, 0
    for z, w in zip(reference, other, strict=True):
        log_p, log_q = z.double().log_softmax(-1), w.double().log_softmax(-1)
        largest.append((z.double() - w.double()).abs().max())
        worst.append((log_p.exp() * (log_p - log_q)).sum(-1).max())
        changed += int((z.argmax(-1) != w.argmax(-1)).sum())
        positions += len(z)
    return Difference(float(torch.stack(largest).max()), float(torch.stack(worst).max()), changed, positions)


@torch.no_grad()
def noise_floor(
    model: nn.Module, prompts: Prompts, reference: list[Float[Tensor, "positions vocabulary"]]
) -> tuple[float, float]:
    """Return how far the same model's logits move with the number of threads and with the batch size.

    The longest prompt is enough to see it; on a large model each further one costs two forward passes.

    Args:
        model: the one that gave ``reference``.
        prompts: the same ones.
        reference: its logits, one prompt at a time on the present number of threads.

    Returns:
        (threads, batch): max |Δ| with one thread (two if one is in use), and with each prompt beside a copy.
    """
    longest = max(range(len(reference)), key=lambda i: len(reference[i]))
    prompts, reference = Prompts((prompts.token_ids[longest],), prompts.source), [reference[longest]]
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        by_threads = difference(reference, logits(model, prompts))
    finally:
        torch.set_num_threads(threads)
    by_batch = difference(reference, [_logits(model, ids.expand(2, -1)) for ids in prompts.token_ids])
    return by_threads.max_abs, by_batch.max_abs


@contextmanager
def rounded_weights(model: Any, kind: str) -> Iterator[None]:
    """Let every linear layer but the output head compute with its weight rounded, without a second copy of the model.

    Args:
        model: with plain weights.
        kind: ``"bfloat16"``, ``"int8"`` (per row, as bitsandbytes) or ``"nf4"`` (blocks of 64, as bitsandbytes).
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]

    def recompute(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        del output
        return nn.functional.linear(inputs[0], _rounded(module.weight, kind), module.bias)

    handles = [module.register_forward_hook(recompute) for module in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(weight: Tensor, kind: str) -> Tensor:
    if kind == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    from bitsandbytes import functional

    if kind == "int8":
        # bitsandbytes quantises rows from float16
        levels, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(levels, scale).to(weight.dtype)
    levels, state = functional.quantize_4bit(weight.contiguous(), quant_type=kind)
    return functional.dequantize_4bit(levels, state).to(weight.dtype)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(input_ids=ids.to(next(model.parameters()).device))
    if getattr(output, "logits", None) is None:
        raise AdapterError(f"bake: expected a model with logits to verify, got {type(model).__name__}.")
    return output.logits[0].float().reshape(-1, output.logits.shape[-1]).cpu()
