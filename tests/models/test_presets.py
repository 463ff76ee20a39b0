"""Presets are files, fresh at each call; what the comparison says is computed."""

import pytest
import torch

from so8t_torch.core.errors import ConfigError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.memory import skeleton
from so8t_torch.models.presets import (
    for_hardware,
    get_phase2_preset,
    get_preset,
    list_phase2_presets,
    list_presets,
    preset_comparison,
    print_preset_comparison,
    read_preset,
)

TABLE = {
    # name: most and least rank, weight of the gates, TT rank, computed twice, target in GB
    "max_efficiency": (16, 2, 0.01, 8, True, 6),
    "8gb": (16, 4, 0.01, 8, True, 8),
    "inference": (32, 4, 0.001, 16, False, 8),
    "10gb": (32, 4, 0.001, 16, True, 10),
    "24gb": (64, 8, 0.0001, 32, False, 24),
    "max_quality": (128, 16, 0.0001, 64, False, 40),
}
ALIASES = {
    "memory_oriented": "8gb",
    "balanced": "10gb",
    "speed_oriented": "24gb",
    "quality": "max_quality",
    "efficiency": "max_efficiency",
}


def test_the_six_presets_of_phase_1_are_those_of_the_table():
    assert list(list_presets()) == list(TABLE)
    for name, (most, least, weight, rank, again, target) in TABLE.items():
        config, data = get_preset(name), read_preset("phase1", name)
        found = config.ar_ssm_max_rank, config.ar_ssm_min_rank, config.ar_ssm_l1_regularization, config.htt_rank
        assert found == (most, least, weight, rank)
        assert (data.gradient_checkpointing, config.checkpoint_ar_ssm, data.targets.vram_gb) == (again, again, target)
        assert config.lns_enabled == (name == "inference")


def test_aliases_name_the_same_presets():
    assert {alias: get_preset(alias).to_dict() for alias in ALIASES} == {
        alias: get_preset(name).to_dict() for alias, name in ALIASES.items()
    }


def test_each_call_returns_a_fresh_configuration():
    first = get_preset("8gb")
    first.htt_rank = 99
    assert get_preset("8gb").htt_rank == 8


def test_an_unknown_preset_is_refused_with_all_that_there_are():
    with pytest.raises(ConfigError, match="no phase1 preset '12gb'") as caught:
        get_preset("12gb")
    assert all(name in str(caught.value) for name in (*TABLE, *ALIASES))
    with pytest.raises(ConfigError, match="expected one of small, base, large; did you mean 'large'"):
        get_phase2_preset("larg")


@pytest.mark.parametrize(
    ("vram", "rank", "least"),
    [(6, 16, 2), (8, 16, 4), (10, 32, 4), (23.9, 32, 4), (24, 64, 8), (39.9, 64, 8), (40, 128, 16), (80, 128, 16)],
)
def test_hardware_gets_the_highest_target_it_has_room_for(vram, rank, least):
    config = for_hardware(vram)
    assert (config.ar_ssm_max_rank, config.ar_ssm_min_rank) == (rank, least)


@pytest.mark.parametrize("vram", [5.9, 0, -1, float("nan")])
def test_hardware_below_all_targets_is_refused(vram):
    with pytest.raises(ConfigError, match="expected vram_gb ≥ 6"):
        for_hardware(vram)


@pytest.mark.parametrize("vram", ["8", None, True])
def test_hardware_is_a_number(vram):
    with pytest.raises(ConfigError, match="vram_gb as a number of GB, got"):
        for_hardware(vram)


def test_there_are_two_phases_to_compare():
    with pytest.raises(ConfigError, match="presets of 'phase1' or 'phase2', got 'phase3'"):
        print_preset_comparison("phase3")


@pytest.mark.parametrize(("name", "millions"), [("small", 29), ("base", 71), ("large", 256)])
def test_phase_2_presets_have_the_stated_parameters(name, millions):
    config = get_phase2_preset(name)
    assert list(list_phase2_presets()) == ["small", "base", "large"]
    assert (config.head_dim, config.ffn_dim, config.vocab_size) == (64, 4 * config.d_model, 50257)
    assert sum(p.numel() for p in skeleton(config).parameters()) == pytest.approx(millions * 1e6, rel=0.03)


def test_the_comparison_computes_compression_and_parameters(capsys):
    table = preset_comparison()
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["preset"] == list(TABLE)
    for place, name in enumerate(TABLE):
        config = get_preset(name)
        train = config.htt_rank * (225 * 16 + 224 * 32) + config.htt_rank
        assert columns["compression"][place] == f"{1 - train / (50257 * 512):.1%}"
        millions = sum(p.numel() for p in skeleton(config).parameters()) / 1e6
        assert columns["parameters"][place] == f"{millions:.1f} M"
    print_preset_comparison()
    printed = capsys.readouterr().out
    for header in ("preset", "compression", "parameters", "training memory"):
        assert all(cell in printed for cell in columns[header])


def test_a_model_comes_from_a_preset_a_configuration_or_fields():
    small = {"vocab_size": 64, "d_model": 16, "n_layers": 1}
    one = create_phase1_model("8gb", **small, seed=3)
    assert (one.config.htt_rank, one.config.d_model, one.is_gradient_checkpointing) == (8, 16, True)
    assert not create_phase1_model(preset="24gb", **small).is_gradient_checkpointing
    config = get_phase2_preset("small")
    two = create_phase2_model(config, **small, num_heads=2, head_dim=4, ffn_dim=8)
    assert (two.config.vocab_size, config.vocab_size, config.d_model) == (64, 50257, 256)
    assert create_phase2_model(**small, num_heads=1, head_dim=4).config.hebbian_eta == config.hebbian_eta


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    import torch

    small = {"vocab_size": 64, "d_model": 16, "n_layers": 1}
    torch.manual_seed(11)
    expected = torch.randn(3)
    torch.manual_seed(11)
    one, two, three = (create_phase1_model(**small, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.randn(3), expected)
    weights = [list(model.parameters()) for model in (one, two, three)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"config": "small", "preset": "base"}, "got both 'small' and 'base'"),
        ({"config": "medium"}, "no phase2 preset 'medium'"),
        ({"config": get_preset("8gb")}, "expected a Phase2Config or the name of a preset, got a Phase1Config"),
        ({"n_layer": 3}, "n_layer is no field: did you mean n_layers"),
        ({"preset": "small", "n_layers": 0}, "n_layers must be > 0, got 0"),
    ],
)
def test_the_factory_refuses_what_names_no_model(arguments, told):
    with pytest.raises(ConfigError, match=told):
        create_phase2_model(**arguments)


@pytest.mark.parametrize("wrong", [{"dtype": "bfloat16"}, {"dtype": torch.int8}, {"seed": "a"}, {"seed": True}])
@pytest.mark.parametrize("create", [create_phase1_model, create_phase2_model])
def test_a_dtype_or_a_seed_that_is_none_is_refused(create, wrong):
    with pytest.raises(ConfigError, match=rf"expected {next(iter(wrong))} as a .*{next(iter(wrong.values()))!r}"):
        create(vocab_size=20, d_model=8, n_layers=1, htt_rank=2, **wrong)
