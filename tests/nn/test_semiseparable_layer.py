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
    {"min_rank": 5},
    {"rotating": True, "adaptive_time_step": True},
    {"rotating": True, "core": "compat", "decays": "uniform"},
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
    u, v = (x @ projection.weight.T for projection in (module.u_proj, module.v_proj))
    if module.rotation is not None:
        steps = torch.complex(steps, -module.rotation.frequencies * steps / torch.exp(module.log_rates))
        u, v = (torch.complex(*z.chunk(2, -1)) for z in (u, v))
    u, v = u * gates, v * gates
    u = u * (1 - torch.exp(-steps.real)) if module.log_rates is not None else u
    rows = []
    for t in range(len(x)):
        y = sum(module.taps[j] * x[t - j] for j in range(len(module.taps)) if t >= j)
        survived = [torch.exp(-steps[s + 1 : t + 1].sum(0)) for s in range(t + 1)]
        if module.core == "operator":
            mixed = sum(
                (v[t] * w * u[s]).sum().real * (module.value_proj.weight @ x[s]) for s, w in enumerate(survived)
            )
        else:
            mixed = (v[t] * sum(w * u[s] for s, w in enumerate(survived))).real
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
    if module.gate is not None:
        # away from logits of exactly zero, where the floor has a kink
        torch.nn.init.normal_(module.gate[-1].bias, generator=torch.Generator().manual_seed(7))

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


@pytest.mark.parametrize("mode", ["soft", "ste", "gumbel"])
def test_channels_that_are_all_open_at_every_token_have_no_gate(mode):
    module, x = layer(min_rank=5), drawn(2, 9, WIDTH)
    module.set_gate_mode(mode)
    assert not [name for name in module.state_dict() if name.startswith("gate.")]
    diagnostics = module(x)[1]
    assert torch.equal(diagnostics["gates"], torch.ones(2, 9, 5, dtype=x.dtype))
    assert diagnostics["effective_rank"] == 5
    assert math.isclose(module.aux_loss(diagnostics).item(), module.l1_regularization)


PADDED = [[False] * 2 + [True] * 5 + [False] * 3 + [True] * 3 + [False], [True] * 8 + [False] * 6]


@pytest.mark.parametrize("garbage", [0.0, 1e4, math.inf, math.nan])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_is_invisible_wherever_it_stands(options, garbage):
    module, mask = layer(**options), torch.tensor(PADDED)
    with torch.no_grad():
        x, before = drawn(2, 8, WIDTH), module(drawn(2, 4, WIDTH, seed=1))[1]["state"]
    padded = torch.full((2, 14, WIDTH), garbage, dtype=x.dtype)
    padded[mask] = x.flatten(0, 1)
    (alone, wanted), (found, diagnostics) = module(x, before), module(padded, before, padding_mask=mask)
    assert torch.allclose(found[mask], alone.flatten(0, 1), rtol=1e-11, atol=1e-12)
    for name in ("gates", "t_component", "uv_component"):
        assert torch.allclose(diagnostics[name][mask], wanted[name].flatten(0, 1), rtol=1e-11, atol=1e-12)
    for name in ("effective_rank", "gate_l1_loss"):
        assert torch.allclose(diagnostics[name], wanted[name], rtol=1e-11)
    for a, b in zip(diagnostics["state"], wanted["state"], strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)
    slopes = (torch.autograd.grad(y.sum(), list(module.parameters())) for y in (found[mask], alone))
    for slope, expected in zip(*slopes, strict=True):
        assert torch.allclose(slope, expected, rtol=1e-10, atol=1e-11)


def test_a_row_of_padding_alone_hands_its_state_on():
    module, x = layer(), drawn(2, 5, WIDTH)
    before = module(drawn(2, 4, WIDTH, seed=1))[1]["state"]
    mask = torch.tensor([[True] * 5, [False] * 5])
    diagnostics = module(x, before, padding_mask=mask)[1]
    for carried, handed in zip(diagnostics["state"], before, strict=True):
        assert torch.equal(carried[1], handed[1])
    nothing = module(x, before, padding_mask=torch.zeros_like(mask))[1]
    assert nothing["effective_rank"] == nothing["gate_l1_loss"] == 0


def test_segments_part_tokens_across_padding_too():
    module, x = layer(adaptive_time_step=True), drawn(1, 9, WIDTH)
    before = module(drawn(1, 4, WIDTH, seed=1))[1]["state"]
    mask = torch.tensor([[True] * 3 + [False] * 2 + [True] * 4])
    ids = torch.tensor([[4] * 4 + [0] * 5])
    found, diagnostics = module(x, before, ids, padding_mask=mask)
    first, second = module(x[:, :3], before)[0], module(x[:, 5:])
    assert torch.allclose(found[mask], torch.cat([first, second[0]], 1)[0], rtol=1e-11, atol=1e-12)
    for a, b in zip(diagnostics["state"], second[1]["state"], strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)
    # the last token is padding of a document that has not begun
    ids = torch.tensor([[4] * 8 + [0]])
    ended = module(x, before, ids, padding_mask=torch.tensor([[True] * 8 + [False]]))[1]["state"]
    assert not any(part.any() for part in ended)


def test_no_rows_give_no_rows_and_a_finite_loss():
    module = layer()
    y, diagnostics = module(drawn(0, 4, WIDTH))
    assert y.shape == (0, 4, WIDTH)
    assert diagnostics["effective_rank"] == module.aux_loss(diagnostics) == 0
    (y.sum() + module.aux_loss(diagnostics)).backward()
    assert all(not parameter.grad.any() for parameter in module.parameters())


def test_the_state_dict_keeps_gate_mode_temperature_and_rank(tmp_path):
    module, other, x = layer(min_rank=1), layer(min_rank=1).eval(), drawn(2, 9, WIDTH)
    module.set_gate_mode("ste", 0.3)
    module.update_rank_schedule(50, 100)
    torch.save(module.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert (other.gate_mode, other.gumbel_temperature, other.active_rank) == ("ste", 0.3, 3)
    assert torch.equal(module(x)[0], other(x)[0])
    assert all(isinstance(value, torch.Tensor) for value in module.state_dict().values()), "safetensors take no others"
    weights = {name: value for name, value in module.state_dict().items() if "extra" not in name}
    fresh = layer(min_rank=1)
    assert fresh.load_state_dict(weights, strict=False).missing_keys == ["_extra_state"]
    assert (fresh.gate_mode, fresh.active_rank) == ("soft", 5)
    with pytest.raises(ConfigError, match="active_rank from 4 to 5, got 3"):
        layer(min_rank=4).load_state_dict(module.state_dict())


@pytest.mark.parametrize(
    "numbers", [[9, 1, 3], [-1, 1, 3], [1.5, 1, 3], [math.nan, 1, 3], [0, 1, 2.5], [0, math.nan, 3], [0, 1]]
)
def test_a_damaged_gate_state_is_refused_and_changes_nothing(numbers):
    layer = AdaptiveRankSemiseparableLayer(8, 6, min_rank=2)
    with pytest.raises(ConfigError):
        layer.set_extra_state(torch.tensor(numbers, dtype=torch.float64))
    assert (layer.gate_mode, layer.gumbel_temperature, layer.active_rank) == ("soft", 1.0, 6)


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
    x, before = drawn(1, 3, WIDTH), module(drawn(1, 3, WIDTH))[1]["state"]
    for state in (tuple(before), before.mixer, list(before)):
        with pytest.raises(ConfigError, match=r"expected a State.* got (tuple|Tensor|list)"):
            module(x, state)
    with pytest.raises(ShapeError, match="initial state"):
        module(x, before._replace(band=before.band[..., :3]))
    for mask in (torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 3)):
        with pytest.raises(ShapeError, match=r"boolean padding_mask \(1, 3\)"):
            module(x, padding_mask=mask)
    assert "core='operator'" in repr(module)
