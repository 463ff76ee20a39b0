"""The linear layer in sign–log numbers against the dense layer, zeros, ranges and transforms included."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError
from so8t_torch.nn.lns_linear import LNSLinear, convert_linear_to_lns, lns_matmul


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_of(weight, bias=None, **options):
    layer = LNSLinear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def with_zeros(tensor, seed):
    """Set a third of the entries, and one whole row, to exact zero."""
    keep = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    tensor = tensor * keep
    tensor[0] = 0.0
    return tensor


def sample(dtype=torch.float64):
    x, weight, bias = drawn(6, 9, seed=1), drawn(5, 9, seed=2), drawn(5, seed=3)
    return [with_zeros(t, seed).to(dtype) for seed, t in enumerate((x, weight, bias))]


def error_bound(x, weight, bias, dtype):
    """Bound |y − x Wᵀ − b|: a log ℓ rounded to the dtype moves its number by u·|ℓ|, K roundings in the sum."""
    x, weight, bias = (t.double().abs() for t in (x, weight, bias))
    terms = functional.linear(x, weight, bias)
    longest = max(t[t > 0].log().abs().max().item() for t in (x, weight, bias))
    return torch.finfo(dtype).eps * (x.shape[-1] + 4 + 4 * longest) * terms


def largest_term(x, weight, bias):
    """Return the largest term of each sum by trying all of them."""
    terms = torch.cat([x[:, None] * weight, bias.expand(x.shape[0], -1)[..., None]], -1)
    return terms.gather(-1, terms.detach().abs().argmax(-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_value_is_the_dense_one(dtype):
    x, weight, bias = sample(dtype)
    y = layer_of(weight, bias)(x)
    dense = functional.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    assert ((y.double() - dense).abs() <= error_bound(x, weight, bias, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x, weight, bias = sample(dtype)
    y = layer_of(weight, bias)(x)
    dense = functional.linear(x.double(), weight.double(), bias.double())
    rounding = torch.finfo(dtype).eps * dense.abs() + error_bound(x, weight, bias, torch.float32)
    assert y.dtype == dtype
    assert ((y.double() - dense).abs() <= rounding).all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gradient_is_the_dense_one_also_at_zero(with_bias):
    x, weight, bias = sample()
    bias = bias if with_bias else None
    layer, x = layer_of(weight, bias), x.requires_grad_()
    dense = nn.Linear(9, 5, with_bias, dtype=torch.float64)
    dense.load_state_dict(layer.state_dict())
    cotangent = drawn(6, 5, seed=4)
    ours = torch.autograd.grad(layer(x), (x, *layer.parameters()), cotangent)
    theirs = torch.autograd.grad(dense(x), (x, *dense.parameters()), cotangent)
    assert ((x == 0) & (ours[0] != 0)).any()
    assert ((layer.weight == 0) & (ours[1] != 0)).any()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_the_gradient_agrees_with_finite_differences_to_second_order():
    x, weight, bias = (t.requires_grad_() for t in (drawn(3, 4, seed=1), drawn(2, 4, seed=2), drawn(2, seed=3)))
    layer = LNSLinear(4, 2, dtype=torch.float64)

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


def test_transforms_give_what_the_dense_layer_gives():
    x, weight, bias = sample()
    ours, dense = layer_of(weight, bias, backend="rescaled"), nn.Linear(9, 5, dtype=torch.float64)
    dense.load_state_dict(ours.state_dict())

    def results(layer):
        def loss(x):
            return layer(x).pow(3).sum()

        def per_sample(parameters, row):
            return torch.func.functional_call(layer, parameters, (row,)).square().sum()

        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        yield torch.func.hessian(loss)(x)
        yield torch.func.jvp(torch.func.grad(loss), (x,), (x.cos(),))[1]
        yield torch.func.jacrev(layer)(x)
        yield torch.func.vmap(layer, in_dims=1, out_dims=1)(x[:, None].repeat(1, 3, 1))
        yield from torch.func.vmap(torch.func.grad(per_sample), in_dims=(None, 0))(parameters, x).values()

    for a, b in zip(results(ours), results(dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_forward_mode_agrees_with_the_dense_tangent(mode):
    x, weight, bias = sample()
    direction = drawn(6, 9, seed=5)
    layer = layer_of(weight, bias, mode=mode)
    reference = functional.linear if mode == "sum" else largest_term
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    value, pushed = torch.func.jvp(lambda x: layer(x), (x,), (direction,))
    expected = torch.func.jvp(lambda x: reference(x, weight, bias), (x,), (direction,))
    for found in (tangent, pushed):
        torch.testing.assert_close(found, expected[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=1e-12)


def test_max_mode_takes_the_largest_term_and_its_subgradient():
    x, weight, bias = sample()
    layer, x = layer_of(weight, bias, mode="max"), x.requires_grad_()
    cotangent = drawn(6, 5, seed=4)
    leaves = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = largest_term(*leaves)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=0)
    ours = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_a_zero_weight_learns_in_max_mode():
    layer = layer_of(torch.zeros(3, 4), torch.zeros(3), mode="max")
    layer(drawn(5, 4, dtype=torch.float32)).sum().backward()
    assert layer.weight.grad.abs().sum() + layer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("in_training", [True, False])
def test_the_layer_is_trained_as_the_dense_one(in_training):
    x, target = drawn(64, 12, dtype=torch.float32), drawn(64, 4, seed=9, dtype=torch.float32)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).train(in_training)
    ours = convert_linear_to_lns(dense, inplace=False).module
    losses = []
    for model in (dense, ours):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            loss = functional.mse_loss(model(x), target)
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0] < 0.8


def test_a_changed_weight_is_seen_at_once():
    x, weight, bias = sample()
    layer = layer_of(weight, bias).eval()
    before = layer(x)
    layer.weight.data.mul_(2.0)
    layer.bias.data.mul_(2.0)
    torch.testing.assert_close(layer(x), 2 * before, rtol=1e-12, atol=1e-12)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_the_state_dict_goes_to_a_fresh_layer_and_to_a_dense_one_and_back(tmp_path):
    source = LNSLinear(7, 3)
    source(drawn(2, 7, dtype=torch.float32)).sum().backward()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    dense, fresh = nn.Linear(7, 3), LNSLinear(7, 3)
    dense.load_state_dict(state)
    fresh.load_state_dict(dense.state_dict())
    assert torch.equal(fresh.weight, source.weight)
    assert torch.equal(fresh.bias, source.bias)


def test_the_start_is_that_of_the_dense_layer():
    torch.manual_seed(3)
    dense = nn.Linear(7, 3)
    torch.manual_seed(3)
    assert torch.equal(LNSLinear(7, 3).weight, dense.weight)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_zero_rows_answer_the_bias(mode):
    weight, bias = drawn(3, 4), torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    y = layer_of(weight, bias, mode=mode)(torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(y, bias.expand(2, 3), rtol=1e-15, atol=0)
    assert torch.equal(layer_of(weight, mode=mode)(torch.zeros(2, 4, dtype=torch.float64)), torch.zeros(2, 3).double())


def test_a_result_without_a_place_in_the_dtype_is_infinite_as_in_the_dense_layer():
    x = torch.full((1, 2), 1e30)
    weight = torch.tensor([[1e30, 1e30], [-1e30, -1e30], [1e-30, 2e-30]])
    y = layer_of(weight)(x)
    assert torch.equal(y[:, :2], functional.linear(x, weight)[:, :2])
    assert y[0, :2].tolist() == [math.inf, -math.inf]
    torch.testing.assert_close(y[:, 2], torch.tensor([3.0]), rtol=1e-4, atol=0)


def test_a_sum_is_finite_where_the_dense_layer_overflows_on_the_way():
    x = torch.tensor([[3e38, 3e38, -3e38]])
    y = layer_of(torch.ones(1, 3))(x)
    assert functional.linear(x[:, :2], torch.ones(1, 2)).isinf().all()
    torch.testing.assert_close(y, torch.tensor([[3e38]]), rtol=1e-4, atol=0)


def test_what_is_not_a_number_stays_in_its_row():
    x, weight, bias = sample(torch.float32)
    x[2, 3] = math.nan
    clean = layer_of(weight, bias)(x.nan_to_num())
    y = layer_of(weight, bias)(x)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[2] = weight[:, 3] != 0
    assert y[hit].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,), (2, 3, 4)])
def test_any_number_of_leading_axes(shape):
    x, layer = drawn(*shape, dtype=torch.float32).requires_grad_(), LNSLinear(4, 3)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 3)
    torch.testing.assert_close(y, functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert x.grad.shape == shape


def test_strides_do_not_matter():
    x, weight, bias = sample()
    layer = layer_of(weight, bias)
    assert torch.equal(layer(x.T.contiguous().T), layer(x))
    assert torch.equal(layer(x[::2]), layer(x[::2].contiguous()))


def test_the_guard_stops_the_gradient_of_what_cancels_and_of_nothing_else():
    x = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, -1.0 + 1e-6]], dtype=torch.float64)
    plain, guarded = layer_of(weight), layer_of(weight, cancellation_guard=1e-3)
    assert torch.equal(plain(x), guarded(x))
    (grad,) = torch.autograd.grad(guarded(x).sum(), x)
    assert torch.equal(grad, torch.stack([torch.zeros_like(weight[0]), weight[0]]))
    assert torch.equal(torch.autograd.grad(plain(x).sum(), x)[0], weight.expand(2, 2))
    guarded(x).sum().backward()
    assert torch.equal(guarded.weight.grad, x[1:].detach())
    pushed = torch.func.jvp(lambda x: guarded(x), (x.detach(),), (torch.ones_like(x),))[1]
    assert torch.equal(pushed[0], torch.zeros(1).double())
    assert pushed[1].item() == pytest.approx(1e-6)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_it_compiles_into_one_graph(mode):
    x, weight, bias = sample(torch.float32)
    layer = layer_of(weight, bias, mode=mode)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    grads = [
        torch.autograd.grad(run(x).square().sum(), (x, layer.weight))
        for run, x in zip((layer, compiled), leaves, strict=True)
    ]
    assert torch.equal(compiled(x), layer(x))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_changes_no_bit():
    x, weight, bias = sample(torch.float32)
    layer, x = layer_of(weight, bias), x.requires_grad_()
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


def test_only_the_operands_are_kept_for_the_backward_pass():
    layer, x = LNSLinear(64, 32), drawn(48, 64, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    storages = {t.untyped_storage().data_ptr() for t in kept}
    assert storages == {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.bias)}


def test_autocast_answers_in_its_dtype_and_computes_in_float32():
    x, weight, bias = sample(torch.float32)
    layer, x = layer_of(weight, bias), x.requires_grad_()
    outside = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
        half = layer(x.detach().bfloat16())
        inside.sum().backward()
    assert inside.dtype == half.dtype == torch.bfloat16
    assert torch.equal(inside, outside.bfloat16())
    torch.testing.assert_close(x.grad, weight.sum(0).expand(6, 9), rtol=1e-6, atol=1e-6)
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 5), (), (4, 0)])
def test_a_wrong_width_is_refused(shape):
    with pytest.raises(ShapeError, match=r"expected x \(\.\.\., 4\), got"):
        LNSLinear(4, 3)(torch.zeros(shape))


def test_wrong_numbers_and_options_are_refused():
    for x in (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.complex64)):
        with pytest.raises(DomainError, match="real floating-point"):
            LNSLinear(4, 3)(x)
    with pytest.raises(DomainError, match=r"x is torch\.float64, the weight torch\.float32"):
        LNSLinear(4, 3)(torch.zeros(2, 4, dtype=torch.float64))
    for options in ({"mode": "mean"}, {"cancellation_guard": -0.1}, {"cancellation_guard": math.nan}):
        with pytest.raises(ConfigError, match="expected"):
            LNSLinear(4, 3, **options)
    with pytest.raises(ConfigError, match="nothing cancels"):
        LNSLinear(4, 3, mode="max", cancellation_guard=0.1)
    with pytest.raises(ConfigError, match="at least 1"):
        LNSLinear(0, 3)
    with pytest.raises(BackendError, match="unknown backend"):
        LNSLinear(4, 3, backend="abacus")(torch.zeros(2, 4))


def test_the_text_form_says_how_it_computes():
    assert repr(LNSLinear(4, 3)) == "LNSLinear(in_features=4, out_features=3, bias=True, mode='sum')"
    layer = LNSLinear(4, 3, bias=False, cancellation_guard=0.1, backend="eager")
    assert layer.extra_repr() == (
        "in_features=4, out_features=3, bias=False, mode='sum', cancellation_guard=0.1, backend='eager'"
    )


def test_the_unsigned_product_of_logs():
    a, b = drawn(3, 5), drawn(5, 4, seed=1)
    expected = torch.logsumexp(a[:, :, None] + b, 1)
    for dtype in (torch.float64, torch.float32):
        c = lns_matmul(a.to(dtype), b.to(dtype))
        assert c.dtype == torch.float32
        torch.testing.assert_close(c.double(), expected, rtol=1e-6, atol=2e-6)
    largest = (a[:, :, None] + b).amax(1)
    torch.testing.assert_close(lns_matmul(a, b, mode="max"), largest.float())
    half = lns_matmul(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32
    exact = torch.logsumexp(a.bfloat16().double()[:, :, None] + b.bfloat16().double(), 1)
    torch.testing.assert_close(half.double(), exact, rtol=1e-6, atol=2e-6)
