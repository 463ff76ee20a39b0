"""Initialisers: spectra, norms, seeds, ties, and what is left alone."""

import numpy as np
import pytest
import torch
from torch import nn

from so8t_torch.core.errors import ConfigError
from so8t_torch.nn.zeta_initialization import (
    ZetaInitializer,
    apply_zeta_initialization,
    get_zeta_statistics,
    zeta_linear_init,
)
from so8t_torch.ops import zeta


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16, padding_idx=3)
        self.places = nn.Embedding(12, 16)
        self.up = nn.Linear(16, 40)
        self.norm = nn.LayerNorm(40)
        self.down = nn.Linear(40, 16, bias=False)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.tokens.weight


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (1, 9)])
def test_singular_values_fall_like_inverse_zeros_and_the_norm_is_that_of_independent_entries(shape):
    linear = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    ZetaInitializer.initialize_linear_zeta(linear, 0.7, rng=np.random.default_rng(0))
    s = torch.linalg.svdvals(linear.weight.detach())
    gamma = zeta.zeros(min(shape))
    assert torch.allclose(s / s[0], gamma[0] / gamma, rtol=1e-10, atol=0)
    assert abs(float(linear.weight.detach().norm()) - 0.7 * shape[0] ** 0.5) < 1e-10
    assert not linear.bias.any()


def test_spectral_mode_fixes_the_largest_singular_value():
    weight = zeta_linear_init((12, 7), 3.0, "spectral", rng=np.random.default_rng(1))
    assert abs(float(torch.linalg.matrix_norm(weight, 2)) - 3.0) < 1e-12


def test_one_seed_gives_one_model_and_layers_differ():
    models = [Tiny() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        apply_zeta_initialization(model, seed=seed)
    first, same, other = ({n: p.detach() for n, p in m.named_parameters()} for m in models)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["up.weight"], other["up.weight"])
    assert not torch.equal(first["up.weight"], first["down.weight"].mT)


def test_every_layer_is_written_once_and_a_tied_head_keeps_its_table():
    model = Tiny()
    state = torch.random.get_rng_state()
    report = apply_zeta_initialization(model, positions=["places"])
    assert torch.equal(state, torch.random.get_rng_state())
    assert report.linear == ("up", "down")
    assert report.tied == ("head",)
    assert report.tokens == ("tokens",)
    assert report.positions == ("places",)
    assert model.head.weight is model.tokens.weight
    assert not model.tokens.weight[3].any()
    assert abs(float(model.tokens.weight.detach().std()) - 0.02) < 0.002
    rms = model.places.weight.detach().square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.full((12,), 0.02), rtol=1e-5, atol=0)
    assert torch.equal(model.norm.weight.detach(), torch.ones(40))


def test_a_half_precision_weight_is_the_rounded_one():
    exact = zeta_linear_init((8, 6), rng=np.random.default_rng(2))
    linear = nn.Linear(6, 8, dtype=torch.bfloat16)
    ZetaInitializer.initialize_linear_zeta(linear, rng=np.random.default_rng(2))
    assert torch.equal(linear.weight.detach(), exact.bfloat16())
    assert linear.weight.requires_grad


def test_statistics_of_the_zeros():
    found = get_zeta_statistics(100)
    assert found["num_zeros"] == 100
    spacing = np.diff(found["zeros"].numpy())
    assert abs(found["mean_spacing"] - spacing.mean()) < 1e-12
    assert abs(found["std_spacing"] - spacing.std()) < 1e-12
    assert (found["min_spacing"], found["max_spacing"]) == (spacing.min(), spacing.max())


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="names of embeddings in positions, got up"):
        apply_zeta_initialization(Tiny(), positions=["up"])
    with pytest.raises(ConfigError, match="m, n ≥ 1"):
        zeta_linear_init((0, 4), rng=rng)
    with pytest.raises(ConfigError, match="gain > 0"):
        zeta_linear_init((2, 4), -1.0, rng=rng)
    with pytest.raises(ConfigError, match="scale > 0"):
        ZetaInitializer.initialize_embedding_zeta(nn.Embedding(4, 4), 0.0)
    with pytest.raises(ConfigError, match="n ≥ 2"):
        get_zeta_statistics(1)
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="before quantising"):
        ZetaInitializer.initialize_linear_zeta(quantised, rng=rng)


def test_a_weight_that_would_not_keep_what_is_written_is_refused():
    computed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    with pytest.raises(ConfigError, match="remove parametrizations"):
        apply_zeta_initialization(nn.Sequential(computed))
    for layer in (nn.Linear(5, 4, device="meta"), nn.Embedding(5, 4, device="meta")):
        with pytest.raises(ConfigError, match="to_empty first"):
            apply_zeta_initialization(nn.Sequential(layer))
    with pytest.raises(ConfigError, match="to_empty first"):
        ZetaInitializer.initialize_embedding_zeta(nn.Embedding(5, 4, device="meta"))
