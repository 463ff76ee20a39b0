"""The adaptive-rank layer: against dense matrices, its options, its gates, streaming, and that all of it trains."""

import math

import pytest
import torch
from finite_differences import check_every_parameter

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer

WIDTH = 6
OPTIONS = [
    {},
    {"core": "compat"},
    {"adaptive_time_step": True},
    {"decays": "none", "core": "compat"},
    {"decays": "uniform", "band_width": 1},
]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dtype=torch.float64, **options):
    torch.manual_seed(5)
    return AdaptiveRankSemiseparableLayer(WIDTH, **{"max_rank": 5, "min_rank": 2, "chunk": 4, **options}, dtype=dtype)


def dense(module, x):
    """Return y of one example from matrices with one entry per pair of tokens."""
    gates = module(x[None])[1]["gates"][0]
    steps = torch.zeros(len(x), module.max_rank, dtype=x.dtype)
    if module.log_rates is not None:
        rates = torch.exp(module.log_rates)
        steps = torch.nn.functional.softplus(module.time_step(x)) * rates if module.time_step else steps + rates
    u, v = (x @ projection.weight.T * gates for projection in (module.u_proj, module.v_proj))
    u = u * (1 - torch.exp(-steps)) if module.log_rates is not None else u
    rows = []
    for t in range(len(x)):
        y = sum(module.taps[j] * x[t - j] for j in range(len(module.taps)) if t >= j)
        survived = [torch.exp(-steps[s + 1 : t + 1].sum(0)) for s in range(t + 1)]
        if module.core == "operator":
            mixed = sum((v[t] * w * u[s]).sum() * (module.value_proj.weight @ x[s]) for s, w in enumerate(survived))
        else:
            mixed = v[t] * sum(w * u[s] for s, w in enumerate(survived))
        rows.append(y + module.output_proj(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_sum_over_pairs_of_tokens(options):
    module, x = layer(**options), drawn(2, 9, WIDTH)
    y, _ = module(x)
    for row in range(2):
        assert torch.allclose(y[row], dense(module, x[row]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_gets_the_gradient_of_finite_differences(options):
    module, x = layer(**options), drawn(2, 7, WIDTH, seed=1)
    weights = drawn(2, 7, WIDTH, seed=2)
    with torch.no_grad():
        # away from logits of exactly zero, where the floor has a kink
        module.gate[-1].bias.copy_(drawn(5, seed=7))

    def loss():
        y, diagnostics = module(x)
        return (y * weights).sum() + module.aux_loss(diagnostics)

    check_every_parameter(module, loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["soft", "ste", "gumbel"])
@pytest.mark.parametrize("value", [7.0, math.inf, math.nan])
def test_a_later_token_changes_no_bit_of_an_earlier_output(mode, value):
    module, x = layer(torch.float32, adaptive_time_step=True, max_rank=20), drawn(2, 13, WIDTH, dtype=torch.float32)
    module.set_gate_mode(mode)
    for place in (1, 6, 12):
        later = x.clone()
        later[0, place, 3] = value
        before, after = (module(z, generator=torch.Generator().manual_seed(1))[0] for z in (x, later))
        assert torch.equal(before[:, :place], after[:, :place])
        assert torch.equal(before[1], after[1])
        assert not torch.equal(before[0, place], after[0, place])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cut", [(1,) * 11, (4, 7), (8, 1, 2)])
def test_streaming_is_one_run(options, cut):
    module, x = layer(**options), drawn(2, 11, WIDTH)
    whole, end = module(x)
    parts, state = [], None
    for part in x.split(cut, 1):
        y, diagnostics = module(part, state)
        parts.append(y)
        state = diagnostics["state"]
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-13)
    for a, b in zip(state, end["state"], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_packed_sequences_are_those_sequences_alone():
    module, x = layer(adaptive_time_step=True), drawn(1, 12, WIDTH)
    packed, _ = module(x, segment_ids=torch.tensor([[0] * 5 + [1] * 7]))
    alone = torch.cat([module(part)[0] for part in (x[:, :5], x[:, 5:])], 1)
    assert torch.allclose(packed, alone, rtol=1e-12, atol=1e-13)


def test_gates_of_every_mode():
    module, x = layer(max_rank=32, min_rank=4), drawn(2, 50, WIDTH)
    soft = module(x)[1]["gates"]
    assert ((soft > 0) & (soft < 1)).all()
    module.set_gate_mode("ste")
    exact = module(x)[1]
    assert set(exact["gates"].unique().tolist()) == {0.0, 1.0}
    assert exact["gates"].sum(-1).min() >= 4
    assert torch.equal(exact["effective_rank"], exact["gates"].sum(-1).mean())
    module.set_gate_mode("gumbel", 0.5)
    first, second = (module(x, generator=torch.Generator().manual_seed(s))[1]["gates"] for s in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, module(x, generator=torch.Generator().manual_seed(0))[1]["gates"])
    assert torch.equal(module.eval()(x)[1]["gates"], exact["gates"])
    unsure = layer(max_rank=32, min_rank=4, hard=False).eval()
    unsure.set_gate_mode("gumbel")
    assert torch.equal(unsure(x)[1]["gates"], soft)


def test_the_rank_schedule_opens_channels_from_the_first():
    module, x = layer(max_rank=32, min_rank=4), drawn(1, 5, WIDTH)
    assert [module.update_rank_schedule(step, 100) for step in (0, 50, 100, 900)] == [4, 18, 32, 32]
    module.update_rank_schedule(50, 100)
    y, diagnostics = module(x)
    assert not diagnostics["gates"][..., 18:].any()
    assert (diagnostics["gates"][..., :18] > 0).all()
    (slope,) = torch.autograd.grad(y.sum(), module.u_proj.weight)
    assert not slope[18:].any()
    assert slope[:18].any(-1).all()


@pytest.mark.parametrize("mode", ["ste", "gumbel"])
def test_exact_gates_pass_a_slope_to_the_gate(mode):
    module, x = layer(max_rank=32, min_rank=4, hard=True), drawn(1, 20, WIDTH)
    module.set_gate_mode(mode)
    y, diagnostics = module(x)
    slopes = torch.autograd.grad(y.square().sum() + module.aux_loss(diagnostics), list(module.gate.parameters()))
    for slope in slopes:
        assert slope.isfinite().all()
        assert slope.any()


def test_states_stay_bounded_where_they_decay():
    x = drawn(1, 1, WIDTH).expand(1, 4000, WIDTH)
    with torch.no_grad():
        decayed = layer(core="compat")(x)[1]["state"].mixer
        summed = layer(core="compat", decays="none")(x)[1]["state"].mixer
    assert decayed.abs().max() < 10
    assert summed.abs().max() > 1000


@pytest.mark.parametrize("core", ["operator", "compat"])
def test_autocast_and_half_weights_carry_float32_states(core):
    x = drawn(2, 9, WIDTH, dtype=torch.float32)
    module = layer(torch.float32, core=core)
    whole = module(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, diagnostics = module(x)
    assert diagnostics["state"].mixer.dtype == torch.float32
    assert torch.allclose(y.float(), whole, atol=0.05)
    half = module.bfloat16()
    y, diagnostics = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert diagnostics["state"].mixer.dtype == torch.float32
    assert torch.allclose(y.float(), whole, atol=0.05)


def test_it_compiles_into_one_graph():
    module, x = layer(torch.float32, adaptive_time_step=True), drawn(2, 9, WIDTH, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = compiled(x)[0]
    assert torch.allclose(y, module(x)[0], rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert module.log_rates.grad.any()


@pytest.mark.parametrize("core", ["operator", "compat"])
def test_one_graph_serves_every_length(core):
    module = layer(torch.float32, core=core)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 22):
        x, ids = drawn(2, length, WIDTH, dtype=torch.float32), (torch.arange(length) // 5).expand(2, length)
        assert torch.allclose(compiled(x, None, ids)[0], module(x, None, ids)[0], rtol=1e-5, atol=1e-6)


def test_bad_options_and_inputs_are_refused():
    for options, match in (
        ({"min_rank": 0}, "min_rank"),
        ({"min_rank": 6}, "min_rank"),
        ({"band_width": 0}, "band_width"),
        ({"core": "other"}, "core out of"),
        ({"decays": "other"}, "decays out of"),
        ({"decays": "none", "adaptive_time_step": True}, "does nothing"),
        ({"l1_regularization": -1.0}, "l1_regularization"),
        ({"chunk": 3}, "power of two"),
        ({"chunk": 0, "core": "compat"}, "power of two"),
    ):
        with pytest.raises(ConfigError, match=match):
            layer(**options)
    module = layer()
    with pytest.raises(ConfigError, match="soft, ste, gumbel"):
        module.set_gate_mode("hard")
    with pytest.raises(ConfigError, match="gumbel_temperature"):
        module.set_gate_mode("gumbel", 0.0)
    with pytest.raises(ConfigError, match="warmup_steps"):
        module.update_rank_schedule(1, 0)
    with pytest.raises(ShapeError, match="at least one token"):
        module(drawn(1, 0, WIDTH))
    with pytest.raises(DomainError, match="real activations"):
        module(drawn(1, 3, WIDTH).to(torch.complex128))
    assert "core='operator'" in repr(module)
