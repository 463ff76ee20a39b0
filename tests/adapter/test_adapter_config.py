from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import PeftConfig

from so8t_torch import SO8TConfig
from so8t_torch.adapter.config import read_json
from so8t_torch.core.errors import AdapterError, ConfigError

FIXTURES = Path(__file__).parents[3] / "shared" / "data" / "fixtures"


def test_defaults_are_gates_alone_on_every_output_projection() -> None:
    config = SO8TConfig()
    assert config.target_modules == ["o_proj"]
    assert (config.r, config.chart, config.shared, config.train_gates) == (0, "exp", False, "safe")
    assert config.lora_target_modules is None


def test_a_rank_alone_means_low_rank_updates_on_every_linear_layer() -> None:
    assert SO8TConfig(r=4).lora_target_modules == "all-linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chart": "givens"}, "chart to be one of exp, cayley"),
        ({"train_gates": "both"}, "train_gates to be one of safe, cmd, routed"),
        ({"r": -1}, "r >= 0"),
        ({"r": 4, "lora_dropout": 1.0}, "lora_dropout < 1"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules given although r = 0"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern given although r = 0"),
        ({"lora_dropout": 0.1}, "lora_dropout given although r = 0"),
        ({"r": 4, "rank_pattern": {"q_proj": 0}}, "rank of at least 1"),
        ({"target_modules": []}, "nothing to adapt"),
        ({"target_modules": ".*o_proj", "layers_to_transform": [0]}, "layers_to_transform needs a list"),
        ({"layers_pattern": "layers"}, "layers_pattern has no effect"),
        ({"r": 4, "lora_alpha": float("nan")}, "finite numbers, got nan in lora_alpha"),
    ],
)
def test_contradictions_are_refused(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SO8TConfig(**arguments)


def test_the_stored_configuration_returns_unchanged(tmp_path) -> None:
    config = SO8TConfig(
        target_modules=["o_proj"],
        layers_to_transform=[4, 5],
        chart="cayley",
        train_gates="routed",
        r=8,
        lora_target_modules=["qkv_proj"],
        rank_pattern={"qkv_proj": 4},
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    for again in (PeftConfig.from_pretrained(tmp_path), SO8TConfig.from_pretrained(tmp_path)):
        assert isinstance(again, SO8TConfig)
        assert again.to_dict() == config.to_dict()


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path) -> None:
    SO8TConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "train_gate": "cmd"}))
    with pytest.raises(AdapterError, match=r"'train_gate' \(near: 'train_gates'\)"):
        SO8TConfig.from_pretrained(tmp_path)


def test_a_bare_nan_in_json_is_refused_by_name(tmp_path) -> None:
    SO8TConfig(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 16', '"lora_alpha": NaN'))
    with pytest.raises(AdapterError, match="'lora_alpha'"):
        SO8TConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lora_alpha"):
        PeftConfig.from_pretrained(tmp_path)


def test_nan_deep_inside_is_named_with_its_place(tmp_path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"layers": [{"angle": 1.0}, {"angle": -Infinity}]}')
    with pytest.raises(AdapterError, match=r"-Infinity is not a JSON number \(in 'layers\[1\]\.angle'\)"):
        read_json(str(path))


def test_a_real_file_with_nan_is_refused() -> None:
    path = FIXTURES / "alpha_gate_nan.json"
    if not path.is_file():
        pytest.skip(f"needs {path.name} from ../shared/data/fixtures")
    with pytest.raises(AdapterError, match=r"alpha_gate_nan\.json: NaN is not a JSON number \(in 'alpha_gate'\)"):
        read_json(str(path))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"r": "4"}, "expected r to be a whole number, got '4'"),
        ({"r": True}, "expected r to be a whole number"),
        ({"r": 2, "lora_alpha": "x"}, "expected lora_alpha to be a number"),
        ({"r": 2, "rank_pattern": {"o_proj": 2.5}}, "expected rank_pattern to be names with whole numbers"),
        ({"r": 2, "rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"shared": "no"}, "expected shared to be true or false, got 'no'"),
        ({"target_modules": [3]}, "expected target_modules to be a list of names"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"modules_to_save": "lm_head"}, "expected modules_to_save to be a list of names"),
        ({"layers_to_transform": []}, "None means all"),
        ({"layers_to_transform": "0"}, "expected layers_to_transform to be indices"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(arguments, reason) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        SO8TConfig(**arguments)
