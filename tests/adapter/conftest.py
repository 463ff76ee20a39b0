"""Tiny random models of four families, saved bases, and adapters moved away from zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
WORDS = ["the", "gate", "turns", "eight", "channels", "at", "a", "time", "and", "no", "more", "than", "that"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_model() -> Callable[[str], nn.Module]:
    def make(family: str = "phi3") -> nn.Module:
        torch.manual_seed(0)
        match family:
            case "phi3":
                return Phi3ForCausalLM(Phi3Config(**DECODER))
            case "llama":
                return LlamaForCausalLM(LlamaConfig(**DECODER))
            case "qwen2":
                return Qwen2ForCausalLM(Qwen2Config(**DECODER))
            case "bert":
                return BertForMaskedLM(BertConfig(**SIZES))
        raise AssertionError(family)

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi-3 checkpoint in float32 with a word-level tokenizer beside it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(**DECODER)).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def load_base(saved_base: Path) -> Callable[..., nn.Module]:
    def load(quantization: str = "none", **arguments: Any) -> nn.Module:
        if quantization == "nf4":
            arguments["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        elif quantization == "int8":
            arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        return AutoModelForCausalLM.from_pretrained(saved_base, **arguments)

    return load


@pytest.fixture
def shake() -> Callable[..., nn.Module]:
    """Give every adapter weight a value away from its start; the same seed gives the same values."""

    def move(model: nn.Module, seed: int = 1, gates: float = 0.3, low_rank: float = 0.1) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "so8t_" in name:
                    size = low_rank if "lora" in name else gates
                    parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        return model

    return move


@pytest.fixture
def adapter_gradients(ids: Tensor) -> Callable[..., dict[str, Tensor]]:
    """Language-model loss on fixed ids, backward, and the gradients of the trainable parameters."""

    def measure(model: nn.Module, rows: slice = slice(None)) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids[rows], labels=ids[rows]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    return measure
