"""Physics terms in training: against the same step by hand, against laws, and against what they promise."""

import math

import pytest
import torch
from torch import nn

from so8t_torch.core.config import parse_config
from so8t_torch.core.errors import ConfigError, TrainingError
from so8t_torch.nn.dissipative_bk import DissipativeBKLayer
from so8t_torch.nn.hamiltonian import HamiltonianBlock
from so8t_torch.nn.hebbian import DissipativeHebbianLayer
from so8t_torch.train import building, physics_terms
from so8t_torch.train.ablation import run_ablation
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.folder import read_metrics
from so8t_torch.train.physics import Physics, PhysicsSection
from so8t_torch.train.physics_terms import import_terms, register_term, term_names
from so8t_torch.train.run import run_training
from tests.train.test_resume import cut_off
from tests.train.test_trainer import WHOLE, by_hand, excite, train

EIGHT = (
    "energy_drift",
    "energy_balance",
    "hamiltonian_residual",
    "symplectic_defect",
    "lyapunov_hinge",
    "memory_balance",
    "decay_budget",
    "ward_residual",
)
PLAIN = {"penalty": {"enabled": False}}


class Mixer(nn.Module):
    """A residual layer with a chain and a memory that takes its rates, as a Phase 2 block has them."""

    def __init__(self, width, rule="hebb"):
        super().__init__()
        self.chain = DissipativeBKLayer(width, channels=2, hermitian=False, memory_heads=2)
        self.memory = DissipativeHebbianLayer(width, num_heads=2, head_dim=4, own_decay=False, rule=rule)
        self.out = nn.Linear(4, width)

    def forward(self, x, *, padding_mask=None):
        mixed = self.chain(x)
        read, _ = self.memory(x, padding_mask=padding_mask, gamma=mixed.potential.memory_gamma)
        return x + self.out(mixed.features) + read, None


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, **keywords):
        for layer in self.layers:
            out = layer(x, **keywords)
            x = out if isinstance(out, torch.Tensor) else out[0]
        return x


def section(**terms):
    tree = {"terms": {name: {"weight": 1.0} if options is None else options for name, options in terms.items()}}
    return parse_config(PhysicsSection, tree)


def measured(physics, stack, x, mask=None, steps=1):
    """Return c of every term after some steps, and the last step's part of the loss."""
    mask = torch.ones(x.shape[:2], dtype=torch.int64) if mask is None else mask
    for step in range(steps):
        physics.begin(step, [mask], torch.device("cpu"))
        with physics.observe():
            stack(x)
        part = physics.part(mask)
        physics.on_step_end(None, None, None)
    return {name: value for name, value in physics.read().items() if not name.endswith("multiplier")}, part


def drift(hidden, mask):
    energies = torch.stack([h.double().square().sum(-1)[mask.bool()] / 2 for h in hidden])
    return (energies.diff(dim=0) / energies.abs().mean().detach()).square().mean()


def test_one_step_equals_the_full_computation(settings, tmp_path):
    terms = {"energy_drift": {"weight": 3.0, "target": 0.01, "max": 50.0}}
    config = settings(**PLAIN, training=WHOLE, physics={"terms": terms})
    run = train(config, tmp_path, mutate=excite)
    job = building.build(config)
    excite(job.model)
    lm, _, _ = by_hand(job, 0.0)
    batch = job.collator(job.rows)
    stack = job.model.get_base_model().get_decoder()
    inputs = []
    for layer in stack.layers:
        layer.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    stack.layers[-1].register_forward_hook(lambda _module, _given, output: inputs.append(output))
    stack(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")})
    c = drift(inputs, batch["attention_mask"])
    (lm + 1.5 * c**2).backward()
    log = run.logs[0]
    assert log["physics/energy_drift"] == pytest.approx(c.item(), rel=1e-5)
    assert log["loss/physics"] == pytest.approx(1.5 * c.item() ** 2, rel=1e-5)
    assert log["loss/total"] == pytest.approx(lm.item() + 1.5 * c.item() ** 2, rel=1e-5)
    assert log["physics/energy_drift/multiplier"] == pytest.approx(3.0 * (c.item() - 0.01), rel=1e-5)
    for name, gradient in run.gradients.items():
        expected = dict(job.model.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, rtol=5e-4, atol=5e-7, msg=name)


def test_every_term_of_the_stream_reaches_the_adapter_with_checkpointing_and_without(settings, tmp_path):
    terms = {name: {"weight": 1.0} for name in (*EIGHT[:4], "lyapunov_hinge")}
    off, on = (
        train(
            settings(
                **PLAIN, training={**WHOLE, "gradient_checkpointing": flag}, physics={"terms": terms, "probes": 2}
            ),
            tmp_path,
            mutate=excite,
        )
        for flag in (False, True)
    )
    for name, gradient in off.gradients.items():
        torch.testing.assert_close(on.gradients[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    plain = train(settings(**PLAIN, training=WHOLE), tmp_path, mutate=excite)
    assert all((off.gradients[name] - plain.gradients[name]).norm() > 0 for name in off.gradients if "layers.0" in name)
    assert all(off.logs[0][f"physics/{name}"] > 0 for name in terms)


def test_multipliers_follow_the_rule_from_the_start_step_and_every_so_often(settings, tmp_path):
    asked = {"weight": 200.0, "target": 0.001, "max": 4.0}
    config = settings(
        **PLAIN,
        training={"max_steps": 7, "accumulation": 2, "batch_size": 2},
        physics={"terms": {"energy_drift": asked}, "start_step": 2, "every": 2},
    )
    logs, expected = train(config, tmp_path).logs, 0.0
    for step, row in enumerate(logs):
        if step in (2, 4, 6):
            expected = min(max(expected + 200.0 * (row["physics/energy_drift"] - 0.001), 0.0), 4.0)
        assert ("physics/energy_drift" in row) == (step in (2, 4, 6))
        assert row["physics/energy_drift/multiplier"] == pytest.approx(expected, rel=1e-9)
    assert expected > 0


def test_a_term_without_weight_is_measured_and_changes_no_bit(settings, tmp_path):
    terms = {name: {"weight": 0.0} for name in ("energy_drift", "symplectic_defect")}
    measuring = train(settings(**PLAIN, physics={"terms": terms}), tmp_path)
    plain = train(settings(**PLAIN), tmp_path)
    assert [row["loss/lm"] for row in measuring.logs] == [row["loss/lm"] for row in plain.logs]
    assert all(row["loss/physics"] == 0 and row["physics/energy_drift"] > 0 for row in measuring.logs)


def test_a_weighted_term_brings_its_value_down(settings, tmp_path):
    training = {"max_steps": 12, "warmup": 0.0, "schedule": "constant"}
    ends = []
    for weight in (0.0, 30.0):
        terms = {"energy_drift": {"weight": weight, "max": 100.0}}
        run = train(settings(**PLAIN, training=training, physics={"terms": terms}), tmp_path, mutate=excite)
        ends.append(run.logs[-1]["physics/energy_drift"])
    assert ends[1] < 0.8 * ends[0]


def test_micro_batches_count_by_their_tokens():
    torch.manual_seed(0)
    stack = Stack([nn.Linear(4, 4) for _ in range(2)])
    physics = Physics(section(energy_drift={"weight": 2.0}), stack, seed=0)
    rows = [torch.randn(1, 5, 4), torch.randn(1, 5, 4)]
    masks = [torch.ones(1, 5, dtype=torch.int64), torch.tensor([[1, 1, 0, 0, 0]])]
    physics.begin(0, masks, torch.device("cpu"))
    parts, values = [], []
    for x, mask in zip(rows, masks, strict=True):
        with physics.observe():
            stack(x)
        parts.append(physics.part(mask))
        hidden = [x, stack.layers[0](x), stack(x)]
        values.append(drift(hidden, mask).item())
    assert [p.item() for p in parts] == pytest.approx([5 / 7 * values[0] ** 2, 2 / 7 * values[1] ** 2], rel=1e-5)
    physics.on_step_end(None, None, None)
    mean = (5 * values[0] + 2 * values[1]) / 7
    assert physics.read()["physics/energy_drift"] == pytest.approx(mean, rel=1e-5)
    assert physics.multipliers.item() == pytest.approx(2 * mean, rel=1e-5)
    physics.begin_anew()
    assert physics.read() == {"physics/energy_drift/multiplier": 0.0}
    assert physics.state()["sums"].eq(0).all()


@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_all_eight_terms_look_at_a_stack_with_chains_and_memories(rule):
    torch.manual_seed(0)
    stack = Stack([Mixer(8, rule) for _ in range(2)])
    options = {"memory_balance": {"options": {"norm": 0.01}}}
    physics = Physics(section(**{name: options.get(name) for name in EIGHT}), stack, seed=0)
    values, part = measured(physics, stack, torch.randn(2, 6, 8))
    assert all(values[f"physics/{name}"] > 0 for name in EIGHT), values
    part.backward()
    silent = [name for name, parameter in stack.named_parameters() if parameter.grad is None]
    assert not silent


def test_a_sound_memory_and_a_hermitian_chain_balance_and_padding_is_left_out():
    torch.manual_seed(0)
    stack = Stack([Mixer(8)]).double()
    stack.layers[0].chain.hermitian = True
    physics = Physics(section(memory_balance=None, ward_residual=None, decay_budget=None), stack, seed=0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    values, _ = measured(physics, stack, x)
    assert values["physics/memory_balance"] < 1e-20
    assert values["physics/ward_residual"] < 1e-20
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    rates = torch.cat(
        [stack.layers[0].chain.potential(x).memory_gamma[0], stack.layers[0].chain.potential(x).memory_gamma[1, :2]]
    )
    lives = torch.tensor([4.0, 4096.0], dtype=torch.float64)
    expected = (rates.mean(0) / (math.log(2) / lives) - 1).square().mean()
    physics.reset()
    values, _ = measured(physics, stack, x, mask)
    assert values["physics/decay_budget"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_symplectic_defect_vanishes_for_hamiltonian_layers_only():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found = []
    for layers in ([HamiltonianBlock(8, steps=2)], [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))]):
        stack = Stack(layers).double()
        found.append(measured(Physics(section(symplectic_defect=None), stack, seed=0), stack, x)[0])
    assert found[0]["physics/symplectic_defect"] < 1e-24
    assert found[1]["physics/symplectic_defect"] > 1e-3


def test_probes_depend_on_the_step_alone_and_dropout_is_one_map():
    torch.manual_seed(0)
    stack = Stack([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3)])
    x, values = torch.randn(2, 5, 8), []
    for seed in (0, 0, 1):
        physics = Physics(section(symplectic_defect=None), stack, seed=seed)
        torch.manual_seed(len(values))
        values.append(measured(physics, stack, x.detach())[0]["physics/symplectic_defect"])
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_a_step_that_is_taken_again_or_dropped_leaves_no_trace():
    torch.manual_seed(0)
    stack = Stack([nn.Linear(4, 4)])
    physics = Physics(section(energy_drift=None), stack, seed=0)
    x, mask = torch.randn(1, 5, 4), torch.ones(1, 5, dtype=torch.int64)
    physics.begin(0, [mask], torch.device("cpu"))
    with physics.observe():
        stack(x)
    physics.part(mask)
    physics.undo()
    physics.on_step_end(None, None, None)
    assert physics.multipliers.item() == 0
    assert "physics/energy_drift" not in physics.read()


def test_a_term_of_ones_own_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(physics_terms, "_TERMS", dict(physics_terms._TERMS))

    @register_term
    def last_is_small(states, *, factor: float = 1.0):
        return factor * states[-1].square().mean(), {}

    stack = Stack([nn.Linear(4, 4)])
    x = torch.randn(1, 3, 4)
    physics = Physics(section(last_is_small={"options": {"factor": 2.0}}), stack, seed=0)
    values, _ = measured(physics, stack, x)
    assert values["physics/last_is_small"] == pytest.approx(2 * stack(x).square().mean().item(), rel=1e-5)
    with pytest.raises(ConfigError, match="'energy_drift' exists already"):
        register_term(lambda states: (states.mean(), {}), "energy_drift")
    with pytest.raises(ConfigError, match="looks at states, decay; one kind can be had"):
        register_term(lambda states, decay: (states.mean() + decay.mean(), {}), "two_kinds")


def test_every_term_of_the_room_is_in_the_table():
    assert set(EIGHT) < set(term_names())


@pytest.mark.parametrize(
    ("terms", "error", "match"),
    [
        ({"energy_drfit": None}, ConfigError, "did you mean 'energy_drift'"),
        ({"energy_drift": {"options": {"kapa": 1.0}}}, ConfigError, "no option 'kapa'; did you mean 'kappa'"),
        ({"memory_balance": None}, TrainingError, "DissipativeHebbianLayer or ModulatedMemory, and Stack has none"),
    ],
)
def test_what_cannot_be_observed_is_refused(terms, error, match):
    with pytest.raises(error, match=match):
        Physics(section(**terms), Stack([nn.Linear(2, 2)]), seed=0)


@pytest.mark.parametrize("field", ["weight", "target", "max"])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ConfigError, match=rf"terms.energy_drift.{field}"):
        parse_config(PhysicsSection, {"terms": {"energy_drift": {field: -1.0}}})


@pytest.fixture
def whole(tmp_path):
    """Make settings of a short run of a small Phase 2 model on text, with all eight terms."""

    def make(name, **sections):
        text = tmp_path / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200, encoding="utf-8")
        sizes = {"d_model": 16, "n_layers": 2, "num_heads": 2, "head_dim": 8, "memory_chunk": 8, "bk_hermitian": False}
        terms = {name: {"weight": 0.01} for name in EIGHT}
        terms["memory_balance"] = {"weight": 0.01, "options": {"norm": 0.01}}
        tree = {
            "output_dir": str(tmp_path / name),
            "threads": 1,
            "model": {"kind": "phase2", "fields": sizes},
            "data": {"text": {"source": str(text), "length": 32}},
            "training": {"max_steps": 4, "batch_size": 2, "lr": 3e-3},
            "physics": {"terms": terms},
            "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
            "checkpoint": {"every_steps": 2},
            **sections,
        }
        return parse_config(TrainConfig, tree)

    return make


def told(directory):
    return [row for row in read_metrics(directory / "metrics.jsonl") if row["kind"] == "train"]


def test_phase_2_trains_under_all_eight_terms_and_resumes_with_its_multipliers(whole):
    quiet = run_training(whole("quiet"))
    rows = told(quiet.directory)
    assert len(rows) == 4
    for name in EIGHT:
        assert all(row[f"physics/{name}"] > 0 for row in rows), name
        assert rows[-1][f"physics/{name}/multiplier"] > 0, name
    cut_off(whole("cut"), 3)
    resumed = run_training(whole("cut"), resume="auto")
    timing = {"time", "tokens_per_second"}
    last, again = ({k: v for k, v in told(run.directory)[-1].items() if k not in timing} for run in (quiet, resumed))
    assert last == again


def test_an_ablation_leaves_terms_out_one_by_one(whole):
    terms = {"energy_drift": {"weight": 1.0}, "decay_budget": {"weight": 0.001}, "ward_residual": {"weight": 0.0}}
    config = whole("ablation", physics={"terms": terms}, training={"max_steps": 3, "batch_size": 2, "lr": 3e-3})
    found = run_ablation(config)
    assert list(found.outcomes) == ["without", "energy_drift", "decay_budget", "all"]
    moved = {name: {t for t, m in o.multipliers.items() if m > 0} for name, o in found.outcomes.items()}
    expected = {"without": set(), **{name: {name} for name in list(terms)[:2]}, "all": set(list(terms)[:2])}
    assert moved == expected
    assert all(set(outcome.values) == set(terms) for outcome in found.outcomes.values())
    assert {path.name for path in config.output_dir.iterdir()} == {*found.outcomes, "ablation.json", "ablation.png"}
    own = [list(column.cells) for column in found.table().columns if column.header in ("run", "multiplier")]
    assert {name for name, multiplier in zip(*own, strict=True) if multiplier} == {"energy_drift", "decay_budget"}
    with pytest.raises(ConfigError, match="at least one term with a weight above 0"):
        run_ablation(whole("none", physics={"terms": {"energy_drift": {"weight": 0.0}}}))


def test_terms_that_a_run_cannot_have_leave_no_folder(whole):
    config = whole("bad", model={"kind": "llama", "fields": {"hidden_size": 64, "num_hidden_layers": 1}})
    with pytest.raises(TrainingError, match="DissipativeBKLayer"):
        run_training(config)
    with pytest.raises(ConfigError, match="did you mean 'ward_residual'"):
        run_training(whole("bad", physics={"terms": {"ward_residuel": {}}}))
    assert not (config.output_dir).exists()


def test_terms_of_a_module_are_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(physics_terms, "_TERMS", dict(physics_terms._TERMS))
    source = (
        "from so8t_torch.train.physics_terms import register_term\n"
        "@register_term\ndef from_a_module(states):\n    return states.square().mean(), {}\n"
    )
    (tmp_path / "terms_of_mine.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import_terms("terms_of_mine")
    assert "from_a_module" in term_names()
    with pytest.raises(ConfigError, match="no module 'nowhere_to_be_found'"):
        import_terms("nowhere_to_be_found")


def test_a_term_that_reaches_nothing_trainable_is_refused():
    stack = Stack([nn.Linear(4, 4)]).requires_grad_(False)
    with pytest.raises(TrainingError, match="energy_drift has no gradient"):
        measured(Physics(section(energy_drift=None), stack, seed=0), stack, torch.randn(1, 3, 4))
