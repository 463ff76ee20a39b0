"""The same seed twice gives identical logs and weights, whatever was drawn before; another seed gives others.

Five entry points: training, the base from scratch, the pieces of the quick start, the scenarios, and the evaluation.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8t_torch.data.scenarios import ScenarioSection, scenario_records
from so8t_torch.safety.evaluation import evaluate_triage, language_loss
from so8t_torch.train import run as running
from so8t_torch.train.demo import held_out_text
from so8t_torch.train.run import run_training
from so8t_torch.train.scratch import LOG, RECORD, ScratchBase, build_base

TIMES = re.compile(r"seconds|second|runtime|time|tokens_per")
TINY = {"hidden_size": 32, "layers": 1, "vocabulary": 600, "tellings": 1, "steps": 3, "batch_size": 8, "text_rows": 2}
SEEDS = (3, 3, 4)


def disturb(number):
    """Draw from every generator that code might use by mistake."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def hexed(value):
    """Return a value with every float in hexadecimal, so that equal text means equal bits."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: hexed(item) for key, item in value.items() if not TIMES.search(key)}
    return [hexed(item) for item in value] if isinstance(value, list) else value


def log(path):
    return [hexed(json.loads(line)) for line in path.read_text().splitlines()]


def digest(path):
    state = load_file(path)
    return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()


def thrice(make):
    """Return what three runs give: a seed, the same seed, another seed; each after other draws."""
    found = []
    for number, seed in enumerate(SEEDS):
        disturb(100 + number)
        found.append(make(number, seed))
    return found


def agree(found):
    first, same, other = found
    assert first == same
    assert first != other


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_training(settings, tmp_path, sentences, monkeypatch):
    monkeypatch.setattr(running, "draw_curves", lambda *_: None)

    def make(number, seed):
        run = run_training(
            settings(
                output_dir=str(tmp_path / str(number)),
                seed=seed,
                adapter={"lora_dropout": 0.2},
                data={"eval": str(sentences)},
                training={"max_steps": 4, "accumulation": 2},
                evaluation={"every_steps": 2},
            )
        )
        return log(run.directory / "metrics.jsonl"), digest(run.directory / "adapter/adapter_model.safetensors")

    first, same, other = thrice(make)
    assert len(first[0]) > 6
    agree((first[0], same[0], other[0]))
    agree((first[1], same[1], other[1]))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    def make(number, seed):
        section = ScratchBase(**TINY, text_characters=50_000, seed=seed)
        return build_base(section, tmp_path_factory.mktemp(f"bases{number}"), threads=1)

    return thrice(make)


def test_a_base_from_scratch(bases):
    agree([log(folder / LOG) for folder in bases])
    agree([digest(folder / "model.safetensors") for folder in bases])
    agree([hexed(json.loads((folder / RECORD).read_text())) for folder in bases])


def test_the_evaluation(bases):
    records = scenario_records(ScenarioSection(held_out_tellings=1), "held_out")[:24]

    def make(number, _seed):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(bases[number]),
            AutoTokenizer.from_pretrained(bases[number]),
        )
        report = evaluate_triage(model, tokenizer, records, batch_size=8, new_tokens=2)
        return [[p.hex() for p in d.probabilities] + [d.generated] for d in report.decisions], report.to_json()

    found = thrice(make)
    agree([one[0] for one in found])
    assert found[0] == found[1]


def test_the_pieces_of_the_quick_start(bases):
    agree(thrice(lambda _number, seed: held_out_text(seed)))
    model, tokenizer = loaded(bases[0])
    agree(thrice(lambda _number, seed: language_loss(model, tokenizer, held_out_text(seed)[:4]).hex()))


PROBE = """
import dataclasses, hashlib, sys
from so8t_torch.data.reading import exercises
from so8t_torch.data.scenarios import ScenarioSection, scenario_records
seed = int(sys.argv[1])
section = ScenarioSection(seed=seed)
rows = [scenario_records(section, part) for part in ("train", "held_out")]
drawn = exercises(section, covers="all", tellings=1, single=0.5, seed=seed)
print(hashlib.sha256(repr((rows, drawn)).encode()).hexdigest())
"""


def test_scenarios_and_exercises_in_processes_of_their_own():
    def make(number, seed):
        surroundings = {**os.environ, "PYTHONHASHSEED": str(number)}
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(seed)], env=surroundings, capture_output=True, text=True, check=True
        )
        return done.stdout

    agree(thrice(make))
