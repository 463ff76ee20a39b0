"""Claim: a training step with gates and LoRA runs at 0.97 or more of the speed of LoRA alone.

A Phi-3 of width 1024 with eight layers, float32, gates behind ``o_proj`` in two of them (the share of the shipped
12 GB configuration, 8 of 32), LoRA r 16 on all linear layers, 512 tokens. Same base, same batch, one process,
interleaved: our gates + LoRA, PEFT LoRA, and PEFT OFT (block size 8) on ``o_proj`` of all layers for contrast.

Run: python -m benchmarks.train_step
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, OFTConfig, PeftConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from benchmarks.harness import Case, Rival, run
from so8t_torch import SO8TConfig

COMPONENT = "train_step"
ROOM = "rotation"
LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TOKENS = 512


def cases() -> Iterator[Case]:
    """Yield the comparison of whole optimisation steps."""
    torch.manual_seed(0)
    shape = Phi3Config(
        vocab_size=4096, hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = Phi3ForCausalLM(shape)
    tokens = torch.randint(3, 4096, (1, TOKENS))
    lora = {"r": 16, "lora_alpha": 32}
    configs: dict[str, PeftConfig] = {
        "so8t gates + LoRA": SO8TConfig(
            target_modules=["o_proj"], layers_to_transform=[2, 5], lora_target_modules=LINEAR, **lora
        ),
        "PEFT LoRA": LoraConfig(target_modules=LINEAR, **lora),
        "PEFT OFT": OFTConfig(target_modules=["o_proj"], oft_block_size=8, r=0),
    }
    rivals = tuple(
        Rival(name, step(base, config, tokens), must=0.97 if name == "PEFT LoRA" else None)
        for name, config in configs.items()
    )
    yield Case("training step", f"1×{TOKENS}", "float32", rivals, repeats=11)


def step(base: torch.nn.Module, config: PeftConfig, tokens: torch.Tensor) -> Callable[[], object]:
    """Return one optimisation step of a copy of the base under an adapter."""
    model = get_peft_model(copy.deepcopy(base), config)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def one_step() -> None:
        optimiser.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimiser.step()

    return one_step


if __name__ == "__main__":
    sys.exit(run("benchmarks.train_step"))
