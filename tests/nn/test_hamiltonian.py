"""The layer that is a flow: structure, energy, gradients, memory, dtypes, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.nn.hamiltonian import HamiltonianBlock
from so8t_torch.ops import physics


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def block(width=6, *, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    layer = HamiltonianBlock(width, dtype=dtype, **options)
    with torch.no_grad():
        layer.biases.normal_()
    return layer


def test_it_is_the_leapfrog_written_out():
    layer = block(features=4, step=0.2, steps=2, damping=0.3, learn_mass=True)
    x = drawn(6)
    w, b, r, m = (p.detach().numpy() for p in (layer.weights, layer.biases, layer.raw_scales, layer.raw_mass))
    scales, mass = np.log1p(np.exp(r)), np.log1p(np.exp(m)) + 1e-3

    def slope(q):
        return q + (scales / (1 + np.exp(-(w @ q + b)))) @ w

    q, p = np.split(x.numpy(), 2)
    for _ in range(2):
        p = p * math.exp(-0.03) - 0.1 * slope(q)
        q = q + 0.2 * p / mass
        p = (p - 0.1 * slope(q)) * math.exp(-0.03)
    assert np.allclose(layer(x).detach().numpy(), np.concatenate([q, p]), rtol=1e-13, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_it_is_conformally_symplectic(damping):
    layer, x = block(step=0.3, steps=3, damping=damping), [drawn(3, 2, 6, seed=seed) for seed in range(3)]
    assert physics.symplectic_defect(layer, *x, damping=damping, step=0.9)[0] < 1e-12


def test_energy_is_conserved_and_damping_takes_it():
    x = drawn(8, 6)
    kept, lost = block(step=0.02, steps=100), block(step=0.02, steps=100, damping=0.5)
    assert torch.allclose(kept.energy(kept(x)), kept.energy(x), rtol=1e-3)
    assert (lost.energy(lost(x)) < lost.energy(x)).all()


def test_tokens_do_not_see_each_other():
    layer, x = block(), drawn(2, 5, 6)
    changed = x.clone()
    changed[:, 3] = math.inf
    y, z = layer(x), layer(changed)
    assert torch.equal(y[:, :3], z[:, :3])
    assert torch.equal(y[:, 4:], z[:, 4:])


@pytest.mark.parametrize("adjoint", ["stored", "reversible"])
@pytest.mark.parametrize("learn_mass", [False, True])
def test_every_parameter_gets_the_gradient_of_finite_differences(adjoint, learn_mass):
    layer = block(4, features=3, steps=3, damping=0.2, learn_mass=learn_mass, adjoint=adjoint)
    x, cotangent = drawn(2, 4).requires_grad_(), drawn(2, 4, seed=1)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["weights", "biases", "raw_scales", *(["raw_mass"] if learn_mass else [])]

    def run(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return (torch.func.functional_call(layer, named, (x,)) * cotangent).sum()

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x, *parameters))
    layer(x).mul(cotangent).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in layer.parameters())


def test_the_reversed_adjoint_agrees_over_many_steps():
    stored, reversed_ = (block(step=0.05, steps=200, adjoint=adjoint) for adjoint in ("stored", "reversible"))
    x, cotangent = drawn(4, 6).requires_grad_(), drawn(4, 6, seed=1)
    wanted, found = (
        torch.autograd.grad(layer(x), (x, *layer.parameters()), cotangent) for layer in (stored, reversed_)
    )
    for a, b in zip(wanted, found, strict=True):
        assert (a - b).norm() < 1e-11 * a.norm()


def test_steps_that_cannot_be_run_backwards_are_stored():
    options = {"step": 0.5, "steps": 80, "damping": 2.0}
    layer = block(dtype=torch.float32, adjoint="reversible", **options)
    x = drawn(4, 6, dtype=torch.float32).requires_grad_()
    with pytest.warns(UserWarning, match=r"misses the first state by .* they are stored"):
        y = layer(x)
    stored = block(dtype=torch.float32, **options)
    wanted, found = (torch.autograd.grad(out.sum(), x)[0] for out in (stored(x), y))
    assert torch.equal(wanted, found)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adjoint", ["stored", "reversible"])
def test_half_precision_is_rounded_once(dtype, adjoint):
    layer = block(dtype=torch.float32, steps=4, adjoint=adjoint)
    x = drawn(5, 6).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.float()).to(dtype))
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), y)


def test_it_learns_a_turn_and_keeps_its_energy_over_many():
    """Learned from single turns it stays bounded over three hundred: the layer has an energy whatever it learns."""
    angle = torch.linspace(0.1, 1.5, 64, dtype=torch.float64)
    x = torch.stack([angle, torch.zeros_like(angle)], -1)
    turn = torch.tensor([[math.cos(0.3), math.sin(0.3)], [-math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    target = x @ turn.mT
    layer = block(2, features=4, step=0.1, steps=3, learn_mass=True)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 1e-3
    state = x
    with torch.no_grad():
        for _ in range(300):
            state = layer(state)
        assert ((layer.energy(state) - layer.energy(x)) / layer.energy(x)).abs().max() < 0.05


def test_state_dict_moves_and_compiles():
    layer, twin = block(steps=2), block(seed=5, steps=2)
    twin.load_state_dict(layer.state_dict())
    x = drawn(3, 6)
    assert torch.equal(layer(x), twin(x))
    assert "kappa" in layer.state_dict()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), rtol=1e-14, atol=1e-14)
    assert "steps=2" in repr(nn.Sequential(layer))


def test_no_tokens_are_no_problem():
    for adjoint in ("stored", "reversible"):
        x = drawn(0, 6).requires_grad_()
        assert block(adjoint=adjoint)(x).shape == (0, 6)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (5, {}),
        (0, {}),
        (6, {"features": 0}),
        (6, {"steps": 0}),
        (6, {"step": 0.0}),
        (6, {"steps": 2.5}),
        (6.0, {}),
        (6, {"step": math.inf}),
        (6, {"kappa": math.inf}),
        (6, {"damping": -0.1}),
        (6, {"kappa": 0.0}),
        (6, {"mass_floor": 0.0}),
        (6, {"reconstruction_tolerance": 0.0}),
        (6, {"adjoint": "symplectic"}),
    ],
)
def test_options_out_of_range_are_refused(width, options):
    with pytest.raises(ConfigError, match="expected"):
        HamiltonianBlock(width, **options)


def test_a_wrong_state_is_refused():
    layer = block()
    for call in (layer, layer.energy, layer.energy_gradient):
        with pytest.raises(ShapeError, match=r"x \(\.\.\., 6\)"):
            call(drawn(3, 8))
    with pytest.raises(DomainError, match="real floating-point"):
        layer(torch.ones(3, 6, dtype=torch.int64))


def test_a_module_built_without_data_is_whole_after_a_reset():
    with torch.device("meta"):
        layer = HamiltonianBlock(6, kappa=0.7, learn_mass=True, dtype=torch.float64)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer = layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(math.nan)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    twin = HamiltonianBlock(6, kappa=0.7, learn_mass=True, dtype=torch.float64)
    twin.reset_parameters(torch.Generator().manual_seed(3))
    assert layer.kappa == 0.7
    assert torch.equal(layer(drawn(2, 6)), twin(drawn(2, 6)))
    state = torch.random.get_rng_state()
    twin.reset_parameters(torch.Generator().manual_seed(4))
    assert torch.equal(state, torch.random.get_rng_state())


def test_half_precision_parameters_are_widened_before_anything_is_computed_from_them():
    layer = block(dtype=torch.bfloat16, steps=4, learn_mass=True)
    wide = block(learn_mass=True, steps=4)
    with torch.no_grad():
        layer.raw_scales.normal_(generator=torch.Generator().manual_seed(1))
        layer.raw_mass.normal_(generator=torch.Generator().manual_seed(2))
    wide.load_state_dict(layer.state_dict())
    x = drawn(5, 6, dtype=torch.float32)
    assert torch.allclose(layer(x).double(), wide(x.double()), rtol=1e-5, atol=1e-6)


def test_a_reversible_layer_passes_a_tangent_and_runs_under_vmap():
    stored, layer = (block(steps=3, adjoint=adjoint) for adjoint in ("stored", "reversible"))
    x, u, w = (drawn(3, 2, 6, seed=seed) for seed in range(3))
    value, monitors = physics.symplectic_defect(layer, x, u, w, step=0.3)
    assert value < 1e-12
    ahead, behind = (stored(x + sign * 1e-5 * u) for sign in (1, -1))
    slope = (ahead - behind).detach() / 2e-5
    assert torch.allclose(torch.func.jvp(layer, (x,), (u,))[1], slope, rtol=1e-7, atol=1e-8)
    stretch = (slope.square().sum((-2, -1)) / u.square().sum((-2, -1))).mean()
    assert torch.isclose(monitors["stretch"], stretch, rtol=1e-7)
    rows = torch.func.vmap(torch.func.grad(lambda state: layer(state).square().sum()))(x)
    moved = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(stored(moved).square().sum(), moved)
    assert torch.allclose(rows, wanted, rtol=1e-12, atol=1e-12)


def test_dynamic_sizes_compile_into_one_graph():
    layer = block(steps=2, damping=0.1)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        assert torch.allclose(compiled(drawn(tokens, 6)), layer(drawn(tokens, 6)), rtol=1e-14, atol=1e-14)
