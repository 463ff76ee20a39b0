"""The layer of fast weights: what it remembers, what it lets through, and that all of it trains."""

import math

import pytest
import torch
from finite_differences import check_every_parameter

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.nn.hebbian import DissipativeHebbianLayer
from so8t_torch.ops.hebbian import hebbian

WIDTH = 6
OPTIONS = [
    {},
    {"eta_mode": "head", "discretization": "euler"},
    {"eta_mode": "token", "feedback_channels": 2, "dt": 0.5},
    {"rule": "delta", "eta": 0.5},
    {"own_decay": False, "key_norm": "none"},
]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dtype=torch.float64, **options):
    torch.manual_seed(3)
    return DissipativeHebbianLayer(WIDTH, **{"num_heads": 2, "head_dim": 4, **options}, dtype=dtype)


def rates(module, x):
    """Γ for a layer that has none of its own."""
    if module.gamma_proj is not None:
        return {}
    return {"gamma": 0.1 * drawn(*x.shape[:2], module.num_heads, seed=8, dtype=x.dtype).abs()}


def by_loop(module, x):
    """One head and one token at a time, with the default options."""
    heads, size = module.num_heads, module.head_dim
    q, k, v = ((x @ p.weight.T).unflatten(-1, (heads, size)) for p in (module.q_proj, module.k_proj, module.v_proj))
    gamma = 1e-4 + torch.log1p(torch.exp(x @ module.gamma_proj.weight.T + module.gamma_proj.bias))
    found = torch.zeros(*x.shape[:2], heads, size, dtype=x.dtype)
    for b in range(len(x)):
        for h in range(heads):
            s = torch.zeros(size, size, dtype=x.dtype)
            for t in range(x.shape[1]):
                a = torch.exp(-gamma[b, t, h])
                s = a * s + 0.1 * (1 - a) / gamma[b, t, h] * torch.outer(k[b, t, h] / k[b, t, h].norm(), v[b, t, h])
                y = s.T @ q[b, t, h] / size**0.5
                found[b, t, h] = y / (y.square().mean() + 1e-6).sqrt()
    return module.out_proj(found.flatten(-2))


def test_the_layer_is_the_loop():
    module, x = layer(), drawn(2, 70, WIDTH)
    assert torch.allclose(module(x)[0], by_loop(module, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_gets_the_gradient_of_finite_differences(options):
    module, x = layer(**options), drawn(2, 9, WIDTH, seed=1)
    if module.feedback_gate is not None:
        with torch.no_grad():
            module.feedback_gate.fill_(0.5)

    def loss():
        y, state = module(x, **rates(module, x))
        total = (y * drawn(*y.shape, seed=2)).sum() + (state * drawn(*state.shape, seed=3)).sum()
        return total if module.feedback_gate is None else total + module.potential_feedback(state).square().sum()

    check_every_parameter(module, loss, rtol=1e-5, atol=1e-6)


def test_the_last_token_gives_credit_to_the_first_as_finite_differences_say():
    module, x = layer(), drawn(1, 130, WIDTH).requires_grad_()
    weights = drawn(WIDTH, seed=2)
    (slope,) = torch.autograd.grad((module(x)[0][:, -1] * weights).sum(), x)
    assert slope[0, 0].any()
    for channel in range(WIDTH):
        ends = []
        for step in (1e-5, -1e-5):
            moved = x.detach().clone()
            moved[0, 0, channel] += step
            ends.append((module(moved)[0][:, -1] * weights).sum())
        assert torch.allclose((ends[0] - ends[1]) / 2e-5, slope[0, 0, channel], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_later_token_changes_no_bit_of_an_earlier_one(options):
    module, x = layer(torch.float32, **options), drawn(2, 80, WIDTH, dtype=torch.float32)
    before, _ = module(x, **rates(module, x))
    for j in (1, 40, 79):
        for value in (1.0, torch.inf, torch.nan):
            edited = x.clone()
            edited[:, j:] = value
            after, _ = module(edited, **rates(module, x))
            assert torch.equal(after[:, :j], before[:, :j])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_and_steps_give_what_one_call_gives(options):
    module, x = layer(**options), drawn(2, 75, WIDTH)
    whole, last = module(x, **rates(module, x))
    gamma = rates(module, x).get("gamma")
    found, state = module(x[:, :70], **({} if gamma is None else {"gamma": gamma[:, :70]}))
    columns = [found]
    for t in range(70, 75):
        y, state = module.forward_step(x[:, t], state, **({} if gamma is None else {"gamma": gamma[:, t]}))
        columns.append(y[:, None])
    assert torch.allclose(torch.cat(columns, 1), whole, rtol=1e-9, atol=1e-10)
    assert torch.allclose(state, last, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("garbage", [0.0, 1e4, math.inf, math.nan])
def test_padding_is_invisible_wherever_it_stands(garbage):
    module, x = layer(), drawn(1, 12, WIDTH)
    alone, last = module(x)
    mask = torch.tensor([[False] * 2 + [True] * 5 + [False] * 3 + [True] * 7 + [False]])
    padded = torch.full((1, 18, WIDTH), garbage, dtype=x.dtype)
    padded[mask] = x[0]
    found, state = module(padded, padding_mask=mask)
    assert torch.allclose(found[mask], alone[0], rtol=1e-10, atol=1e-11)
    assert torch.allclose(state, last, rtol=1e-10, atol=1e-11)


def test_packed_documents_do_not_meet():
    module, first, second = layer(), drawn(1, 6, WIDTH, seed=1), drawn(1, 9, WIDTH, seed=2)
    packed, last = module(torch.cat([first, second], 1), segment_ids=torch.tensor([[4] * 6 + [0] * 9]))
    alone, state = module(second)
    assert torch.allclose(packed[:, :6], module(first)[0], rtol=1e-10, atol=1e-11)
    assert torch.allclose(packed[:, 6:], alone, rtol=1e-10, atol=1e-11)
    assert torch.allclose(last, state, rtol=1e-10, atol=1e-11)


def test_half_lives_start_even_in_their_logarithm():
    module = layer(num_heads=6)
    lives = module.monitor(torch.zeros(1, 1, WIDTH, dtype=torch.float64))["half_life"][0, 0]
    assert torch.allclose(lives.log2(), torch.linspace(2.0, 12.0, 6, dtype=torch.float64), rtol=1e-9)
    assert lives.dtype == torch.float64


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_books_balance(options):
    module, x = layer(**options), drawn(2, 80, WIDTH)
    books = module.monitor(x, **rates(module, x))
    _, state = module(x, **rates(module, x))
    assert books["balance_residual"].abs().max() < 1e-12 * books["energy"].max()
    assert torch.allclose(2 * books["energy"][:, -1], state.square().sum((-2, -1)), rtol=1e-10)
    assert (books["supply"][:, 0] > 0).all()
    assert not books["energy"].requires_grad
    if module.rule == "hebb":
        assert books["within_bound"].all()


def test_a_memory_that_is_erased_stays_within_its_bound():
    for seed in range(20):
        module, x = layer(torch.float32, own_decay=False, discretization="euler"), drawn(1, 1, WIDTH, seed=seed).float()
        gamma = torch.zeros(1, 1, 2)
        _, state = module(x, gamma=gamma)
        books = module.monitor(x, -state, gamma=gamma)
        assert books["energy"].abs().max() < 1e-6 * books["bound"].square().max()
        assert books["within_bound"].all()
        assert not module.monitor(x, -state, gamma=gamma, slack=-1.01)["within_bound"].any()


def test_feedback_starts_closed_and_opens():
    module, x = layer(feedback_channels=3), drawn(1, 5, WIDTH)
    _, state = module(x)
    assert not module.potential_feedback(state).any()
    (slope,) = torch.autograd.grad(module.potential_feedback(state).sum(), module.feedback_gate)
    assert slope.all()
    with torch.no_grad():
        module.feedback_gate.fill_(2.0)
    wanted = 2.0 * (module.feedback_weight[:, None] * state[0]).sum((-2, -1)).mean(1)
    assert torch.allclose(module.potential_feedback(state)[0], wanted, rtol=1e-12)


def test_a_memory_recalls_over_a_distance():
    """Write 8 pairs, wait 64 tokens of noise that writes nothing, and read."""
    keys = torch.linalg.qr(drawn(8, 8)).Q
    values, quiet = drawn(8, 5, seed=1), torch.zeros(64, 8, dtype=torch.float64)
    k = torch.cat([keys, quiet, 0 * keys])[None, :, None]
    q = torch.cat([0 * keys, quiet, keys])[None, :, None]
    v = torch.cat([values, drawn(72, 5, seed=2)])[None, :, None]
    y, _ = hebbian(q, k, v, *torch.tensor([[1e-3], [1.0]], dtype=torch.float64))
    assert torch.allclose(y[0, -8:, 0], values * math.exp(-1e-3 * 72), rtol=1e-10)


def test_under_autocast_only_projections_are_rounded():
    module, x = layer(torch.float32), drawn(1, 40, WIDTH, dtype=torch.float32)
    wanted, _ = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, carried = module(x)
    assert carried.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_under_autocast_rates_and_strengths_are_not_rounded(kind):
    module = layer(torch.float32, eta_mode="token", key_norm="none")
    x = drawn(1, 40, WIDTH, dtype=torch.float32).to(kind)
    wide = x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rate, strength = module.tokens(x, None, None)[3:]
    logits = (wide @ p.weight.T + p.bias for p in (module.gamma_proj, module.eta_proj))
    gamma, gate = torch.log1p(next(logits).exp()), torch.sigmoid(next(logits))
    assert rate.dtype == strength.dtype == torch.float32
    assert torch.allclose(rate, 1e-4 + gamma, rtol=1e-5)
    assert torch.allclose(strength, 0.1 * gate, rtol=1e-5)


def test_no_rows_give_no_rows():
    module = layer()
    y, state = module(drawn(0, 5, WIDTH))
    assert y.shape == (0, 5, WIDTH)
    assert state.shape == (0, 2, 4, 4)
    y, state = module(drawn(0, 5, WIDTH), state)
    (y.sum() + state.sum()).backward()
    assert not module.k_proj.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_heads": 0}, "of 1 or more"),
        ({"eta_mode": "key"}, "eta_mode"),
        ({"eta": 0.0}, "eta > 0"),
        ({"base_decay": 0.1}, "longest half-life"),
        ({"rule": "oja"}, "rule"),
        ({"dt": math.inf}, "dt > 0"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        layer(**options)


def test_bad_arguments_are_refused():
    module, x = layer(), drawn(1, 4, WIDTH)
    with pytest.raises(ShapeError, match="activations"):
        module(x[..., :3])
    with pytest.raises(ShapeError, match="padding_mask"):
        module(x, padding_mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(DomainError, match="floating"):
        module(x.long())
    with pytest.raises(ConfigError, match="own_decay"):
        module(x, gamma=torch.ones(1, 4, 2))
    with pytest.raises(ConfigError, match="feedback_channels"):
        module.potential_feedback(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ShapeError, match=r"state \(B, 2, 4, 4\)"):
        layer(feedback_channels=1).potential_feedback(torch.zeros(1, 3, 4, 4))
    given = layer(own_decay=False)
    with pytest.raises(ConfigError, match="own_decay"):
        given(x)
    with pytest.raises(ShapeError, match="gamma"):
        given(x, gamma=torch.ones(1, 4))
    with pytest.raises(DomainError, match="Γ ≥ 0"):
        given(x, gamma=-torch.ones(1, 4, 2, dtype=torch.float64))
    with pytest.raises(ShapeError, match="initial state"):
        module(x, torch.zeros(1, 2, 4, 3, dtype=torch.float64))
