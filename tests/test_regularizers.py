"""The workbench finds what is wrong with a regulariser, and what a sound one does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from so8t_jax.regularizers import Law, check, constraint, find, registered, registry, try_out
from so8t_jax.regularizers.model import SmallModel, recall, recall_loss
from so8t_jax.train import Constraint, fit
from so8t_torch.train import observation, physics_terms

SIZES = ({"l": 2, "s": 2, "d": 2},)


def walk(generator, size):
    return (generator.standard_normal((size["l"] + 1, size["s"], size["d"])).cumsum(0),)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """JAX as it comes, whatever another test of this process has set."""
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        yield


@pytest.fixture
def register(monkeypatch):
    """Register into a copy of the table."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    def enter(function, **options):
        return registry.register(function, **{"inputs": {"walk": walk}, "sizes": SIZES, **options})

    return enter


def red(report):
    return [finding.check for finding in report.findings if not finding.passed]


def spread(states):
    return jnp.var(states), {"mean": jax.lax.stop_gradient(jnp.mean(states))}


def even(f, example):
    (states,) = example
    return np.asarray(float(f(states)[0]) - float(f(-states)[0]))


def test_a_sound_one_passes_every_check(register):
    report = check(register(spread, laws=(Law("even", even, 64),)), examples=10)
    assert report.passed, report.table()
    assert [f.check for f in report.findings][-2:] == ["law even", "law even notices"]


@jax.custom_vjp
def _wrong(states):
    return jnp.mean(states**2)


_wrong.defvjp(lambda states: (_wrong(states), states), lambda states, g: (1.01 * g * 2 * states / states.size,))

FAULTS = {
    "gradient on walk": lambda states: (_wrong(states), {}),
    "value on walk": lambda states: (-jnp.mean(states**2), {}),
    "gradient does not vanish": lambda states: (jnp.mean(jax.lax.stop_gradient(states) ** 2), {}),
}


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_is_found(register, where):
    faulty = FAULTS[where]
    options = {"finite_differences": where != "gradient does not vanish"}
    assert red(check(register(faulty, name="faulty", **options), examples=5)) == [where]


def test_a_monitor_with_a_gradient_and_a_vector_for_a_value_are_found(register):
    report = check(register(lambda states: (jnp.mean(states**2), {"m": jnp.mean(states)}), name="leaks"), examples=5)
    assert red(report) == ["gradient on walk"]
    assert "stop_gradient" in report.table()
    broad = check(register(lambda states: (jnp.mean(states**2, axis=0), {}), name="broad"), examples=5)
    assert red(broad) == ["value on walk"]


def test_a_law_that_fails_and_one_that_says_nothing_are_found(register):
    laws = (
        Law("small", lambda f, x: np.asarray(f(*x)[0]), 1.0),
        Law("empty", lambda f, x: np.asarray(0 * f(*x)[0]), 1.0),
    )
    assert red(check(register(spread, name="judged", laws=laws), examples=5)) == ["law small", "law empty notices"]


@pytest.mark.parametrize("name", ["energy_drift", "decay_budget", "symplectic_defect"])
def test_a_known_term_of_each_sort_is_sound(name):
    report = check(find(name), examples=3)
    assert report.passed, report.table()


def test_both_sides_know_the_same_terms_options_and_quantities():
    assert observation.KINDS == registry.KINDS
    ours = {entry.name: (entry.kind, entry.looks_at, set(entry.options)) for entry in registered()}
    theirs = {
        name: (term.kind, term.looks_at, set(term.options))
        for name in physics_terms.term_names()
        for term in [physics_terms.find_term(name, {})]
    }
    bounds = {name: (kind, looks_at, options - {"bound"}) for name, (kind, looks_at, options) in theirs.items()}
    assert bounds == ours


def test_what_cannot_be_registered_says_what_is_expected(register):
    with pytest.raises(ValueError, match="a takes x, decay; expected arrays of one kind"):
        register(lambda x, decay: (x.sum() + decay.sum(), {}), name="a")
    with pytest.raises(ValueError, match="'energy_drift' is registered already"):
        register(spread, name="energy_drift")
    with pytest.raises(ValueError, match="at least one input strategy"):
        register(spread, inputs={})
    with pytest.raises(KeyError, match="did you mean 'energy_drift'"):
        find("energy_drfit")
    with pytest.raises(ValueError, match="no option 'kapa'; it has kappa"):
        try_out(find("energy_drift"), weight=1.0, options={"kapa": 1.0})
    with pytest.raises(ValueError, match="and steps ≥ 1"):
        try_out(find("energy_drift"), weight=1.0, steps=0)


def test_a_term_comes_down_the_multiplier_follows_and_without_it_nothing_changes(tmp_path):
    trial = try_out(find("energy_drift"), weight=0.5, target=0.5, limit=3.0, steps=20)
    ends = trial.summary
    assert ends["with"]["term"] < 0.5 * ends["without"]["term"]
    assert trial.without.added.max() == 0
    assert trial.without.multipliers.max() == 0
    expected = [0.0]
    for c in trial.along.constraints[:-1, 0]:
        expected.append(min(max(expected[-1] + 0.5 * (c - 0.5), 0.0), 3.0))
    np.testing.assert_allclose(trial.along.multipliers[:, 0], expected, rtol=1e-5, atol=1e-6)
    added = trial.along.multipliers[:, 0] * trial.along.constraints[:, 0] + 0.25 * trial.along.constraints[:, 0] ** 2
    np.testing.assert_allclose(trial.along.added, added, rtol=1e-4)
    trial.plot(tmp_path / "trial.png")
    assert (tmp_path / "trial.png").stat().st_size > 10_000
    assert "without" in trial.table()


def test_every_known_term_can_be_asked_of_the_small_model():
    model = SmallModel(12, layers=1, rngs=nnx.Rngs(0))

    @nnx.jit
    def measured(model, batch):
        _, observation = recall_loss(model, batch)
        return [constraint(entry, 1.0).measure(observation, jax.random.key(0)) for entry in registered()]

    values = dict(zip([e.name for e in registered()], measured(model, next(recall(0, 1))), strict=True))
    assert values.pop("memory_balance") < 1e-10
    assert all(np.isfinite(value) and value > 0 for value in values.values()), values


def test_a_loop_without_batches_or_with_a_loss_that_is_not_finite_is_refused():
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least one batch"):
        fit(model, lambda model, batch: (jnp.sum(model(batch)), None), [], optax.sgd(0.1))
    bad = Constraint("bad", lambda observed, _: jnp.nan * observed)
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(
            model,
            lambda model, batch: (jnp.sum(model(batch)), jnp.sum(batch)),
            [jnp.ones((1, 1))],
            optax.sgd(0.1),
            [bad],
        )
