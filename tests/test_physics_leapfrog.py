"""The damped leapfrog over whole trajectories: order, energy, structure, and the adjoint that runs backwards."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from torch.utils.checkpoint import checkpoint

from so8t_torch.core.errors import BackendError, ConfigError
from so8t_torch.ops import physics


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hamiltonian(d=3, m=5, seed=1):
    """Masses, κ, s, w, b."""
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(d + m, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.randn(m, d, generator=generator, dtype=torch.float64)
    biases = torch.randn(m, generator=generator, dtype=torch.float64)
    return positive[:d], torch.tensor(1.0, dtype=torch.float64), positive[d:], weights, biases


def structure(d):
    return torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64), torch.eye(d, dtype=torch.float64))


def solved(x, energy, time):
    """The exact flow of H by an adaptive solver of order eight."""

    def velocity(_, state):
        q_slope, p_slope = np.split(physics.energy_gradient(torch.from_numpy(state), *energy).numpy(), 2)
        return np.concatenate([p_slope, -q_slope])

    return scipy.integrate.solve_ivp(velocity, (0, time), x.numpy(), method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]


def test_the_leapfrog_is_of_second_order():
    x, energy = drawn(6), hamiltonian()
    exact = torch.from_numpy(solved(x, energy, 1.0))
    errors = [(physics.leapfrog(x, *energy, step=1 / n, steps=n) - exact).norm() for n in (40, 80)]
    assert 3.6 < errors[0] / errors[1] < 4.4
    start = physics.energy(x, *energy)
    drifts = [abs(physics.energy(physics.leapfrog(x, *energy, step=1 / n, steps=n), *energy) - start) for n in (40, 80)]
    assert 3.6 < drifts[0] / drifts[1] < 4.4


def test_its_energy_error_stays_bounded():
    x, energy = drawn(4, 6), hamiltonian()
    start, worst = physics.energy(x, *energy), 0.0
    for _ in range(40):
        x = physics.leapfrog(x, *energy, step=0.05, steps=50)
        worst = max(worst, float(((physics.energy(x, *energy) - start) / start).abs().max()))
    assert 0 < worst < 5e-3


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("backend", ["eager", "reversible"])
def test_its_jacobian_is_conformally_symplectic(damping, backend):
    x, energy = drawn(6), hamiltonian()

    def run(state):
        return physics.leapfrog(state, *energy, step=0.3, steps=4, damping=damping, backend=backend)

    jacobian = torch.autograd.functional.jacobian(run, x)
    omega = structure(3)
    twist = jacobian.mT @ omega @ jacobian - math.exp(-damping * 1.2) * omega
    assert twist.abs().max() < 1e-12


def test_the_reversed_adjoint_stores_one_state():
    energy, x = hamiltonian(), drawn(512, 6).requires_grad_()

    def saved(backend, steps):
        sizes = []

        def note(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            physics.leapfrog(x, *energy, step=0.1, steps=steps, backend=backend)
        return sum(sizes)

    assert saved("reversible", 40) == saved("reversible", 1)
    assert saved("eager", 40) > 20 * saved("reversible", 40)


def test_the_reversed_adjoint_has_a_second_derivative():
    energy = tuple(parameter.requires_grad_() for parameter in hamiltonian(2, 2))

    def run(*arguments):
        return physics.leapfrog(*arguments, step=0.3, steps=2, damping=0.2, backend="reversible")

    assert torch.autograd.gradcheck(run, (drawn(2, 4).requires_grad_(), *energy))
    assert torch.autograd.gradgradcheck(run, (drawn(2, 4).requires_grad_(), *energy))


def test_the_reversed_adjoint_compiles_in_one_graph_and_runs_under_vmap():
    energy, x = hamiltonian(), drawn(4, 6).requires_grad_()

    def run(state):
        return physics.leapfrog(state, *energy, step=0.1, steps=3, backend="reversible")

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(run(x).square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.allclose(found, wanted, rtol=1e-14, atol=1e-14)
    slopes = torch.func.vmap(torch.func.grad(lambda state: run(state).square().sum()))(x.detach())
    assert torch.allclose(slopes, wanted, rtol=1e-13, atol=1e-13)
    again = checkpoint(run, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], wanted)


def test_the_reversed_adjoint_refuses_a_tangent():
    energy, x = hamiltonian(), drawn(6)

    def run(backend):
        return torch.func.jvp(lambda state: physics.leapfrog(state, *energy, step=0.1, backend=backend), (x,), (x,))[1]

    with pytest.raises(BackendError, match="forward-mode tangent"):
        run("reversible")
    jacobian = torch.autograd.functional.jacobian(lambda state: physics.leapfrog(state, *energy, step=0.1), x)
    assert torch.allclose(run("auto"), jacobian @ x, rtol=1e-13, atol=1e-13)


def test_no_steps_change_nothing():
    x = drawn(3, 6)
    assert torch.equal(physics.leapfrog(x, *hamiltonian(), step=0.1, steps=0), x)


@pytest.mark.parametrize("backend", ["eager", "reversible"])
def test_autocast_changes_no_bit(backend):
    x, energy = drawn(4, 6).float().requires_grad_(), tuple(p.float() for p in hamiltonian())

    def value():
        y = physics.leapfrog(x, *energy, step=0.1, steps=3, backend=backend)
        return y.sum() + physics.energy(y, *energy).sum() + physics.energy_gradient(y, *energy).sum()

    with torch.autocast("cpu", torch.bfloat16):
        inside = value()
    plain, mixed = ((v, *torch.autograd.grad(v, x)) for v in (value(), inside))
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_half_a_step_is_not_taken():
    with pytest.raises(ConfigError, match="whole number of steps"):
        physics.leapfrog(drawn(6), *hamiltonian(), step=0.1, steps=2.5)
