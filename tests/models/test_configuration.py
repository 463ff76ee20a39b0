"""Configurations of the language models: one error for all that is wrong, copies, and the way through files."""

import math

import pytest

from so8t_torch.core.errors import ConfigError
from so8t_torch.models.configuration import Phase1Config, Phase2Config

BOTH = pytest.mark.parametrize("kind", [Phase1Config, Phase2Config])
WRONG = {
    "vocab_size": 0,
    "d_model": 2.5,
    "n_layers": True,
    "n_seq": -1,
    "ffn_dim": 0,
    "dropout": 1.0,
    "layer_norm_eps": math.nan,
    "position_embedding": "rotary",
    "position_scale": 0.0,
    "htt_num_cores": 4,
    "htt_phase_encoding": 1,
    "initializer_range": math.inf,
    "eos_token_id": [3, -1],
    "use_cache": None,
}
WRONG_PHASE_1 = {"ar_ssm_max_rank": 0, "ar_ssm_core": "dense", "ar_ssm_l1_regularization": -1.0}
WRONG_PHASE_2 = {
    "base_decay": 0.0,
    "hebbian_eta": -0.1,
    "hebbian_dt": 0,
    "snr_threshold": 0.0,
    "snr_gamma_boost": 0.5,
    "resonance_energy_threshold": 0.0,
    "num_heads": 0,
    "head_dim": "64",
    "memory_chunk": 100,
    "short_conv": -1,
}


@BOTH
def test_one_error_names_every_wrong_value_and_every_unknown_key(kind):
    wrong = WRONG | (WRONG_PHASE_1 if kind is Phase1Config else WRONG_PHASE_2)
    with pytest.raises(ConfigError) as caught:
        kind(**wrong, n_layer=3, target_vram_gb=8.0)
    lines = str(caught.value).splitlines()[1:]
    assert {line.split()[0] for line in lines} == {*wrong, "n_layer", "target_vram_gb"}
    assert "  d_model must be a whole number, got 2.5" in lines
    assert "  vocab_size must be > 0, got 0" in lines
    assert "  n_layer is no field: did you mean n_layers?" in lines
    assert any(line.startswith("  target_vram_gb is no field: it is what a preset aims at") for line in lines)


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (Phase1Config, {"ar_ssm_max_rank": 2}, "ar_ssm_max_rank must be ≥ ar_ssm_min_rank 4, got 2"),
        (Phase1Config, {"ar_ssm_decays": "none", "ar_ssm_complex": True}, "ar_ssm_complex needs decays"),
        (Phase1Config, {"htt_enabled": False, "htt_complex": True}, "htt_complex needs htt_enabled"),
        (Phase1Config, {"htt_complex": True}, "tie_word_embeddings must be false with complex cores"),
        (Phase1Config, {"htt_complex": True, "tie_word_embeddings": False, "d_model": 33}, "d_model must be even"),
        (Phase1Config, {"htt_rank": 4000}, "htt_rank 4000 and htt_num_cores 2 do not fit d_model 512"),
        (Phase1Config, {"d_model": 509}, "do not fit d_model 509"),
        (Phase1Config, {"ffn_rank": 8, "ffn_compression_enabled": False}, "ffn_rank needs ffn_compression_enabled"),
        (Phase1Config, {"zeta_embedding_trainable": True}, "zeta_embedding_trainable needs position_embedding 'zeta'"),
        (
            Phase1Config,
            {"vocab_size": 9, "htt_rank": 2, "pad_token_id": 9},
            "pad_token_id must be < vocab_size 9, got 9",
        ),
        (Phase2Config, {"vocab_size": 9, "eos_token_id": [8, 9]}, "eos_token_id must be < vocab_size 9, got [8, 9]"),
        (Phase2Config, {"bk_mode": "full"}, "needs is_encoder true"),
        (Phase2Config, {"base_decay": 0.05}, "base_decay must be < 0.05 with adaptive_decay"),
        (Phase2Config, {"embedding": "tt", "htt_num_cores": 3, "htt_rank": 10**6}, "htt_rank 1000000"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_beside_a_wrong_value(kind, fields, told):
    with pytest.raises(ConfigError) as caught:
        kind(**fields, dropout=2.0)
    assert told in str(caught.value)
    assert "dropout must be ≥ 0 and < 1, got 2.0" in str(caught.value)


@BOTH
def test_every_field_has_a_rule_and_every_rule_refuses_something(kind):
    own = {name for cls in kind.__mro__[: kind.__mro__.index(Phase1Config.__mro__[2])] for name in cls.__annotations__}
    own -= {"moved", "attribute_map", "keys_to_ignore_at_inference", "model_type"}
    assert set(kind.settings()) == own
    assert all(rule(object()) is not None for rule in kind.settings().values())


@BOTH
def test_it_goes_through_a_dict_and_a_file(kind, tmp_path):
    config = kind(d_model=64, n_layers=3, eos_token_id=[1, 2], dropout=0.0)
    assert kind.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert kind.from_pretrained(tmp_path, n_layers=5).n_layers == 5
    with pytest.raises(ConfigError, match="n_layers must be > 0, got 0"):
        kind.from_pretrained(tmp_path, n_layers=0)


@BOTH
def test_a_copy_with_changes_leaves_the_first_alone(kind):
    first = kind()
    second = first.replace(hidden_size=64, eos_token_id=[1])
    second.eos_token_id.append(2)
    assert (first.d_model, first.eos_token_id, second.d_model) == (512, None, 64)
    assert second.replace().eos_token_id is not second.eos_token_id
    with pytest.raises(ConfigError, match="num_layer is no field: did you mean n_layers"):
        first.replace(num_layer=2)


@BOTH
def test_it_answers_to_the_names_of_transformers(kind):
    config = kind(hidden_size=96, num_hidden_layers=2)
    assert (config.d_model, config.n_layers, config.hidden_size, config.num_hidden_layers) == (96, 2, 96, 2)
    assert config.layer_types == ["linear_attention"] * 2
    with pytest.raises(ConfigError, match="hidden_size is d_model"):
        kind(hidden_size=96, d_model=64)


def test_a_field_set_later_is_found_by_validate():
    config = Phase2Config()
    config.n_layers = 0
    with pytest.raises(ConfigError, match="n_layers must be > 0, got 0"):
        config.validate()


def test_the_configuration_of_the_other_phase_is_told_as_such():
    with pytest.raises(
        ConfigError, match="expected the configuration of a so8t_phase2 model, got that of 'so8t_phase1'"
    ):
        Phase2Config.from_dict(Phase1Config().to_dict())


@BOTH
def test_rows_begin_at_the_inverse_root_of_the_width(kind):
    assert kind(d_model=64).initializer_range == 0.125
    assert kind(d_model=64).replace(d_model=16).initializer_range == 0.25
    assert kind(d_model=64).replace(n_layers=1).initializer_range == 0.125
    assert kind(d_model=64, initializer_range=0.02).replace(d_model=16).initializer_range == 0.02
    assert kind.from_dict(kind(d_model=64).to_dict()).initializer_range == 0.125
