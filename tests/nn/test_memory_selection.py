"""The SNR filter as a layer, and the importance of entries."""

import math

import pytest
import torch

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.nn.memory_selection import MemoryImportanceEstimator, SNRMemoryFilter


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chunk():
    return drawn(2, 3, 8, 8), drawn(2, 5, 3, seed=1).abs(), drawn(2, 5, 3, seed=2).abs()


def test_the_filter_holds_no_state():
    layer = SNRMemoryFilter()
    assert not layer.state_dict()
    first, second = layer(*chunk()), layer(*chunk())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (layer.gamma_boost, layer.eta_boost) == (2.0, 1.5)


def test_statistics_are_there_in_training_and_evaluation():
    layer, (state, _, _) = SNRMemoryFilter(), chunk()
    trained, evaluated = layer.train().get_statistics(state), layer.eval().get_statistics(state)
    assert list(trained) == ["mean_snr", "std_snr", "min_snr", "max_snr", "low_snr_ratio"]
    for name, value in trained.items():
        assert torch.equal(value, evaluated[name])
        assert value.shape == (2, 3)
    # 95 % of Gaussian entries are below two standard deviations
    assert 0.85 < float(trained["low_snr_ratio"].mean()) < 1.0


def test_every_option_changes_something():
    state, decay, eta = chunk()
    state = state * torch.linspace(0.0, 3.0, 64).reshape(8, 8)
    plain = SNRMemoryFilter()(state, decay, eta)
    for option in (
        {"threshold": 1.0},
        {"gamma_boost": 4.0},
        {"eta_boost": 4.0},
        {"temperature": 2.0},
        {"cleanup": 0.5},
        {"hard": True},
        {"noise_floor": 1.0},
    ):
        changed = SNRMemoryFilter(**option)(state, decay, eta)
        assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)), option


def test_a_loss_on_what_the_chunk_works_with_reaches_the_state():
    state, decay, eta = (x.double().requires_grad_() for x in chunk())
    found = SNRMemoryFilter()(state, decay, eta)
    (found.decay.sum() + found.eta.sum()).backward()
    for x in (state, decay, eta):
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() > 0


def test_it_compiles_into_one_graph():
    layer = SNRMemoryFilter(cleanup=0.5, hard=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*chunk()), layer(*chunk()), strict=True):
        assert torch.allclose(a, b)


def test_the_score_is_the_weighted_sum_of_its_terms():
    state, age = drawn(1, 4, 4, dtype=torch.float64), torch.full((1, 4, 4), 5.0, dtype=torch.float64)
    parts = [MemoryImportanceEstimator(*w)(state, age) for w in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]
    assert torch.allclose(parts[1], (state / state.abs().max()) ** 2)
    assert torch.allclose(parts[2], torch.full_like(age, math.exp(-0.5)))
    whole = MemoryImportanceEstimator(2.0, 1.0, 1.0)(state, age)
    assert torch.allclose(whole, 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2])
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_younger_and_stronger_entries_matter_more():
    layer = MemoryImportanceEstimator()
    state = drawn(1, 4, 4)
    young, aged = (layer(state, torch.full((1, 4, 4), a)) for a in (0.0, 10.0))
    assert (young > aged).all()
    order = state.abs().flatten().argsort()
    assert (young.flatten()[order].diff() >= 0).all()


def test_the_top_entries_of_every_head_are_where_the_indices_say():
    layer, state, age = MemoryImportanceEstimator(), drawn(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    state[1, 2, 3, 1] = 50.0
    found = layer.get_top_k_memories(state, age, 4)
    assert found.values.shape == found.indices.shape == found.scores.shape == (2, 3, 4)
    assert found.indices[1, 2, 0] == 3 * 5 + 1
    assert found.values[1, 2, 0] == 50.0
    assert (found.scores.diff() <= 0).all()
    assert torch.equal(found.values, state.flatten(-2).gather(-1, found.indices))


def test_bad_arguments_are_refused():
    state, age = drawn(1, 4, 4), torch.zeros(1, 4, 4)
    for k in (0, 17):
        with pytest.raises(ConfigError, match="between 1 and 16"):
            MemoryImportanceEstimator().get_top_k_memories(state, age, k)
    with pytest.raises(ShapeError, match=r"states \(\.\.\., H, K, V\)"):
        MemoryImportanceEstimator().get_top_k_memories(state[0, 0], age[0, 0], 1)
    with pytest.raises(ConfigError, match="not all zero"):
        MemoryImportanceEstimator(0.0, 0.0, 0.0)(state, age)
    with pytest.raises(ConfigError, match="cleanup"):
        SNRMemoryFilter(cleanup=2.0)(state, torch.ones(2, 1), torch.ones(2, 1))
