import pytest

from so8t_torch.core.config import dump_config, load_config, parse_config
from so8t_torch.core.errors import ConfigError
from so8t_torch.train.config import TrainConfig

LEAST = {
    "output_dir": "runs/x",
    "base": {"kind": "pretrained", "path": "somewhere"},
    "data": {"train": "rows.jsonl"},
    "training": {"max_steps": 3},
}


def test_a_small_file_is_enough_and_survives_a_round_trip(tmp_path):
    config = parse_config(TrainConfig, LEAST)
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(TrainConfig, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("section", "key", "near"),
    [
        ("training", "optimizer", "optimiser"),
        ("adapter", "lora_targets", "lora_target_modules"),
        ("penalty", "weight", "weights"),
        ("base", "pathh", "path"),
        ("data", "trian", "train"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(section, key, near):
    with pytest.raises(ConfigError, match=rf"{section}\..*{key}: unknown key; did you mean '{near}'"):
        parse_config(TrainConfig, {**LEAST, section: {**LEAST.get(section, {}), key: 1}})


CONTRADICTIONS = {
    "lora without rank": ({"adapter": {"lora_target_modules": ["o_proj"]}}, "lora_target_modules needs LoRA"),
    "dropout without rank": ({"adapter": {"lora_dropout": 0.1}}, "lora_dropout needs LoRA"),
    "nothing at all": ({"adapter": {"target_modules": []}}, "neither gates"),
    "routing without gates": (
        {"adapter": {"target_modules": [], "r": 4, "train_gates": "routed"}},
        "train_gates is routed, but",
    ),
    "penalty without gates": (
        {"adapter": {"target_modules": [], "r": 4}, "penalty": {"enabled": True}},
        "penalty.enabled reads the stream after gated layers",
    ),
    "two sources": ({"data": {"train": "a", "scenarios": {}}}, "exactly one of train"),
    "no length": ({"training": {}}, "exactly one of max_steps and epochs"),
    "two lengths": ({"training": {"max_steps": 1, "epochs": 1}}, "exactly one of max_steps and epochs"),
    "phases out of order": ({"penalty": {"boundaries": [0.6, 0.2]}}, "penalty.boundaries"),
    "negative weight": ({"penalty": {"weights": [0.1, -1, 0]}}, "penalty.weights"),
    "a history of noise": ({"recovery": {"history": 9}}, "median and spread of fewer than 10 losses are noise"),
    "a window below the history": ({"recovery": {"window": 19}}, "no loss would ever count as a spike"),
    "recoveries without end": ({"recovery": {"recovery_window": 5}}, "roll back for ever and never stop"),
    "evaluation without data": ({"evaluation": {"every_steps": 5}}, "evaluation needs held-out data"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_said_in_words(name):
    change, reason = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match="settings contradict each other") as caught:
        parse_config(TrainConfig, {**LEAST, **change})
    assert reason in str(caught.value)


def test_contradictions_are_listed_together():
    change = {"adapter": {"target_modules": []}, "training": {}, "penalty": {"enabled": True}}
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, {**LEAST, **change})
    for reason in ("neither gates", "exactly one of max_steps", "penalty.enabled"):
        assert reason in str(caught.value)
