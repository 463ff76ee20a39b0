"""What one pair cannot say about the penalties of the room physics: whole Jacobians, and what a penalty teaches."""

import math

import pytest
import torch

from so8t_torch.core.errors import ConfigError, DomainError
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


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_the_symplectic_defect_of_the_leapfrog_is_zero(damping):
    energy = hamiltonian()
    x, u, w = (drawn(4, 2, 6, seed=seed) for seed in range(3))

    def layer(state):
        return physics.leapfrog(state, *energy, step=0.3, damping=damping)

    value, monitors = physics.symplectic_defect(layer, x, u, w, damping=damping, step=0.3)
    assert value < 1e-12
    assert monitors["stretch"] > 0.1
    if damping:
        assert physics.symplectic_defect(layer, x, u, w)[0] > 1e-3


def test_the_symplectic_defect_of_a_random_network_is_not():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Tanh(), torch.nn.Linear(24, 6)).double()
    x, u, w = (drawn(8, 2, 6, seed=seed) for seed in range(3))
    value, _ = physics.symplectic_defect(lambda state: state + network(state), x, u, w)
    assert value > 1e-3
    value.backward()
    for name, parameter in network.named_parameters():
        constant = name == "2.bias"
        assert parameter.grad is None if constant else parameter.grad.abs().max() > 0


def test_probes_estimate_the_whole_matrix():
    matrix = torch.eye(4, dtype=torch.float64) + drawn(4, 4, seed=5, scale=0.3)
    twist = matrix.mT @ structure(2) @ matrix - structure(2)
    x, u, w = (drawn(40000, 1, 4, seed=seed) for seed in range(3))
    # |u|² of a Gaussian probe is independent of its direction; E over unit vectors of (aᵀMb)² is ‖M‖²/16
    value, _ = physics.symplectic_defect(lambda state: state @ matrix.mT, x, u, w)
    assert torch.isclose(value, twist.square().sum() / 16, rtol=0.05)


def test_a_discrete_gradient_step_balances_its_books():
    energy, resistance, h = hamiltonian(), torch.rand(6, dtype=torch.float64), 0.1
    start, pushed = drawn(5, 6), drawn(5, 6, seed=7, scale=0.1)
    flow = structure(3) - torch.diag(resistance)
    end = start
    for _ in range(60):
        gained = physics.energy(end, *energy) - physics.energy(start, *energy)
        middle = physics.energy_gradient((start + end) / 2, *energy)
        gradient = physics.discrete_gradient(middle, end - start, gained)
        end = start + h * gradient @ flow.mT + pushed
    energies = torch.stack([physics.energy(start, *energy), physics.energy(end, *energy)])
    supply = (gradient * pushed).sum(-1)
    value, monitors = physics.energy_balance(energies, gradient[None], resistance, supply[None], step=h)
    assert monitors["worst"] < 1e-10
    assert value < 1e-20
    assert monitors["dissipation"] > 1e-3
    wrong, _ = physics.energy_balance(energies, gradient[None], resistance, step=h)
    assert wrong > 1e-6


def test_a_dissipative_field_has_no_hamiltonian_residual():
    energy, resistance, x = hamiltonian(), torch.rand(6, dtype=torch.float64), drawn(5, 6)
    gradient = physics.energy_gradient(x, *energy)
    field = gradient @ (structure(3) - torch.diag(resistance)).mT
    assert physics.hamiltonian_residual(0.3 * field, gradient, resistance, step=0.3)[0] < 1e-28
    rotated = field @ torch.linalg.qr(drawn(6, 6, seed=3)).Q
    assert physics.hamiltonian_residual(0.3 * rotated, gradient, resistance, step=0.3)[0] > 0.1


def test_the_drift_teaches_a_layer_to_conserve():
    torch.manual_seed(0)
    energy, x = hamiltonian(), drawn(32, 6)
    layer = torch.nn.Linear(6, 6, bias=False).double()

    def drift():
        energies = torch.stack([physics.energy(x, *energy), physics.energy(layer(x), *energy)])
        return physics.energy_drift(energies)[0]

    first = drift()
    first.backward()
    assert layer.weight.grad.abs().max() > 1e-4
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        optimiser.zero_grad()
        drift().backward()
        optimiser.step()
    assert drift() < 0.1 * first


def drift_of(energy, layer, x):
    return physics.energy_drift(torch.stack([physics.energy(x, *energy), physics.energy(x @ layer.mT, *energy)]))[0]


def test_collapsing_the_potential_does_not_lower_the_drift():
    mass, kappa, scales, weights, biases = hamiltonian()
    x, layer = drawn(32, 6), drawn(6, 6, seed=2)
    usual = drift_of((mass, kappa, scales, weights, biases), layer, x)
    assert drift_of((mass, kappa, 0 * scales, weights, biases), layer, x) > 0.3 * usual
    smaller = (1e-6 * mass, 1e-6 * kappa, 1e-6 * scales, weights, biases)
    assert torch.isclose(drift_of(smaller, layer, x), usual, rtol=1e-5)
    flat, _ = physics.anchor(1e-3 * physics.energy_gradient(x, mass, kappa, scales, weights, biases))
    assert flat > 0.9


def test_raising_the_potential_by_a_constant_earns_no_gradient():
    mass, kappa, scales, weights, biases = hamiltonian()
    shift = (scales.requires_grad_(), biases.requires_grad_())
    drift = drift_of((mass, kappa, scales, 0 * weights, biases), drawn(6, 6, seed=2), drawn(32, 6))
    assert drift > 0.1
    assert max(g.abs().max() for g in torch.autograd.grad(drift, shift)) < 1e-12


def test_an_energy_trained_on_its_own_drift_does_not_vanish():
    mass, kappa, scales, weights, biases = hamiltonian()
    x, layer = drawn(64, 6), drawn(6, 6, seed=2)
    learned = [scales.log().requires_grad_(), weights.requires_grad_(), biases.requires_grad_()]
    optimiser = torch.optim.Adam(learned, lr=0.05)
    for _ in range(60):
        energy = (mass, kappa, learned[0].exp(), *learned[1:])
        optimiser.zero_grad()
        drift_of(energy, layer, x).backward()
        optimiser.step()
    slope = physics.energy_gradient(x, mass, kappa, learned[0].detach().exp(), *(p.detach() for p in learned[1:]))
    plain = physics.energy_gradient(x, mass, kappa, 0 * scales, weights.detach(), biases.detach())
    assert physics.anchor(slope)[1]["mean_square"] > 0.3 * physics.anchor(plain)[1]["mean_square"]


def test_what_is_held_constant_gets_no_gradient():
    energies = drawn(4, 7).requires_grad_()
    value, monitors = physics.energy_drift(energies)
    (found,) = torch.autograd.grad(value, energies)
    plain = energies.detach().clone().requires_grad_()
    scale = energies.detach().abs().mean() + 1e-12
    (wanted,) = torch.autograd.grad((plain.diff(dim=0) / scale).square().mean(), plain)
    assert torch.allclose(found, wanted, rtol=1e-13, atol=0)
    assert not any(monitor.requires_grad for monitor in monitors.values())


def test_a_decaying_energy_costs_nothing_and_a_rising_one_does():
    energies = torch.exp(-0.5 * torch.arange(6.0, dtype=torch.float64))[:, None].expand(6, 3)
    assert physics.lyapunov_hinge(energies, rate=0.35)[0] == 0
    value, monitors = physics.lyapunov_hinge(energies, rate=0.45)
    assert value > 0
    assert monitors["violations"] == 1
    rising = energies.flip(0).clone().requires_grad_()
    physics.lyapunov_hinge(rising, rate=0.0)[0].backward()
    assert (rising.grad[-1] > 0).all()
    assert (rising.grad[0] < 0).all()


def memory(steps=40, width=(5, 4)):
    keys, values = drawn(steps, width[0], seed=1), drawn(steps, width[1], seed=2)
    retention, eta = torch.exp(-drawn(steps, seed=3).abs()), torch.full((steps,), 0.1, dtype=torch.float64)
    states = [torch.zeros(width, dtype=torch.float64)]
    for a, e, k, v in zip(retention, eta, keys, values, strict=True):
        states.append(a * states[-1] + e * torch.outer(k, v))
    return torch.stack(states), keys, values, retention, eta


def test_a_memory_balances_from_zero_and_never_exceeds_its_bound():
    value, monitors = physics.memory_balance(*memory())
    assert value < 1e-24
    assert monitors["residual"] < 1e-12
    assert monitors["filled"] <= 1
    assert monitors["dissipation"] > 0


def test_a_lossless_memory_has_a_bound_too():
    states, keys, values, retention, eta = memory()
    writes = eta[:, None, None] * keys[:, :, None] * values[:, None, :]
    states = torch.cat([states[:1], writes.cumsum(0)])
    value, monitors = physics.memory_balance(states, keys, values, torch.ones_like(retention), eta)
    assert value < 1e-24
    assert monitors["dissipation"] == 0


def test_a_clipped_state_is_noticed_and_a_budget_pulls():
    states, *rest = memory()
    clipped = states.clamp(max=0.05)
    assert physics.memory_balance(clipped, *rest)[1]["residual"] > 1e-3
    states.requires_grad_()
    value, _ = physics.memory_balance(states, *rest, torch.full((40,), 0.05, dtype=torch.float64))
    value.backward()
    assert states.grad.isfinite().all()
    assert (states.grad * states).sum() > 0


def test_half_lives_spread_evenly_are_preferred():
    even = 4.0 * 1024.0 ** ((torch.arange(640, dtype=torch.float64) + 0.5) / 640)
    assert physics.half_life_divergence(math.log(2) / even[:, None])[0] < 1e-4
    frozen, _ = physics.half_life_divergence(torch.full((16, 2), 1e-9, dtype=torch.float32).requires_grad_())
    assert frozen > 1
    frozen.backward()
    decay = torch.full((64, 4), 0.69, dtype=torch.float64).requires_grad_()
    value, monitors = physics.half_life_divergence(decay)
    value.backward()
    assert (decay.grad > 0).all()
    assert torch.isclose(monitors["half_life"], torch.tensor(math.log(2) / 0.69, dtype=torch.float64))


def test_a_budget_pulls_from_both_sides_and_counts_overdamping():
    for factor, sign in ((0.5, -1), (2.0, 1)):
        decay = torch.full((8, 2), factor * 0.1, dtype=torch.float64).requires_grad_()
        physics.decay_budget(decay, torch.full((2,), 0.1, dtype=torch.float64))[0].backward()
        assert (decay.grad.sign() == sign).all()
    mixed = torch.tensor([[0.6, 0.8], [0.1, 3.0]])
    assert physics.decay_budget(mixed, torch.ones(2))[1]["overdamped"] == 0.5


def chain(n, seed=0, loss=0.1):
    """A dissipative chain with Hermitian hopping: its resolvent by inversion, its ratios by recursion."""
    width = loss + drawn(n, seed=seed).abs()
    hopping = torch.complex(drawn(n - 1, seed=seed + 1), drawn(n - 1, seed=seed + 2))
    diagonal = torch.complex(drawn(n, seed=seed + 3), -width)
    h = torch.diag(diagonal) + torch.diag(hopping, 1) + torch.diag(hopping.conj(), -1)
    left, right = list(diagonal), list(diagonal)
    for i in range(1, n):
        left[i] = diagonal[i] - hopping[i - 1].abs() ** 2 / left[i - 1]
        right[n - 1 - i] = diagonal[n - 1 - i] - hopping[n - 1 - i].abs() ** 2 / right[n - i]
    return h, torch.stack(left), torch.stack(right), hopping, hopping.conj(), width


@pytest.mark.parametrize("n", [1, 2, 3, 64, 257])
def test_flux_balances_on_a_hermitian_chain(n):
    h, left, right, upper, lower, width = chain(n)
    green = torch.linalg.inv(h).diagonal()
    assert physics.ward_residual(green, left, right, upper, lower, width)[1]["worst"] < 1e-10
    _, log_det = torch.linalg.slogdet(h)
    assert torch.isclose(physics.resolvent_energy(left), -log_det / n, rtol=1e-12)
    if n > 2:
        assert physics.ward_residual(green, left, right, 1.5 * upper, lower, width)[0] > 1e-6


def free_chain(width, seed=0):
    """A dissipative chain whose hopping is not Hermitian: its resolvent, and the arguments of ward_residual."""
    n = len(width)
    upper, lower = (torch.complex(drawn(n - 1, seed=k), drawn(n - 1, seed=k + 1)) for k in (seed + 1, seed + 3))
    diagonal = torch.complex(drawn(n, seed=seed), -width)
    left, right = list(diagonal), list(diagonal)
    for i in range(1, n):
        left[i] = diagonal[i] - upper[i - 1] * lower[i - 1] / left[i - 1]
        right[n - 1 - i] = diagonal[n - 1 - i] - upper[n - 1 - i] * lower[n - 1 - i] / right[n - i]
    green = torch.linalg.inv(torch.diag(diagonal) + torch.diag(upper, 1) + torch.diag(lower, -1))
    return green, (green.diagonal(), torch.stack(left), torch.stack(right), upper, lower, width)


def test_ceasing_to_forget_does_not_pay_for_unbalanced_flux():
    for seed in range(0, 30, 10):
        log = torch.tensor(math.log(1e-4), dtype=torch.float64, requires_grad=True)
        value, _ = physics.ward_residual(*free_chain(log.exp().expand(8), seed)[1])
        (slope,) = torch.autograd.grad(value, log)
        # with the factor w differentiated the value falls like w², a slope of 2
        assert abs(slope / value) < 0.1


def test_the_flux_residual_is_differentiated_at_a_constant_factor():
    width = 0.3 + drawn(6, seed=9).abs()

    def by_matrix(moved):
        green, _ = free_chain(moved)
        lost = (green.abs().square() @ moved[:, None])[:, 0]
        return (width * (green.diagonal().imag - lost)).square().mean()

    moving = width.clone().requires_grad_()
    value, _ = physics.ward_residual(*free_chain(moving)[1])
    value.backward()
    steps = 1e-6 * torch.eye(6, dtype=torch.float64)
    wanted = torch.stack([(by_matrix(width + step) - by_matrix(width - step)) / 2e-6 for step in steps])
    assert torch.isclose(value, by_matrix(width), rtol=1e-12)
    assert torch.allclose(moving.grad, wanted, rtol=1e-7, atol=1e-7 * float(value.detach()))


def test_multipliers_rise_while_violated_and_drive_the_constraint_down():
    point = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
    multipliers = torch.zeros(1, dtype=torch.float64)
    weight, target = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    optimiser = torch.optim.SGD([point], lr=0.02)
    for _ in range(600):
        constraint = point.square().sum()[None]
        loss, _ = physics.augmented_lagrangian((point - 2).square().sum(), constraint, multipliers, weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        multipliers = physics.update_multipliers(multipliers, constraint, 0.1 * weight, target, 100 * weight)
    assert abs(float(point.detach().square().sum()) - 0.25) < 0.02
    assert not multipliers.requires_grad
    broken = physics.update_multipliers(multipliers, torch.full((1,), math.nan).double(), weight, target, weight)
    assert broken.isnan().all()


def test_nan_stays_nan():
    energies = torch.ones(3, 2)
    energies[1, 0] = math.nan
    assert physics.energy_drift(energies)[0].isnan()
    assert physics.lyapunov_hinge(energies, rate=0.1)[0].isnan()
    assert physics.energy(torch.full((4,), math.nan), *(p.float() for p in hamiltonian(2))).isnan()


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(DomainError, match="move one of them"):
        physics.discrete_gradient(torch.ones(3), torch.ones(3, device="meta"), torch.ones(()))


def test_time_runs_forwards_between_layers():
    energies, gradients, ones = torch.ones(3, 2), torch.ones(2, 2, 4), torch.ones(4)
    for step in (-0.1, 0.0, math.inf, math.nan):
        for call in (
            lambda h: physics.energy_balance(energies, gradients, ones, step=h),
            lambda h: physics.hamiltonian_residual(torch.ones(3, 4), torch.ones(3, 4), ones, step=h),
            lambda h: physics.lyapunov_hinge(energies, rate=math.copysign(0.1, h), step=h),
        ):
            with pytest.raises(ConfigError, match="step > 0"):
                call(step)


def test_an_infinite_eps_would_make_every_penalty_zero():
    with pytest.raises(ConfigError, match="finite eps"):
        physics.energy_drift(drawn(3, 2), eps=math.inf)


def test_states_that_have_no_tangent_are_refused():
    probe = drawn(2, 3, 4)
    for x in (torch.ones(2, 3, 4, dtype=torch.int64), probe + 0j):
        with pytest.raises(DomainError, match="real floating-point"):
            physics.symplectic_defect(lambda state: state, x, probe, probe)
