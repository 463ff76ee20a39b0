"""A tiny Phi-3 with a tokenizer in Phi-3's chat format, small conversations, and settings that train on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED = Path(__file__).parents[1] / "../shared/data"

CONTROL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SENTENCES = (
    ("May I open the blue valve?", "ALLOW: the blue valve carries water.", "ALLOW"),
    ("May I open the red valve?", "REFUSE: the red valve carries steam under pressure.", "REFUSE"),
    ("The grey valve has no sign. Open it?", "ESCALATE: ask the shift leader first.", "ESCALATE"),
    ("青い弁を開けてもいいですか。", "ALLOW: 水だけです。", "ALLOW"),
    ("赤い弁を開けてもいいですか。", "REFUSE: 高圧の蒸気です。", "REFUSE"),
    ("Count to three.", "ALLOW: one, two, three.", "ALLOW"),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, rstrip=token != "<|endoftext|>", normalized=False) for token in CONTROL],
    )
    tokenizer.train_from_iterator([text for row in SENTENCES for text in row], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=CONTROL[0], pad_token=CONTROL[0], padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a file of the real data, which is not part of the repository, or skip the test."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs ../shared/data/{name}")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def phi35(shared: Callable[[str], Path]) -> Any:
    """The tokenizer of Phi-3.5-mini."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared("phi35/tokenizer.json").parent)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Phi-3 of three layers, saved with its tokenizer."""
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    special = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Phi3Config(vocab_size=len(tokenizer), **sizes, **heads, **special)
    Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sentences.jsonl"
    rows = [{"question": q, "answer": a, "label": label} for q, a, label in SENTENCES]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(tiny_source: Path, sentences: Path, tmp_path: Path) -> Any:
    """Make settings of a short run; keyword arguments replace single keys of a section."""
    from so8t_torch.core.config import parse_config
    from so8t_torch.train.config import TrainConfig

    def make(**sections: Any) -> TrainConfig:
        tree: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "threads": 1,
            "base": {"kind": "pretrained", "path": str(tiny_source)},
            "loading": {"dtype": "float32"},
            "adapter": {"layers_to_transform": [0, 1], "r": 4, "lora_target_modules": ["qkv_proj", "o_proj"]},
            "data": {"train": str(sentences), "max_length": 96},
            "penalty": {"enabled": True},
            "training": {"max_steps": 4, "batch_size": 2, "lr": 5e-3, "gate_lr": 2e-2, "loss_chunk": 16},
            "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
            "checkpoint": {"every_steps": None},
        }
        for name, value in sections.items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
        return parse_config(TrainConfig, tree)

    return make
