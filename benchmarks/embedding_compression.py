"""Claim to be judged: a tensor-train embedding saves 90 % of the memory. What is saved, and what it costs in loss.

Bytes: peaks of the allocator (``benchmarks.allocation``) at the shape of Phi-3.5-mini, for one lookup without
gradients and for one training step with AdamW, tables and optimiser state included, beside ``nn.Embedding`` of the
same dtype. Loss: the same one-layer GRU language model with a tied head is trained for the same steps on the same
batches with either table, at two learning rates of which the better one counts, on the standard library's sources and,
where it is present, on running text from ``../shared/data/text``; the loss is that of held-out text.

Run: python -m benchmarks.embedding_compression
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.allocation import peak_bytes
from benchmarks.harness import RESULTS, environment
from so8t_torch import HolographicTTEmbedding, TensorTrainHead

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the drawing backend has to be chosen first

TEXTS = Path(__file__).parent.parent.parent / "shared" / "data" / "text"
VOCABULARY, TOKENS, WIDTH = 32_064, 4096, 3072
PIECES, HIDDEN, BATCH, LENGTH, STEPS = 4096, 128, 8, 64, 300
RATES = (2e-3, 6e-3)
SOURCES_BYTES = 4_000_000
TRAINS: dict[str, dict[str, int] | None] = {
    "nn.Embedding": None,
    "2 cores, rank 16": {"rank": 16, "num_cores": 2},
    "2 cores, rank 64": {"rank": 64, "num_cores": 2},
    "3 cores, rank 16": {"rank": 16, "num_cores": 3},
}


@dataclass(frozen=True)
class Bytes:
    """Parameters and allocator peaks of one table at the shape of Phi-3.5-mini."""

    table: str
    dtype: str
    parameters: int
    lookup_peak: int
    training_peak: int


@dataclass(frozen=True)
class Learned:
    """Held-out loss of one language model after training."""

    text: str
    table: str
    embedding_parameters: int
    all_parameters: int
    rate: float
    nats_per_token: float
    bits_per_byte: float
    curve: tuple[float, ...]


class LanguageModel(nn.Module):
    """Embedding, one GRU layer and a head that is the transpose of the embedding."""

    def __init__(self, train: dict[str, int] | None) -> None:
        super().__init__()
        self.embedding: nn.Module
        if train is None:
            self.embedding = nn.Embedding(PIECES, HIDDEN)
            nn.init.normal_(self.embedding.weight, std=0.02)
        else:
            self.embedding = HolographicTTEmbedding(PIECES, HIDDEN, phase_encoding=False, **train)
            self.head = TensorTrainHead(self.embedding)
        self.mixer = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss in nats of the targets (B, T) that follow ids (B, T)."""
        hidden, _ = self.mixer(self.embedding(ids))
        if isinstance(self.embedding, nn.Embedding):
            return cross_entropy((hidden @ self.embedding.weight.T).flatten(0, 1), targets.flatten())
        return self.head.loss(hidden, targets)


def table_bytes() -> Iterator[Bytes]:
    """Measure every table in float32 and bfloat16."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        for name, train in TRAINS.items():
            build = _builder(train, dtype)
            count = sum(p.numel() for p in build().parameters())
            peaks = (peak_bytes(partial(use, build, ids)) for use in (_look_up, _step))
            yield Bytes(name, str(dtype).removeprefix("torch."), count, *peaks)


def _builder(train: dict[str, int] | None, dtype: torch.dtype) -> Callable[[], nn.Module]:
    if train is None:
        return lambda: nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
    return lambda: HolographicTTEmbedding(VOCABULARY, WIDTH, phase_encoding=False, dtype=dtype, **train)


@torch.no_grad()
def _look_up(build: Callable[[], nn.Module], ids: Tensor) -> tuple[nn.Module, Tensor]:
    table = build()
    return table, table(ids)


def _step(build: Callable[[], nn.Module], ids: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    table = build()
    optimiser = torch.optim.AdamW(table.parameters(), foreach=False)
    rows = table(ids)
    rows.backward(torch.ones((), dtype=rows.dtype).expand_as(rows))
    optimiser.step()
    return table, optimiser


def corpora() -> Iterator[tuple[str, str, str]]:
    """Yield (name, training text, held-out text); a file of the standard library is on one side as a whole."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[str]] = {True: [], False: []}
    size = 0
    for path in sorted(root.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        held_out = hashlib.sha256(path.name.encode()).digest()[0] < 26
        parts[held_out].append(source)
        size += len(source)
        if size > SOURCES_BYTES:
            break
    yield "standard library", "\n".join(parts[False]), "\n".join(parts[True])
    for name in ("wikitext2_valid", "tinyshakespeare"):
        path = TEXTS / f"{name}.txt"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            yield name, text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def pieces(text: str) -> Tokenizer:
    """Train a byte-level BPE of ``PIECES`` pieces on the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def learn(name: str, text: str, held_out: str) -> Iterator[Learned]:
    """Train the model with each table on one text and yield the better of the learning rates."""
    tokenizer = pieces(text)
    ids, unseen = (torch.tensor(tokenizer.encode(part).ids) for part in (text, held_out))
    bytes_per_token = len(held_out.encode()) / len(unseen)
    for table, train in TRAINS.items():
        runs = [(rate, *_trained(train, rate, ids, unseen)) for rate in RATES]
        rate, model, curve = min(runs, key=lambda run: run[2][-1])
        yield Learned(
            name, table, sum(p.numel() for p in model.embedding.parameters()),
            sum(p.numel() for p in model.parameters()), rate, curve[-1],
            curve[-1] / math.log(2) / bytes_per_token, tuple(curve),
        )  # fmt: skip


def _trained(
    train: dict[str, int] | None, rate: float, ids: Tensor, unseen: Tensor
) -> tuple[LanguageModel, list[float]]:
    torch.manual_seed(0)
    model = LanguageModel(train)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    curve = []
    for step in range(1, STEPS + 1):
        optimiser.zero_grad()
        model(*_batch(ids, generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % (STEPS // 6) == 0:
            curve.append(_held_out_loss(model, unseen))
    return model, curve


def _batch(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=generator)
    windows = ids[starts[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def _held_out_loss(model: LanguageModel, unseen: Tensor) -> float:
    generator = torch.Generator().manual_seed(2)
    return sum(float(model(*_batch(unseen, generator))) for _ in range(8)) / 8


def tables(measured: list[Bytes], learned: list[Learned]) -> Iterator[Table]:
    """Yield the two printed tables."""
    shape = f"{VOCABULARY:,} × {WIDTH}, {TOKENS} tokens"
    first = Table(title=f"Embedding of {shape}: peaks of the allocator, output included")
    for column in ("table", "dtype", "parameters", "share", "lookup MB", "saved", "training step MB", "saved "):
        first.add_column(column, justify="left" if column == "table" else "right")
    dense = {row.dtype: row for row in measured if row.table == "nn.Embedding"}
    for row in measured:
        whole = dense[row.dtype]
        first.add_row(
            row.table, row.dtype, f"{row.parameters:,}", f"{row.parameters / whole.parameters:.2%}",
            f"{row.lookup_peak / 1e6:.1f}", f"{1 - row.lookup_peak / whole.lookup_peak:.1%}",
            f"{row.training_peak / 1e6:.1f}", f"{1 - row.training_peak / whole.training_peak:.1%}",
        )  # fmt: skip
    yield first
    second = Table(title=f"Held-out loss after {STEPS} steps, {PIECES} pieces, width {HIDDEN}, tied head")
    for column in ("text", "table", "of the table", "parameters", "rate", "nats/token", "bits/byte", "worse by"):
        second.add_column(column, justify="left" if column in ("text", "table") else "right")
    for row in learned:
        base = next(r for r in learned if r.text == row.text and r.table == "nn.Embedding")
        second.add_row(
            row.text, row.table, f"{row.embedding_parameters:,}", f"{row.all_parameters:,}", f"{row.rate:g}",
            f"{row.nats_per_token:.3f}", f"{row.bits_per_byte:.3f}", f"{row.nats_per_token - base.nats_per_token:+.3f}",
        )  # fmt: skip
    yield second


def plot(learned: list[Learned], path: Path) -> None:
    """Draw the held-out loss of every table against the step, one panel per text."""
    texts = list(dict.fromkeys(row.text for row in learned))
    figure, axes = plt.subplots(1, len(texts), figsize=(4.2 * len(texts), 3.6), layout="constrained", squeeze=False)
    for panel, text in zip(axes[0], texts, strict=True):
        for row in (r for r in learned if r.text == text):
            steps = [STEPS // 6 * (i + 1) for i in range(len(row.curve))]
            panel.plot(steps, row.curve, marker="o", markersize=3, label=f"{row.table} ({row.embedding_parameters:,})")
        panel.set_title(text)
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel("held-out loss, nats per token")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    """Measure, print both tables, and keep the rows and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    measured = list(table_bytes())
    learned = [row for corpus in corpora() for row in learn(*corpus)]
    output.mkdir(parents=True, exist_ok=True)
    document = {
        "environment": {**environment(), "unit": "bytes; nats per token"},
        "bytes": [asdict(row) for row in measured],
        "loss": [asdict(row) for row in learned],
    }
    (output / "embedding_compression-cpu.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(learned, output / "embedding_compression-cpu.png")
    console = Console(width=150)
    for table in tables(measured, learned):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
