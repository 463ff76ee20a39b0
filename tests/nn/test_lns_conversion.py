"""What turning dense layers into sign–log ones touches, keeps and refuses."""

import copy

import pytest
import torch
from torch import nn

from so8t_torch.core.errors import ConfigError
from so8t_torch.nn.lns_linear import LNSLinear, convert_linear_to_lns


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, ids):
        return self.head(self.inner(self.again(self.first(self.embedding(ids)))))


def test_conversion_keeps_parameters_ties_and_objects():
    model, ids = Tied(), torch.arange(11)
    before, layer, parameters = model(ids), model.first, list(model.parameters())
    done = convert_linear_to_lns(model)
    assert done.module is model
    assert set(done.converted) == {"head", "first", "inner.0"}
    assert done.kept == ()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.embedding.weight
    assert model.first is model.again is layer
    assert isinstance(layer, LNSLinear)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
    assert convert_linear_to_lns(model) == (model, (), ())


def test_a_predicate_chooses():
    model = Tied()
    done = convert_linear_to_lns(
        model, mode="max", predicate=lambda name, layer: name != "head" and layer.bias is not None
    )
    assert set(done.converted) == {"first", "inner.0"}
    assert done.kept == ("head",)
    assert type(model.head) is nn.Linear
    assert model.first.mode == "max"


def test_a_copy_leaves_the_original_dense():
    model = Tied()
    copied = convert_linear_to_lns(model, inplace=False).module
    assert type(model.first) is nn.Linear
    assert isinstance(copied.first, LNSLinear)
    assert copied.first is copied.again
    assert copied.head.weight is copied.embedding.weight
    assert copied.first.weight is not model.first.weight


def test_the_root_itself_can_be_converted_and_copied():
    root = nn.Linear(4, 3)
    done = convert_linear_to_lns(root)
    assert done.module is root
    assert done.converted == ("",)
    twin = copy.deepcopy(root)
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), root(x))


def refused(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ConfigError, match=r"1: ") as error:
        convert_linear_to_lns(model)
    assert type(model[0]) is nn.Linear
    assert convert_linear_to_lns(model, predicate=lambda name, _: name == "0").kept == ("1",)
    return str(error.value)


def test_derived_layers_are_refused_by_name_and_nothing_is_converted():
    assert "LazyLinear" in refused(nn.LazyLinear(4))
    assert "ParametrizedLinear" in refused(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert "NonDynamicallyQuantizableLinear" in refused(nn.MultiheadAttention(4, 1).out_proj)
    strange = nn.Linear(4, 4)
    strange.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert "torch.int8" in refused(strange)
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    assert "has been replaced" in refused(patched)


def test_quantised_layers_are_refused_by_name():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert "Linear4bit" in refused(bitsandbytes.nn.Linear4bit(4, 4))
    assert "Linear8bitLt" in refused(bitsandbytes.nn.Linear8bitLt(4, 4, has_fp16_weights=False))
