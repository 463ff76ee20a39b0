"""Claim: saving logits costs at most 5 % of a training step at every step, at most 1 % at every 100 steps.

A Phi-3 of width 512 with four layers and a vocabulary of 32,064, gates + LoRA, the chunked loss, 256 tokens, all
supervised: a larger model computes more for each position and saves as much. Ours saves the logits of every step and
waits until the file is on the disk, so that the writer's time counts as well; in training it runs beside the next
steps. The rival trains without saving.

A ratio r at every step is an overhead of 1/r − 1, and of a hundredth of that at every 100 steps: top-k has to reach
0.95, all logits, which are meant for every 100 steps, 0.5. The last case has the size of the quick start: its model is
so small that the search for the largest logits shows.

Run: python -m benchmarks.logits
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from benchmarks.harness import Case, Rival, run
from so8t_torch import SO8TConfig
from so8t_torch.data.chat import IGNORED
from so8t_torch.train.logits.capture import Capture
from so8t_torch.train.logits.record import Mode
from so8t_torch.train.logits.store import Store
from so8t_torch.train.logits.writer import Writer
from so8t_torch.train.loss import LossAtHead
from so8t_torch.train.penalty import ResidualTap
from so8t_torch.train.preconditions import decoder_and_head
from so8t_torch.train.trainer import LAST_STATES

COMPONENT = "logits"
ROOM = "rotation"
LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def cases() -> Iterator[Case]:
    """Yield training steps that save their logits beside steps that do not."""
    large = base(vocabulary=32_064, width=512, layers=4, heads=8)
    yield case("top-k 64, every step", large, "topk", (1, 256), chunk=256, must=0.95)
    yield case("all logits, every step", large, "full", (1, 256), chunk=256, must=0.5)
    small = base(vocabulary=1536, width=128, layers=3, heads=4)
    yield case("top-k 64, every step, quick start", small, "topk", (32, 45), chunk=1024, must=None, answer=20)


def base(*, vocabulary: int, width: int, layers: int, heads: int) -> Phi3ForCausalLM:
    """Return a random Phi-3."""
    torch.manual_seed(0)
    shape = Phi3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=43 * width // 16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Phi3ForCausalLM(shape)


def case(
    name: str,
    model: Phi3ForCausalLM,
    mode: Mode,
    shape: tuple[int, int],
    *,
    chunk: int,
    must: float | None,
    answer: int | None = None,
) -> Case:
    """Return one comparison; of the same weights; the last ``answer`` tokens of a row are learned."""
    tokens = torch.randint(3, model.config.vocab_size, shape)
    labels = tokens.clone()
    labels[:, : shape[1] - (answer or shape[1])] = IGNORED
    rivals = (
        Rival("saving", step(model, tokens, labels, chunk, mode)),
        Rival("not saving", step(model, tokens, labels, chunk, None), must=must),
    )
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    return Case(name, f"{shape[0]}×{shape[1]}, V {vocabulary}, D {width}", "float32", rivals, repeats=11)


def step(model: Phi3ForCausalLM, tokens: Tensor, labels: Tensor, chunk: int, mode: Mode | None) -> Callable[[], object]:
    """Return one optimisation step of a copy of the model, which saves its logits where a mode is given."""
    adapted: PeftModel = get_peft_model(
        copy.deepcopy(model),
        SO8TConfig(target_modules=["o_proj"], layers_to_transform=[1], lora_target_modules=LINEAR, r=16),
    )
    adapted.train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    decoder, head = decoder_and_head(adapted)
    tap, at_head = ResidualTap({LAST_STATES: decoder}), LossAtHead(head, LAST_STATES, chunk=chunk)
    folder = tempfile.TemporaryDirectory()
    store = Store(Path(folder.name), form="safetensors", max_files=3, max_bytes=1 << 30)
    writer, numbers = Writer(store, 100), count(1)

    def one_step() -> None:
        watch = Capture(next(numbers), 0, mode=mode, top_k=64, dtype=torch.float32) if mode else None
        optimiser.zero_grad()
        with tap.open() as states, at_head.open(labels, states, watch) as losses:
            adapted(input_ids=tokens, use_cache=False, logits_to_keep=1)
        losses.result()[0].mean().backward()
        optimiser.step()
        if watch is not None:
            writer.submit(watch)
            totals = writer.close(60.0)
            assert totals.failed + totals.dropped + totals.unfinished == 0, f"{totals}, in {folder.name}"

    return one_step


if __name__ == "__main__":
    sys.exit(run("benchmarks.logits"))
