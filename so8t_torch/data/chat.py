"""Which tokens of a conversation are learned: the assistant's turns, and nothing else.

A chat template is rendered with generation marks around each assistant turn, so the renderer reports the character
span [s, e) of every turn; a token whose text begins at offset o is supervised ⇔ s ≤ o < e. For Phi-3 the span is
the answer and the closing ``<|end|>``: the model learns to stop, and learns neither prompt nor padding.

Shipped templates rarely carry marks. ``marked_template`` adds them to a template of the Phi-3 family by rewriting its
one assistant expression; the rendered text, and so the tokens, stay the same. Spans and offsets are compared here,
not by the tokenizer's own mask: where an answer starts with a blank, ``<|assistant|>`` swallows that blank, and the
library's mask would supervise the role token too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from so8t_torch.core.errors import ConfigError, DataError
from so8t_torch.data.labels import Label
from so8t_torch.data.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""Label of a position that is not learned (the ignore index of cross-entropy)."""

TooLong = Literal["truncate", "drop", "error"]

_MARK = re.compile(r"\{%-?\s*generation\b")
_PHI3_ANSWER = re.compile(
    r"\{\{-?\s*'(?P<open><\|assistant\|>(?:\n|\\n))'\s*\+\s*message\['content'\]\s*\+\s*"
    r"'(?P<close><\|end\|>(?:\n|\\n))'\s*-?\}\}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation and, for each, the id to predict there or ``IGNORED``."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    label: Label | None
    source: str

    @property
    def supervised(self) -> int:
        """Number of learned tokens."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class EncodingReport:
    """What became of the records: counts, and the sources of truncated and dropped ones."""

    rows: int
    tokens: int
    supervised: int
    truncated: tuple[str, ...]
    dropped: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, and the sources of at most ten truncated and ten dropped records."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "truncated": len(self.truncated),
            "truncated_first": list(self.truncated[:10]),
            "dropped": len(self.dropped),
            "dropped_first": list(self.dropped[:10]),
        }


def marked_template(template: str | None) -> str:
    """Return the chat template with generation marks around each assistant turn, rendering to the same text.

    Args:
        template: Jinja source of the tokenizer's chat template.

    Raises:
        ConfigError: no template, or one without marks whose assistant expression is not Phi-3's.
    """
    if not template:
        raise ConfigError("The tokenizer has no chat template; set data.template to a marked Jinja file.")
    if _MARK.search(template):
        return template
    marked, count = _PHI3_ANSWER.subn(
        lambda m: (
            "{{'" + m["open"] + "'}}{% generation %}{{message['content'] + '" + m["close"] + "'}}{% endgeneration %}"
        ),
        template,
    )
    if count != 1:
        raise ConfigError(
            "The tokenizer's chat template has no generation marks and is not of the Phi-3 family; set data.template "
            "to a Jinja file that wraps each assistant turn in {% generation %} … {% endgeneration %}."
        )
    return marked


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    template: str | None = None,
    too_long: TooLong = "truncate",
) -> tuple[list[Encoded], EncodingReport]:
    """Turn conversations into token ids with the assistant's turns supervised.

    Args:
        records: conversations that end with an assistant turn.
        tokenizer: a fast tokenizer (offsets are needed).
        max_length: longest sequence in tokens.
        template: marked Jinja source; ``None`` marks the tokenizer's own.
        too_long: cut the end off, leave the record out, or stop, where a record is longer than ``max_length``.

    Raises:
        DataError: a text contains a control token, a record has no supervised token left, is too long under
            ``"error"``, or no record remains; the message begins with the record's source.
    """
    template = marked_template(template or tokenizer.chat_template)
    rendered = [_render(record, tokenizer, template) for record in records]
    texts = [text for text, _ in rendered]
    tokens = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True) if texts else {}
    encoded: list[Encoded] = []
    truncated: list[str] = []
    dropped: list[str] = []
    for i, record in enumerate(records):
        row = _supervise(record, tokens["input_ids"][i], tokens["offset_mapping"][i], rendered[i][1])
        if len(row.input_ids) > max_length:
            if too_long == "error":
                raise DataError(f"{row.source}: {len(row.input_ids)} tokens, more than data.max_length={max_length}.")
            (truncated if too_long == "truncate" else dropped).append(row.source)
            if too_long == "drop":
                continue
            row = Encoded(row.input_ids[:max_length], row.labels[:max_length], row.label, row.source)
        if not row.supervised:
            raise DataError(
                f"{row.source}: no token of an answer is left within data.max_length={max_length} tokens; raise it, or "
                "set data.too_long to drop."
            )
        encoded.append(row)
    if not encoded:
        raise DataError("No record is left to learn from; check data.max_length and the files named in data.")
    return encoded, _report(encoded, truncated, dropped)


def _report(rows: Iterable[Encoded], truncated: list[str], dropped: list[str]) -> EncodingReport:
    lengths = [(len(row.input_ids), row.supervised) for row in rows]
    return EncodingReport(
        rows=len(lengths),
        tokens=sum(length for length, _ in lengths),
        supervised=sum(supervised for _, supervised in lengths),
        truncated=tuple(truncated),
        dropped=tuple(dropped),
    )


def _render(record: Record, tokenizer: PreTrainedTokenizerFast, template: str) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    controls = [token for token in tokenizer.get_added_vocab() if any(token in m.content for m in record.messages)]
    if controls:
        raise DataError(f"{record.source}: a text contains the control token {controls[0]!r}; remove it.")
    conversation = [message._asdict() for message in record.messages]
    texts, spans = render_jinja_template(
        conversations=[conversation],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]


def _supervise(
    record: Record, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Encoded:
    learned = [any(start <= offset[0] < end for start, end in spans) for offset in offsets]
    # The first position has no predecessor that could predict it.
    labels = [token if i and wanted else IGNORED for i, (token, wanted) in enumerate(zip(ids, learned, strict=True))]
    return Encoded(tuple(ids), tuple(labels), record.label, record.source)


def show_supervision(row: Encoded, tokenizer: PreTrainedTokenizerFast, opening: str = "⟦", closing: str = "⟧") -> str:
    """Return the decoded conversation with every learned stretch between ``opening`` and ``closing``."""
    pieces: list[str] = []
    start = 0
    while start < len(row.labels):
        learned = row.labels[start] != IGNORED
        end = start
        while end < len(row.labels) and (row.labels[end] != IGNORED) == learned:
            end += 1
        text = str(tokenizer.decode(list(row.input_ids[start:end])))
        pieces.append(f"{opening}{text}{closing}" if learned else text)
        start = end
    return "".join(pieces)
