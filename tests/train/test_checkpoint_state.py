"""State goes through safetensors and JSON and comes back bit for bit; what would run code is refused."""

import json
import math
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from so8t_torch.core.errors import CheckpointError
from so8t_torch.train import checkpoint_state, health
from so8t_torch.train.checkpoint_state import (
    generators,
    load_model,
    load_optimiser,
    pack,
    read_foreign,
    read_state,
    set_generators,
    unpack,
    write_model,
    write_state,
)
from tests.drawn import steadily

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
KEYS = st.text(max_size=3) | st.integers(-3, 3) | st.sampled_from(["$tensor", "$float", "$items", "$"])
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(tree=TREES)
@steadily
def test_every_plain_tree_comes_back(tree):
    plain, tensors = pack(tree)
    assert tensors == {}
    again = unpack(json.loads(json.dumps(plain, allow_nan=False)), {})
    assert again == tree
    assert repr(again) == repr(tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    value = torch.randn(5, 3).mul(100).abs().to(dtype)
    tree = {"a": [value, (value.T, value[0])], 0: {"a/0": value.sum().to(dtype)}, "nan": math.nan}
    write_state(tmp_path, "state", tree)
    again = read_state(tmp_path, "state")
    assert math.isnan(again.pop("nan"))
    assert torch.equal(again["a"][0], value)
    assert torch.equal(again["a"][1][0], value.T)
    assert torch.equal(again["a"][1][1], value[0])
    assert torch.equal(again[0]["a/0"], tree[0]["a/0"])
    assert again["a"][0].dtype == dtype


@pytest.mark.parametrize("odd", [object(), {1, 2}, np.float32(1), np.ones(2), torch.float32, b"bytes"])
def test_what_is_neither_plain_nor_a_tensor_is_named(odd):
    with pytest.raises(CheckpointError, match="state/a/0 is a "):
        pack({"a": [odd]})


@pytest.mark.parametrize("tree", [{"$tensor": "absent"}, {"$code": 1}])
def test_a_mark_without_meaning_is_refused(tree):
    with pytest.raises(CheckpointError, match="has no meaning here"):
        unpack(tree, {})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_a_state_that_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match="x cannot be read"):
        read_state(tmp_path, "x")


def test_a_state_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("[" + 200 * " ")
    monkeypatch.setattr(checkpoint_state, "MAX_JSON_BYTES", 200)
    with pytest.raises(CheckpointError, match=r"x\.json: expected at most 200 bytes, got 201"):
        read_state(tmp_path, "x")


def draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()


def test_all_generators_go_on_where_they_were(tmp_path):
    # an odd number of normal draws leaves one in store, which is state too
    draws()
    write_state(tmp_path, "generators", generators())
    first = draws()
    draws()
    set_generators(read_state(tmp_path, "generators"))
    assert draws() == first


def steps(model, optimiser, count):
    for _ in range(count):
        optimiser.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimiser.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_model_without_an_adapter_and_its_optimiser_go_on_exactly(tmp_path, kind):
    options = {"lr": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimiser = kind(model.parameters(), **options)
    steps(model, optimiser, 3)
    write_model(model, tmp_path, writes=True)
    write_state(tmp_path, "optimiser", optimiser.state_dict())
    steps(model, optimiser, 3)
    again = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    other = kind(again.parameters(), **options)
    load_model(again, tmp_path)
    load_optimiser(other, read_state(tmp_path, "optimiser"))
    steps(again, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_weights_of_another_shape_change_nothing(tmp_path):
    write_model(nn.Linear(4, 8), tmp_path, writes=True)
    other = nn.Linear(4, 9)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(CheckpointError, match=r"is \(8.*but the model has \(9"):
        load_model(other, tmp_path)
    with pytest.raises(CheckpointError, match="1 tensors are only in the file or only in the model"):
        load_model(nn.Linear(4, 8, bias=False), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["parameter", "moment", "frozen"])
def test_one_number_that_is_not_finite_is_found(value, place):
    model = nn.Linear(30, 40)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    model.register_parameter("frozen", frozen)
    optimiser = torch.optim.AdamW([model.weight, model.bias])
    model(torch.ones(2, 30)).sum().backward()
    optimiser.step()
    assert health.scan(model, optimiser, lambda found: found) == (True, True)
    target = {"parameter": model.weight, "moment": optimiser.state[model.weight]["exp_avg_sq"], "frozen": frozen}[place]
    target.data.view(-1)[-1] = value
    assert health.scan(model, optimiser, lambda found: found) == (place != "parameter", place != "moment")


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_foreign_file_runs_nothing(tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"weights": torch.ones(2), "odd": Malicious()}, path)
    with pytest.raises(CheckpointError, match="it stays unread"):
        read_foreign(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="it stays unread"):
        read_foreign(path)
    assert capsys.readouterr().out == ""


def test_a_foreign_file_of_tensors_is_read(tmp_path):
    torch.save({"logits": torch.ones(2), "step": 3, "dtype": "float32"}, tmp_path / "x.pt")
    assert read_foreign(tmp_path / "x.pt")["step"] == 3
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a list; expected a dictionary"):
        read_foreign(tmp_path / "x.pt")


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "no zip", "empty zip"])
def test_a_damaged_foreign_file_is_named(tmp_path, damage):
    path = tmp_path / "x.pt"
    torch.save({"logits": torch.ones(200)}, path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "no zip": b"text"}.get(damage, whole))
    if damage == "absent":
        path.unlink()
    if damage == "empty zip":
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        read_foreign(path)
