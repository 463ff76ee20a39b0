"""What `so8t train` reaches on text: below an n-gram model of the bytes, and below itself without its memory.

Each document makes up two names and repeats them. A count of six bytes cannot know a name that is new; a model that
remembers what followed the bytes before can.
"""

import random

import pytest

from so8t_torch.core.config import parse_config
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.run import run_training

LETTERS = "abcdefghijklmnop"
CALLS = ("read()", "close()", "flush()", "seek(0)", "write(x)")


def document(rng):
    names = ["".join(rng.choices(LETTERS, k=6)) for _ in range(2)]
    calls = [f"{rng.choice(names)}.{rng.choice(CALLS)}" for _ in range(8)]
    return "\n".join([*(f"{name} = open(x)" for name in names), *calls]) + "\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    for number in range(300):
        (folder / f"{number}.py").write_text(document(rng))
    return folder


def trained(source, folder, *, memory):
    fields = {"d_model": 64, "n_layers": 2, "num_heads": 4, "head_dim": 16, "memory_chunk": 64, "dropout": 0.0}
    tree = {
        "output_dir": str(folder),
        "threads": 1,
        "model": {"kind": "phase2", "fields": {**fields, "hebbian_enabled": memory}},
        "loading": {"dtype": "float32"},
        "data": {"text": {"source": str(source), "length": 160, "held_out_share": 0.1}},
        "training": {"max_steps": 100, "batch_size": 8, "lr": 5e-3, "beta2": 0.95, "warmup": 0.1, "schedule": "cosine"},
        "recording": {"every_steps": 50, "progress": False, "tensorboard": False},
        "checkpoint": {"every_steps": 100},
        "evaluation": {"baselines": memory, "sample_tokens": 0},
    }
    return run_training(parse_config(TrainConfig, tree)).ending


def test_a_model_with_a_memory_beats_counts_of_bytes_and_itself_without(source, tmp_path):
    remembers = trained(source, tmp_path / "memory", memory=True)
    forgets = trained(source, tmp_path / "none", memory=False)
    counted = remembers.baselines["kneser_ney_6_gram"]
    assert remembers.bits_per_byte < counted - 0.5
    assert remembers.bits_per_byte < forgets.bits_per_byte - 0.5
