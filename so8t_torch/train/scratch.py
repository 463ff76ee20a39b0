"""Builds a small Phi-3 that can read, for machines that download no weights.

The model is the real class with its own byte-level BPE tokenizer and Phi-3's chat format. It is trained on a mixture,

    L = L_notes + w L_text

of reading exercises (telling → facts, no label and no rule; loss on the notes) and running text (documentation
strings, loss everywhere), then scored on exercises it did not train on. The folder is reused while its settings, the
library's corpus and the versions that make it are the same; a folder without its record is an interrupted build.
Cost: 6 N FLOP per token for N parameters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import transformers
from pydantic import Field
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from so8t_torch.core.config import Section
from so8t_torch.data.docstrings import documentation_strings
from so8t_torch.data.reading import Exercise, exercises
from so8t_torch.data.scenarios import ScenarioSection
from so8t_torch.data.wording import GLOSSARY, QUESTION

PLAIN_CONTROLS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
TURN_CONTROLS = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
"""As in Phi-3, a turn's token swallows the line break behind it."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['content'] %}{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
IGNORED = -100
TOKENIZER_TEXTS = 3000
SCORED = 120
RECORD = "reading.json"
LOG = "base.jsonl"
LOG_EVERY = 20


class ScratchBase(Section):
    """Size, data and schedule of the base that is built on this machine."""

    kind: Literal["scratch"] = "scratch"
    hidden_size: int = Field(default=128, ge=32, multiple_of=32)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)
    vocabulary: int = Field(default=1536, ge=400)
    scenarios: ScenarioSection = ScenarioSection()
    reads: Literal["seen", "all"] = Field(default="seen", description="Leave held-out states and frames out?")
    tellings: int = Field(default=24, ge=1, description="Exercises for each state and frame.")
    single: float = Field(default=0.5, ge=0, le=1, description="Share of exercises that ask for one fact.")
    steps: int = Field(default=450, ge=1)
    batch_size: int = Field(default=32, ge=1, description="Exercises per step.")
    text_rows: int = Field(default=4, ge=1, description="Rows of running text per step.")
    text_weight: float = Field(default=0.5, ge=0)
    text_characters: int = Field(default=4_000_000, ge=10_000, description="Of running text, at most.")
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Row:
    """A tokenised exercise: prompt and notes, and where the notes begin."""

    ids: tuple[int, ...]
    start: int


def build_base(section: ScratchBase, directory: Path, *, threads: int) -> Path:
    """Build the base, or return the one already built from the same settings.

    Args:
        section: size, data and schedule.
        directory: parent folder; the base goes into a folder named by the hash of what determines it.
        threads: CPU threads.

    Returns:
        a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` read, with ``base.jsonl`` (training log) and
        ``reading.json`` (settings, reading scores, seconds).
    """
    torch.set_num_threads(threads)
    text = _beginning(documentation_strings("train"), section.text_characters)
    folder = directory / _digest(section, text)
    if (folder / RECORD).is_file():
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    started, processor = time.monotonic(), time.process_time()
    drawn = exercises(
        section.scenarios, covers=section.reads, tellings=section.tellings, single=section.single, seed=section.seed
    )
    tokenizer = build_tokenizer(section, drawn, text)
    torch.manual_seed(section.seed)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = Phi3ForCausalLM(architecture(section, len(tokenizer), **ids))
    _teach(model, section, [encode(tokenizer, e) for e in drawn], _stream(tokenizer, text), folder / LOG)
    record = {
        "settings": section.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "exercises": len(drawn),
        "reading": reading_scores(model, tokenizer, section),
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "threads": threads,
    }
    # generation stops where a turn ends, as in Phi-3
    stops = ["<|end|>", "<|assistant|>", "<|endoftext|>"]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stops)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # written last: a folder with a record is complete
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def build_tokenizer(section: ScratchBase, drawn: Sequence[Exercise], text: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on exercises, questions, the glossary and running text.

    Args:
        section: gives the vocabulary.
        drawn: reading exercises, English and Japanese.
        text: running text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    questions = [*QUESTION.values(), *GLOSSARY] * max(1, len(drawn) // 100)
    corpus = [*text[:TOKENIZER_TEXTS], *(part for e in drawn for part in (e.request, e.notes)), *questions]
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocabulary,
        special_tokens=[
            *(AddedToken(token, special=True, normalized=False) for token in PLAIN_CONTROLS),
            *(AddedToken(token, special=True, normalized=False, rstrip=True) for token in TURN_CONTROLS),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def encode(tokenizer: PreTrainedTokenizerFast, exercise: Exercise) -> Row:
    """Tokenise an exercise as a chat of one turn and its answer."""
    turns = [{"role": "user", "content": exercise.request}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    head = tokenizer(prompt, add_special_tokens=False).input_ids
    return Row((*head, *tokenizer(f"{exercise.notes}<|end|>\n", add_special_tokens=False).input_ids), len(head))


@torch.inference_mode()
def reading_scores(
    model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, section: ScratchBase
) -> dict[str, float]:
    """Return the share of fresh exercises whose notes are all likeliest, token by token, by novelty.

    Args:
        model: the base; left in evaluation mode.
        tokenizer: its tokenizer.
        section: what is held out.
    """
    drawn = exercises(section.scenarios, covers="all", tellings=1, single=0.0, seed=section.seed + 1)
    model.eval()
    scores: dict[str, float] = {}
    for novelty in dict.fromkeys(e.novelty for e in drawn):
        chosen = [e for e in drawn if e.novelty == novelty]
        rows = [encode(tokenizer, e) for e in random.Random(section.seed).sample(chosen, min(SCORED, len(chosen)))]
        ids, labels = _batch(rows)
        likeliest = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        right = (likeliest == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
        scores[novelty] = right.all(1).double().mean().item()
    return scores


def _teach(model: Phi3ForCausalLM, section: ScratchBase, rows: list[Row], stream: Tensor, log: Path) -> None:
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=section.lr, betas=(0.9, 0.95), weight_decay=section.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, section.steps))
    model.train()
    with Progress(transient=True) as progress, log.open("w", encoding="utf-8") as lines:
        task = progress.add_task("teaching the base to read", total=section.steps)
        for step, (exercise, text) in enumerate(_batches(section, rows, stream), start=1):
            notes_loss = model(input_ids=exercise[0], labels=exercise[1], use_cache=False).loss
            text_loss = model(input_ids=text, labels=text, use_cache=False).loss
            (notes_loss + section.text_weight * text_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            progress.advance(task)
            if step % LOG_EVERY == 0 or step == section.steps:
                row = {"step": step, "notes_loss": notes_loss.item(), "text_loss": text_loss.item()}
                lines.write(json.dumps(row) + "\n")


def _batches(section: ScratchBase, rows: list[Row], stream: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    source = random.Random(f"batches {section.seed}")
    for _ in range(section.steps):
        exercise = _batch(source.choices(rows, k=section.batch_size))
        width = exercise[0].shape[1]
        starts = [source.randrange(len(stream) - width) for _ in range(section.text_rows)]
        yield exercise, torch.stack([stream[start : start + width] for start in starts])


def _batch(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return ids and labels, padded on the right; padding follows every token, so causality hides it."""
    ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
    return ids, labels


def _stream(tokenizer: PreTrainedTokenizerFast, text: Sequence[str]) -> Tensor:
    """Return all running text as one row of tokens, with the glossary between the texts."""
    mixed = [part for i, string in enumerate(text) for part in (string, GLOSSARY[i % len(GLOSSARY)])]
    end = tokenizer.eos_token_id
    return torch.tensor([i for ids in tokenizer(mixed, add_special_tokens=False).input_ids for i in (*ids, end)])


def _beginning(texts: Sequence[str], characters: int) -> list[str]:
    """Return the first texts that fit into so many characters."""
    ends = itertools.accumulate(len(text) for text in texts)
    return [text for text, end in zip(texts, ends, strict=True) if end <= characters]


def _share(step: int, steps: int) -> float:
    """Return the learning rate's share: a short rise, then a cosine to one twentieth."""
    return min(1.0, (step + 1) / 30) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


def architecture(section: ScratchBase, vocabulary: int, **token_ids: int) -> Phi3Config:
    """Return the model's configuration.

    Args:
        section: sizes.
        vocabulary: number of tokens the tokenizer really has.
        **token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
    """
    return Phi3Config(
        vocab_size=vocabulary,
        hidden_size=section.hidden_size,
        intermediate_size=2 * section.hidden_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.heads,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        tie_word_embeddings=False,
        **token_ids,
    )


def _digest(section: ScratchBase, text: Sequence[str]) -> str:
    versions = [platform.python_version(), torch.__version__, transformers.__version__, tokenizers.__version__]
    # how often the triage data tells a state does not change the base
    settings = section.model_dump(mode="json", exclude={"scenarios": {"train_tellings", "held_out_tellings"}})
    words: list[Any] = [settings, versions, CHAT_TEMPLATE]
    digest = hashlib.sha256(json.dumps(words).encode())
    for request in exercises(section.scenarios, covers="all", tellings=1, single=0.0, seed=0):
        digest.update(f"{request.request}{request.notes}".encode())
    for string in text:
        digest.update(string.encode())
    return digest.hexdigest()[:12]
