"""The dissipative BK layer: what its rates do, what it lets through, and that all of it trains."""

import math

import numpy as np
import pytest
import torch
from finite_differences import check_every_parameter
from torch import nn

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.nn.dissipative_bk import DissipativeBKLayer, NonHermitianPotential, Potential, decay_statistics

WIDTH = 5
OPTIONS = [
    {},
    {"hermitian": False},
    {"adaptive_hopping": True, "memory_heads": 2},
    {"adaptive_decay": False, "memory_heads": 2, "mode": "full"},
    {"mode": "full", "channels": 1},
    {"include_gamma_in_h": False, "memory_heads": 2},
    {"include_gamma_in_h": False, "adaptive_decay": False, "memory_heads": 2},
]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dtype=torch.float64, **options):
    torch.manual_seed(3)
    return DissipativeBKLayer(WIDTH, **{"channels": 2, **options}, dtype=dtype)


def dense(module, x):
    """Return the features from dense matrices, one leading block per token and channel."""
    potential, z = module.potential(x), module.z()
    b = nn.functional.softplus(module.hopping)
    c = b if module.hermitian else module.backward_hopping
    found = []
    for row in range(x.shape[0]):
        columns = []
        for k in range(z.shape[0]):
            energies = torch.complex(potential.v, -potential.gamma)[row, :, k] - z[k]
            n = len(energies)
            above, below = (torch.diag_embed(t.expand(n - 1), o) for t, o in ((b[k], 1), (c[k], -1)))
            matrix = torch.diag(energies) + above + below
            columns.append(torch.stack([torch.linalg.inv(matrix[: i + 1, : i + 1])[i, i] for i in range(n)]))
        found.append(torch.stack(columns, -1))
    g = torch.stack(found)
    return torch.cat([g.real, g.imag], -1)


@pytest.mark.parametrize("hermitian", [True, False])
def test_the_features_are_those_of_dense_resolvents(hermitian):
    module, x = layer(hermitian=hermitian), drawn(2, 7, WIDTH)
    assert torch.allclose(module(x).features, dense(module, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_gets_the_gradient_of_finite_differences(options):
    module, x = layer(**options), drawn(2, 6, WIDTH, seed=1)

    def loss():
        mixed = module(x)
        weights = drawn(*mixed.features.shape, seed=2)
        return (mixed.features * weights).sum() + (mixed.potential.memory_gamma * 3.0).square().sum()

    check_every_parameter(module, loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"adaptive_hopping": True}, {"hermitian": False}], ids=str)
def test_a_later_token_changes_no_bit_of_an_earlier_one(options):
    module, x = layer(torch.float32, **options), drawn(2, 40, WIDTH, dtype=torch.float32)
    before = module(x).features
    for j in (1, 20, 39):
        for value in (1.0, torch.inf, torch.nan):
            edited = x.clone()
            edited[:, j:] = value
            assert torch.equal(module(edited).features[:, :j], before[:, :j])


def test_the_full_mode_reads_later_tokens():
    module, x = layer(mode="full"), drawn(1, 8, WIDTH)
    edited = x.clone()
    edited[:, -1] += 1.0
    assert not torch.equal(module(edited).features[:, 0], module(x).features[:, 0])


@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 7), (1, 10, 1)])
@pytest.mark.parametrize("options", [{}, {"adaptive_hopping": True}], ids=str)
def test_pieces_with_carried_state_give_what_one_call_gives(options, pieces):
    module, x = layer(**options), drawn(2, 12, WIDTH)
    whole = module(x)
    state, features = None, []
    for part in x.split(pieces, 1):
        mixed = module(part, state)
        state = mixed.state
        features.append(mixed.features)
    assert torch.allclose(torch.cat(features, 1), whole.features, rtol=1e-12, atol=1e-13)
    assert torch.allclose(state, whole.state, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"mode": "full"}], ids=str)
def test_packed_documents_and_padding_are_invisible_to_each_other(options):
    module = layer(**options)
    first, second = drawn(1, 6, WIDTH, seed=1), drawn(1, 9, WIDTH, seed=2)
    padding = torch.full((1, 3, WIDTH), 7.0, dtype=torch.float64)
    ids = torch.tensor([[4] * 6 + [0] * 9 + [1] * 3])
    packed = module(torch.cat([first, second, padding], 1), segment_ids=ids).features
    alone = torch.cat([module(first).features, module(second).features], 1)
    assert torch.allclose(packed[:, :15], alone, rtol=1e-12, atol=1e-13)


def test_the_rates_enter_the_resolvent_and_can_be_kept_out():
    x = drawn(1, 8, WIDTH)
    inside, outside = layer(memory_heads=3), layer(memory_heads=3, include_gamma_in_h=False)
    weights = inside.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        outside.load_state_dict(weights)
    for name in ("potential.projection.weight", "potential.projection.bias"):
        weights[name] = torch.cat([weights[name][:2], weights[name][4:]])
    outside.load_state_dict(weights)
    found = outside(x)
    assert torch.equal(found.potential.v, inside(x).potential.v)
    assert torch.equal(found.potential.memory_gamma, inside(x).potential.memory_gamma)
    assert not found.potential.gamma.any()
    assert torch.allclose(found.features, dense(outside, x), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(found.features, inside(x).features)
    bound = 1 / (inside(x).potential.gamma + inside.z().imag)
    size = torch.linalg.vector_norm(inside(x).features.unflatten(-1, (2, 2)), dim=-2)
    assert (size <= bound).all()


def test_a_uniform_rate_decays_like_its_exponential():
    n, rate, time = 6, 0.3, 1.7
    losses = layer(channels=1, adaptive_decay=False, base_decay=rate).potential(drawn(1, n, WIDTH)).values[0, :, 0]
    hamiltonian = drawn(n, n)
    hamiltonian = (hamiltonian + hamiltonian.mT).to(torch.complex128)
    start = drawn(n, seed=1).to(torch.complex128)
    lossy = hamiltonian + torch.diag(losses)
    end = torch.linalg.matrix_exp(-1j * lossy * time) @ start
    ratio = (end.abs().square().sum() / start.abs().square().sum()).item()
    assert math.isclose(ratio, math.exp(-2 * rate * time), rel_tol=1e-12)


def test_half_lives_of_the_memory_spread_over_their_range():
    potential = NonHermitianPotential(WIDTH, memory_heads=6, dt=0.5, dtype=torch.float64)
    gamma = potential(torch.zeros(1, 1, WIDTH, dtype=torch.float64)).memory_gamma[0, 0]
    lives = math.log(2) / (gamma * 0.5)
    expected = torch.logspace(math.log10(4), math.log10(4096), 6, dtype=torch.float64)
    assert torch.allclose(lives, expected, rtol=1e-6)
    assert math.isclose(potential(torch.zeros(1, 1, WIDTH, dtype=torch.float64)).gamma.item(), 0.05, rel_tol=1e-6)


def test_statistics_are_those_of_numpy():
    mixed = layer(memory_heads=3)(10.0 * drawn(2, 30, WIDTH))
    found = decay_statistics(mixed.potential, dt=20.0)
    gamma = mixed.potential.gamma.detach().flatten()
    assert math.isclose(found["gamma_mean"].item(), gamma.mean().item())
    assert math.isclose(found["gamma_overdamped"].item(), (gamma * 20.0 > math.log(2)).double().mean().item())
    expected = np.quantile(gamma.numpy(), [0.05, 0.5, 0.95])
    assert np.allclose(found["gamma_quantiles"].numpy(), expected, rtol=1e-14, atol=0)
    assert {name for name in found if name.startswith("memory_")} != set()
    assert not any(value.requires_grad for value in found.values())


def test_statistics_of_many_tokens_and_of_none():
    rate = torch.linspace(0.0, 1.0, 2**24 + 101).view(1, -1, 1)
    found = decay_statistics(Potential(rate, rate, rate[:, :, :0]))
    assert torch.allclose(found["gamma_quantiles"], torch.tensor([0.05, 0.5, 0.95]), rtol=1e-6, atol=0)
    with pytest.raises(ShapeError, match="at least one token"):
        decay_statistics(layer()(drawn(0, 3, WIDTH)).potential)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights_answer_in_their_dtype_and_carry_single_precision(dtype):
    x = drawn(2, 9, WIDTH, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        mixed = layer(torch.float32)(x)
    half = layer(torch.float32).to(dtype)(x.to(dtype))
    for found in (mixed, half):
        assert found.features.dtype == dtype
        assert torch.allclose(found.features.float(), layer(torch.float32)(x).features, rtol=0.1, atol=0.1)
        assert found.state.dtype == torch.complex64
        g = torch.view_as_real(found.state).movedim(-1, 1).flatten(1)
        assert torch.equal(found.features[:, -1], g.to(dtype))
        assert not torch.equal(g.to(dtype).float(), g), "the resolvent is rounded once, after it was carried"
        assert {part.dtype for part in found.potential} == {torch.float32}


def test_the_layer_compiles_to_one_graph():
    module, x = layer(memory_heads=2), drawn(2, 9, WIDTH)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x).features, module(x).features, rtol=1e-12, atol=1e-13)


def test_the_state_dict_survives_a_round_trip():
    module, other = layer(memory_heads=2), layer(memory_heads=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    other.load_state_dict(module.state_dict())
    x = drawn(1, 4, WIDTH)
    assert torch.equal(module(x).features, other(x).features)


def test_bad_input_is_refused():
    module = layer()
    with pytest.raises(ShapeError, match=r"x \(B, N, 5\)"):
        module(drawn(2, 3, 4))
    with pytest.raises(ShapeError, match="N > 0"):
        module(drawn(2, 0, WIDTH))
    with pytest.raises(ShapeError, match="segment_ids"):
        module(drawn(2, 3, WIDTH), segment_ids=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(DomainError, match="real floating-point"):
        module(torch.zeros(2, 3, WIDTH, dtype=torch.int64))
    with pytest.raises(DomainError, match="whole numbers"):
        module(drawn(2, 3, WIDTH), segment_ids=torch.zeros(2, 3))
    with pytest.raises(DomainError, match="of the parameters"):
        module(drawn(2, 3, WIDTH).float())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DomainError, match="of the parameters"):
        DissipativeBKLayer(WIDTH)(drawn(2, 3, WIDTH))
    with pytest.raises(DomainError, match="one precision"):
        module(drawn(2, 3, WIDTH), torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="no state in mode 'full'"):
        layer(mode="full")(drawn(2, 3, WIDTH), torch.zeros(2, 2, dtype=torch.complex128))


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 0},
        {"memory_heads": -1},
        {"mode": "both"},
        {"base_decay": 0.0},
        {"base_decay": 0.1},
        {"base_decay": math.inf, "adaptive_decay": False},
        {"dt": 0.0},
    ],
    ids=str,
)
def test_a_layer_that_makes_no_sense_is_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        DissipativeBKLayer(WIDTH, **options)


def test_a_large_constant_rate_is_fine():
    assert DissipativeBKLayer(WIDTH, base_decay=0.7, adaptive_decay=False).potential.base_decay == 0.7


@pytest.mark.parametrize("mode", ["causal", "full"])
def test_padding_behind_the_tokens_changes_nothing(mode):
    module, x = layer(mode=mode), drawn(3, 6, WIDTH)
    real = torch.arange(6) < torch.tensor([[6], [4], [0]])
    entering = None if mode == "full" else drawn(3, 2) + 0.3j
    found = module(x, entering, padding_mask=real)
    for row, count in enumerate((6, 4)):
        entered = None if entering is None else entering[row : row + 1]
        alone = module(x[row : row + 1, :count], entered)
        torch.testing.assert_close(found.features[row, :count], alone.features[0], rtol=0, atol=1e-13)
        if mode == "causal":
            torch.testing.assert_close(found.state[row], alone.state[0], rtol=0, atol=1e-13)
    if mode == "causal":
        assert torch.equal(found.state[2], entering[2])
    with pytest.raises(ShapeError, match="boolean padding_mask"):
        module(x, padding_mask=real.long())


def test_a_shift_is_added_to_the_potential():
    module, x, shift = layer(), drawn(2, 5, WIDTH), drawn(2, 5, 2, seed=1)
    found, plain = module(x, shift=shift), module(x)
    assert torch.equal(found.potential.v, plain.potential.v + shift)
    with torch.no_grad():
        module.potential.projection.bias[:2] += 0.7
    torch.testing.assert_close(
        module(x).features, layer()(x, shift=torch.full_like(shift, 0.7)).features, rtol=0, atol=1e-13
    )
    assert not torch.equal(found.features, plain.features)
