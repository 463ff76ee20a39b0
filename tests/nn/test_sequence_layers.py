"""What the three layers that mix tokens have in common: devices without data, packed rows, and what they refuse."""

import pytest
import torch

from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.core.segments import segment_ids_from_cu_seqlens
from so8t_torch.nn.dissipative_bk import DissipativeBKLayer
from so8t_torch.nn.hebbian import DissipativeHebbianLayer
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer

WIDTH = 6
LAYERS = {
    "bk": lambda **kind: DissipativeBKLayer(WIDTH, channels=2, adaptive_hopping=True, memory_heads=2, **kind),
    "bk, full": lambda **kind: DissipativeBKLayer(WIDTH, mode="full", hermitian=False, **kind),
    "hebbian": lambda **kind: DissipativeHebbianLayer(WIDTH, 2, 4, eta_mode="token", feedback_channels=2, **kind),
    "hebbian, delta": lambda **kind: DissipativeHebbianLayer(WIDTH, 2, 4, rule="delta", **kind),
    "semiseparable": lambda **kind: AdaptiveRankSemiseparableLayer(WIDTH, 5, 2, adaptive_time_step=True, **kind),
    "semiseparable, compat": lambda **kind: AdaptiveRankSemiseparableLayer(WIDTH, 5, 2, core="compat", **kind),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(name, **kind):
    torch.manual_seed(3)
    return LAYERS[name](**kind)


def answer(module, *arguments, **options):
    """Return the outputs of the tokens and the states after them."""
    found = module(*arguments, **options)
    if isinstance(module, DissipativeBKLayer):
        return found.features, found.state
    y, rest = found
    return y, rest["state"] if isinstance(rest, dict) else rest


def parts(state):
    return () if state is None else (state,) if isinstance(state, torch.Tensor) else tuple(state)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_are_known_without_data(name, dtype):
    with torch.device("meta"):
        module = layer(name, dtype=dtype)
    assert all(tensor.is_meta for tensor in module.parameters())
    real = layer(name, dtype=dtype)
    x, ids = drawn(2, 9, WIDTH).to(dtype), torch.arange(9) // 4
    y, state = answer(module, x.to("meta"), segment_ids=ids.to("meta"))
    wanted, last = answer(real, x, segment_ids=ids)
    for found, expected in zip((y, *parts(state)), (wanted, *parts(last)), strict=True):
        assert found.is_meta
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    y.float().sum().backward()
    assert all(parameter.grad.is_meta for parameter in module.parameters() if parameter.grad is not None)


@every_layer
def test_one_numbering_serves_all_rows(name):
    module, x = layer(name), drawn(2, 9, WIDTH)
    ids = segment_ids_from_cu_seqlens(torch.tensor([0, 2, 7]), 9)
    assert ids.shape == (9,)
    wanted, last = answer(module, x, segment_ids=ids.expand(2, 9))
    for numbers in (ids, ids[None]):
        found, state = answer(module, x, segment_ids=numbers)
        assert torch.equal(found, wanted)
        assert all(torch.equal(a, b) for a, b in zip(parts(state), parts(last), strict=True))
    assert not torch.equal(answer(module, x)[0], wanted)


@every_layer
def test_numbers_that_fit_no_row_are_refused(name):
    module, x = layer(name), drawn(2, 9, WIDTH)
    for shape in ((8,), (2, 8), (3, 9), (1,), (2, 1), (1, 2, 9)):
        with pytest.raises(ShapeError, match="segment_ids"):
            module(x, segment_ids=torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(DomainError, match="whole numbers"):
        module(x, segment_ids=torch.zeros(9))


@every_layer
@pytest.mark.parametrize("x", [[[[0.0] * WIDTH]], 1.0, None, "x"], ids=["list", "number", "nothing", "word"])
def test_what_is_no_tensor_is_named(name, x):
    module = layer(name)
    with pytest.raises(DomainError, match=f"expected x to be a tensor, got {type(x).__name__}"):
        module(x)
    with pytest.raises(DomainError, match="expected segment_ids to be a tensor, got list"):
        module(drawn(1, 2, WIDTH), segment_ids=[0, 1])
