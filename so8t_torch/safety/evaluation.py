"""Measures a model's triage decisions in two ways, by likelihood and by free generation, without mixing them.

By likelihood, the decision is the label answer d that the model finds likeliest after the prompt x:

    argmax_d Σ_k log p(d_k | x, d_<k),   confidence = softmax over the three sums

By generation, the model writes greedily and the first word is read through the one table of names; an answer that
does not begin with a label is a parse failure with a column of its own. Cost: one forward pass of the prompts (labels
of several tokens add rows), and ``new_tokens`` decoding steps.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from so8t_torch.adapter.quantized import keep_training_on_cpu
from so8t_torch.core.errors import DataError, DomainError
from so8t_torch.data.chat import IGNORED
from so8t_torch.data.labels import Label, leading_label
from so8t_torch.data.records import Record
from so8t_torch.safety.metrics import Metrics, Verdict, calibration_error, measure

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """What the model decided about one record; ``probabilities`` follow the order of ``Label``."""

    record: Record
    truth: Label
    probabilities: tuple[float, float, float]
    generated: str | None

    @property
    def likeliest(self) -> Label:
        """The label of highest likelihood; the more severe one of equals."""
        return max(Label, key=lambda label: (self.probabilities[label.severity], label.severity))

    @property
    def group(self) -> str:
        """The group with which the record is counted; a record without one stands alone."""
        return self.record.group or self.record.source


@dataclass(frozen=True)
class TriageReport:
    """Measures by likelihood and, where answers were generated, by generation, beside the best constant decision."""

    decisions: tuple[Decision, ...]
    likelihood: Metrics
    generation: Metrics | None
    calibration_error: float | None
    majority: tuple[Label, float] | None

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> TriageReport:
        """Measure decisions."""
        generated = [d for d in decisions if d.generated is not None]
        truths = Counter(d.truth for d in decisions)
        most = max(truths.items(), key=lambda item: item[1]) if truths else None
        return cls(
            decisions=tuple(decisions),
            likelihood=measure([Verdict(d.truth, d.likeliest, d.group) for d in decisions]),
            generation=measure([Verdict(d.truth, leading_label(str(d.generated)), d.group) for d in generated])
            if generated
            else None,
            calibration_error=calibration_error((max(d.probabilities), d.likeliest is d.truth) for d in decisions),
            majority=None if most is None else (most[0], most[1] / len(decisions)),
        )

    def restricted(self, keep: Callable[[Record], bool]) -> TriageReport:
        """Return the report of the records for which ``keep`` holds."""
        return TriageReport.of([decision for decision in self.decisions if keep(decision.record)])

    def as_dict(self) -> dict[str, Any]:
        """Return the measures for JSON; undefined ones are ``null`` beside their support."""
        return {
            "records": len(self.decisions),
            "groups": len({decision.group for decision in self.decisions}),
            "majority": None if self.majority is None else {"label": str(self.majority[0]), "share": self.majority[1]},
            "likelihood": self.likelihood.as_dict() | {"calibration_error": self.calibration_error},
            "generation": None if self.generation is None else self.generation.as_dict(),
            "interval": "Wilson, 95 %; by group: one observation per group",
        }

    def to_json(self) -> str:
        """Return ``as_dict`` as JSON text."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> Table:
        """Return the measures as a table for a terminal, unsafe allows first."""
        groups = len({decision.group for decision in self.decisions})
        table = Table(title=f"triage: {len(self.decisions)} records of {groups} groups", caption=self._caption())
        for column in ("measure", "by likelihood", "by generation", "support"):
            table.add_column(column)
        for name, value in vars(self.likelihood).items():
            if name != "confusion":
                other = None if self.generation is None else getattr(self.generation, name)
                table.add_row(name.replace("_", " "), _cell(value), _cell(other), str(getattr(value, "support", "")))
        table.add_row("calibration error", _cell(self.calibration_error), "", "")
        for truth, row in self.likelihood.confusion.items():
            other = {} if self.generation is None else self.generation.confusion[truth]
            table.add_row(f"truth {truth} decided as", _counts(row), _counts(other), str(sum(row.values())))
        return table

    def _caption(self) -> str:
        constant = "" if self.majority is None else f"; always {self.majority[0]}: accuracy {self.majority[1]:.2f}"
        return f"Wilson 95 % intervals with one observation per group{constant}"


def evaluate_triage(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    generate: bool = True,
    new_tokens: int = 8,
) -> TriageReport:
    """Decide every record and measure the decisions.

    Args:
        model: a causal language model, adapted or not; its training mode is restored.
        tokenizer: with a chat template; its padding side does not matter.
        records: conversations with a label; a final assistant turn is not shown to the model.
        batch_size: sequences per forward pass.
        generate: whether to let the model write answers, too.
        new_tokens: longest answer that is written, in tokens.

    Raises:
        DataError: there are no records, or one has no label.
        DomainError: the likelihoods of a record are not a number; a broken model must not count as deciding.
    """
    if not records:
        raise DataError("There is nothing to evaluate: no records were given.")
    truths = [_truth(record) for record in records]
    texts = [prompt_text(tokenizer, record) for record in records]
    with _evaluating(model):
        likelihoods = _label_likelihoods(model, tokenizer, texts, batch_size)
        for record, scores in zip(records, likelihoods, strict=True):
            _check_decidable(record, scores)
        answers = _write(model, tokenizer, texts, batch_size, new_tokens) if generate else [None] * len(texts)
    return TriageReport.of(
        [
            Decision(record, truth, _softmax(scores), answer)
            for record, truth, scores, answer in zip(records, truths, likelihoods, answers, strict=True)
        ]
    )


def language_loss(
    model: PreTrainedModel | Any, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, batch_size: int = 32
) -> float:
    """Return the mean loss per token on running text, in nats.

    Args:
        model: a causal language model; its training mode is restored.
        tokenizer: the model's tokenizer.
        texts: at least one text of two tokens or more.
        batch_size: texts per forward pass.

    Raises:
        DataError: no text has a second token to predict.
        DomainError: the loss is not finite.
    """
    rows = sorted((tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts), key=len)
    total, count = 0.0, sum(max(0, len(row) - 1) for row in rows)
    if not count:
        raise DataError("The language loss needs a text of two tokens or more.")
    with _evaluating(model):
        for start in range(0, len(rows), batch_size):
            ids, mask = _padded(rows[start : start + batch_size], model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
    if not math.isfinite(total):
        raise DomainError(f"language_loss: expected a finite loss, got {total}; the model's weights are damaged.")
    return total / count


def prompt_text(tokenizer: PreTrainedTokenizerFast, record: Record) -> str:
    """Return what the model reads before it answers: the conversation, less its final answer, in the chat template."""
    turns = record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages
    conversation = [turn._asdict() for turn in turns]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))


def _truth(record: Record) -> Label:
    if record.label is None:
        raise DataError(f"{record.source}: a label is needed to evaluate; add one of {', '.join(map(str, Label))}.")
    return record.label


def _check_decidable(record: Record, scores: Sequence[float]) -> None:
    if any(map(math.isnan, scores)) or max(scores) == -math.inf:
        named = ", ".join(f"{label} {score}" for label, score in zip(Label, scores, strict=True))
        raise DomainError(
            f"{record.source or record.group}: expected a log-likelihood for each label, got {named}; the model's "
            "weights are damaged or its dtype overflows."
        )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; 4-bit layers on a CPU stay as they are, see ``keep_training_on_cpu``."""
    keep_training_on_cpu(model)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _label_likelihoods(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[list[float]]:
    """Return for each prompt the log-likelihood of each label."""
    prompts = [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    plans = []
    for text, prompt in zip(texts, prompts, strict=True):
        answered = [tuple(tokenizer(text + label.value, add_special_tokens=False).input_ids) for label in Label]
        plans.append([(row, _shared(prompt, row)) for row in answered])
    # the last token of a label is predicted, not read; labels of one token share a single row
    needed = sorted({row[:-1] for plan in plans for row, _ in plan}, key=lambda row: (len(row), row))
    scores: dict[tuple[Prompt, int, int], float] = {}
    wanted: dict[Prompt, set[tuple[int, int]]] = {}
    for plan in plans:
        for row, start in plan:
            wanted.setdefault(row[:-1], set()).update((k, row[k]) for k in range(start, len(row)))
    for first in range(0, len(needed), batch_size):
        batch = needed[first : first + batch_size]
        asked = [(i, k, token) for i, row in enumerate(batch) for k, token in wanted[row]]
        for (i, k, token), score in zip(asked, _log_probabilities(model, batch, asked), strict=True):
            scores[batch[i], k, token] = score
    return [[math.fsum(scores[row[:-1], k, row[k]] for k in range(start, len(row))) for row, start in p] for p in plans]


def _log_probabilities(model: Any, rows: Sequence[Prompt], asked: Sequence[tuple[int, int, int]]) -> list[float]:
    """Return log p of the token at place k of row i for each (i, k, token), in one transfer."""
    ids, mask = _padded(rows, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    i, k, token = torch.tensor(asked, device=logits.device).unbind(1)
    log_p: list[float] = logits[i, k - 1].float().log_softmax(-1).gather(1, token[:, None])[:, 0].tolist()
    return log_p


def _write(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, new_tokens: int) -> list[str | None]:
    """Return a greedy answer to each prompt, in the order given."""
    prompts = [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[str | None] = [None] * len(prompts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, mask = _padded([prompts[i] for i in chosen], model.device, left=True)
        written = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for i, row in zip(chosen, written[:, ids.shape[1] :], strict=True):
            answers[i] = str(tokenizer.decode(row, skip_special_tokens=True))
    return answers


def _padded(rows: Sequence[Prompt], device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return token ids and their mask; padding is masked, so its id does not matter."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


def _shared(prompt: Prompt, answered: Prompt) -> int:
    """Return how many leading tokens agree; a tokenizer may join the end of the prompt with the answer."""
    return next((i for i, (a, b) in enumerate(zip(prompt, answered, strict=False)) if a != b), len(prompt))


def _softmax(scores: Sequence[float]) -> tuple[float, float, float]:
    allow, escalate, refuse = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    return allow, escalate, refuse


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _counts(row: dict[str, int]) -> str:
    return "  ".join(f"{name.lower()} {count}" for name, count in row.items())
