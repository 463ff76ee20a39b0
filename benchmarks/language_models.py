"""Phase 1 and Phase 2 beside a Llama and a Mamba-2 of transformers.

Four models of equal size learn the same text from the same batches; then the cost of a token is measured against the
length of a row: CPU time of a training step and of decoding, and what the allocator hands out at most.

    python -m benchmarks.language_models [--parts learned costs] [--models NAME …] [--steps N] [--lengths 512 1024 …]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, PreTrainedModel, set_seed

from benchmarks.allocation import peak_bytes
from benchmarks.harness import RESULTS, environment
from so8t_torch.data.text import TextSection, read
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.streaming import cache_bytes, cache_of
from so8t_torch.train.recall import FittingSection, fit

VOCABULARY = 256
WIDTH, LAYERS = 128, 4
PARAMETERS = 1_000_000
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LEARNING_RATES = (1e-3, 3e-3)
"""Every model is trained with each of these; the best counts."""
ROWS, LENGTH = 8, 256
HELD_OUT = 64
DECODED = 16


@dataclass(frozen=True)
class Learned:
    """What a model learned of the text."""

    model: str
    parameters: int
    learning_rate: float
    bits_per_byte: float
    losses: list[float]


@dataclass(frozen=True)
class Cost:
    """What a row of a length costs a model; seconds of CPU time, bytes of the allocator."""

    model: str
    length: int
    train_seconds: float
    train_peak: int
    decode_seconds: float
    carried: int


PARTS = ("learned", "costs")


def phase1(size: int) -> PreTrainedModel:
    """Return a Phase 1 model whose feed-forward parts are ``size`` wide."""
    return create_phase1_model(
        Phase1Config(
            vocab_size=VOCABULARY, d_model=WIDTH, n_layers=LAYERS, ffn_dim=size, dropout=0.0, htt_enabled=False,
            ffn_compression_enabled=False,
        )
    )  # fmt: skip


def phase2(size: int) -> PreTrainedModel:
    """Return a Phase 2 model whose feed-forward parts are ``size`` wide."""
    return create_phase2_model(
        Phase2Config(
            vocab_size=VOCABULARY, d_model=WIDTH, n_layers=LAYERS, num_heads=4, head_dim=32, ffn_dim=size, dropout=0.0
        )
    )


def llama(size: int) -> PreTrainedModel:
    """Return a Llama whose feed-forward parts are ``size`` wide, and whose rows begin as large as ours."""
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=size, max_position_embeddings=2 * max(LENGTHS), initializer_range=WIDTH**-0.5,
        )
    )  # fmt: skip


def mamba(size: int) -> PreTrainedModel:
    """Return a Mamba-2 with states of ``size`` per channel and twice the layers, which have no feed-forward part.

    Chunks of 64 tokens suit a CPU better than the library's 256.
    """
    return AutoModelForCausalLM.from_config(
        Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2 * LAYERS, state_size=size, num_heads=8,
            head_dim=2 * WIDTH // 8, n_groups=1, chunk_size=64,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "Phase 2": phase2, "Phase 1": phase1, "Llama": llama, "Mamba-2": mamba,
}  # fmt: skip


def count(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def matched(make: Callable[[int], PreTrainedModel], target: int = PARAMETERS) -> int:
    """Return the size, a multiple of eight, at which a model's parameters are nearest to the target."""
    low, high = 1, 256
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(8 * middle)) < target else (low, middle)
    return 8 * min((low, high), key=lambda size: abs(count(make(8 * size)) - target))


class Pieces(IterableDataset):
    """Batches of pieces of a text, the same ones for every model."""

    def __init__(self, text: Tensor, seed: int) -> None:
        self.text, self.seed = text, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            rows = pieces(self.text, ROWS, generator)
            yield {"input_ids": rows, "labels": rows}


def pieces(text: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Return rows of tokens from random places."""
    starts = torch.randint(len(text) - LENGTH, (rows, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


def learn(names: Sequence[str], steps: int, seed: int = 0) -> list[Learned]:
    """Train models on the same batches of the standard library's sources."""
    text = read(TextSection(max_bytes=4_000_000))
    train, held = (torch.tensor(bytearray(b"".join(part)), dtype=torch.int64) for part in (text.train, text.held_out))
    judged = pieces(held, HELD_OUT, torch.Generator().manual_seed(seed))
    found = []
    for name in names:
        make = MODELS[name]
        size, tried = matched(make), []
        for rate in LEARNING_RATES:
            set_seed(seed)
            model = make(size)
            losses = fit(model, Pieces(train, seed), FittingSection(steps=steps, learning_rate=rate), seed=seed)
            model.eval()
            with torch.no_grad():
                loss = statistics.fmean(model(input_ids=part, labels=part).loss.item() for part in judged.split(ROWS))
            tried.append(Learned(name, count(model), rate, loss / math.log(2), losses))
        found.append(min(tried, key=lambda one: one.bits_per_byte))
    return found


def train_step(model: PreTrainedModel, rows: Tensor) -> Callable[[], Tensor]:
    """Return forward and backward pass on rows."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        return loss.detach()

    return step


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Return the least CPU time of some calls after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return min(times)


def cost(name: str, length: int) -> Cost:
    """Measure a model at a length."""
    make = MODELS[name]
    set_seed(0)
    model = make(matched(make))
    rows = torch.randint(VOCABULARY, (1, length + DECODED))
    model.train()
    step = train_step(model, rows[:, :length])
    spent = seconds(step, 1 if length > 4096 else 3)
    peak = peak_bytes(step)
    model.eval()
    with torch.no_grad():
        found = model(input_ids=rows[:, :length], use_cache=True)
        begun = time.process_time()
        for place in range(length, length + DECODED):
            found = model(input_ids=rows[:, place : place + 1], use_cache=True, **cache_of(found))
        decoding = time.process_time() - begun
    (carried,) = cache_of(found).values()
    return Cost(name, length, spent, peak, decoding, cache_bytes(carried))


def tables(learned: Sequence[Learned], costs: Sequence[Cost]) -> list[Table]:
    """Return the two tables."""
    first = Table("model", "parameters", "best rate", "held-out bits per byte", title="the same text, the same batches")
    for one in learned:
        first.add_row(one.model, f"{one.parameters:,}", f"{one.learning_rate:g}", f"{one.bits_per_byte:.3f}")
    names = ("model", "tokens", "train, tokens/s", "train, peak MB", "decode, tokens/s", "carried, bytes")
    second = Table(*names, title="cost against length, one row")
    for one in costs:
        second.add_row(
            one.model, f"{one.length:,}", f"{one.length / one.train_seconds:,.0f}",
            f"{one.train_peak / 1e6:,.0f}", f"{DECODED / one.decode_seconds:,.0f}", f"{one.carried:,}",
        )  # fmt: skip
    return [first, second]


def draw(learned: Sequence[Learned], costs: Sequence[Cost], picture: Path) -> None:
    """Draw losses against steps, and costs against lengths."""
    figure = Figure(figsize=(16, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4)
    for one in learned:
        smooth = [statistics.fmean(one.losses[max(0, at - 9) : at + 1]) for at in range(len(one.losses))]
        axes[0].plot([loss / math.log(2) for loss in smooth], label=f"{one.model} {one.bits_per_byte:.2f}")
    axes[0].set(title="training loss, bits per byte", xlabel="step")
    views = (
        ("training, tokens per second", lambda one: one.length / one.train_seconds),
        ("decoding, tokens per second", lambda one: DECODED / one.decode_seconds),
        ("training, peak MB", lambda one: one.train_peak / 1e6),
    )
    for axis, (title, value) in zip(axes[1:], views, strict=True):
        for name in MODELS:
            rows = [one for one in costs if one.model == name]
            axis.plot([one.length for one in rows], [value(one) for one in rows], "o-", label=name)
        axis.set(title=title, xlabel="length", yscale="log")
        axis.set_xscale("log", base=2)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def _others(rows: list[dict[str, object]], names: Sequence[str]) -> list[dict[str, object]]:
    """Return the rows of models that are not measured again."""
    return [row for row in rows if row["model"] not in names]


def main() -> None:
    """Measure what was asked for, put it beside what the output folder has of the other parts, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "language_models-cpu.json"
    document = json.loads(file.read_text()) if file.exists() else {part: [] for part in PARTS}
    document["environment"] = environment()
    if "learned" in arguments.parts:
        document["learned"] = _others(document["learned"], arguments.models)
        document["learned"] += [asdict(one) for one in learn(arguments.models, arguments.steps)]
    if "costs" in arguments.parts:
        pairs = [(name, length) for length in arguments.lengths for name in arguments.models]
        document["costs"] = _others(document["costs"], arguments.models) + [asdict(cost(*pair)) for pair in pairs]
    file.write_text(json.dumps(document, indent=1) + "\n")
    order = list(MODELS)
    learned = sorted((Learned(**row) for row in document["learned"]), key=lambda one: order.index(one.model))
    costs = sorted((Cost(**row) for row in document["costs"]), key=lambda one: (one.length, order.index(one.model)))
    if learned and costs:
        draw(learned, costs, file.with_suffix(".png"))
    for table in tables(learned, costs):
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
