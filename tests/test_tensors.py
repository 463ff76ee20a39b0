"""What is no tensor is named in the error, whichever public function of a room it is given to."""

import importlib
import inspect

import pytest
import torch

from so8t_torch.core.errors import DomainError
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none
from so8t_torch.ops import tensor_train

ROOMS = (
    "hebbian",
    "linear_recurrence",
    "physics",
    "rank_gate",
    "resonance",
    "rotation",
    "second_difference",
    "semiseparable",
    "snr_filter",
    "triality",
    "tridiagonal",
    "zeta",
)
OTHERS = {"step": 1.0, "rate": 0.1, "width": 4, "start": 1.0, "end": 0.5, "progress": 0.5, "layer": lambda x: x}
MATRICES = {"a": torch.ones(28), "safe": torch.eye(8), "rotation": torch.eye(8)[None], "weight": torch.eye(8)}


def functions():
    for room in ROOMS:
        module = importlib.import_module(f"so8t_torch.ops.{room}")
        for name in module.__all__:
            function = getattr(module, name)
            parameters = inspect.signature(function).parameters.values()
            tensors = [p.name for p in parameters if "Tensor" in str(p.annotation) and p.name not in OTHERS]
            for argument in tensors:
                yield pytest.param(function, argument, id=f"{room}.{name}-{argument}")


@pytest.mark.parametrize("value", [[0.5], 0.5], ids=["list", "number"])
@pytest.mark.parametrize(("function", "argument"), tuple(functions()))
def test_a_function_names_the_argument(function, argument, value):
    given = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == argument:
            given[argument] = value
        elif parameter.default is inspect.Parameter.empty:
            given[parameter.name] = {**OTHERS, **MATRICES}.get(parameter.name, torch.ones(8))
    kind = type(value).__name__
    with pytest.raises(DomainError, match=rf"expected (\w+ )?{argument}( \w+)? to be a tensor, got {kind} .*as_tensor"):
        function(**given)


def test_a_tensor_train_names_what_it_is_made_of():
    core = torch.ones(2, 1, 1, 2)
    for ids, cores, name in (([0], (core, core), "ids"), (torch.zeros(1).long(), (core, [1.0]), "core 1")):
        with pytest.raises(DomainError, match=f"expected {name} to be a tensor, got list"):
            tensor_train.rows(ids, *cores)
    with pytest.raises(DomainError, match="expected hidden to be a tensor, got float"):
        tensor_train.logits(0.5, core, core)


def test_the_text_is_short_however_long_the_argument():
    with pytest.raises(DomainError, match="room: expected x to be a tensor, got list") as caught:
        expect_tensors("room", y=torch.ones(()), x=[0.0] * 100_000)
    assert len(str(caught.value)) < 200


def test_only_what_may_be_left_out_is():
    expect_tensors_or_none("room", x=None, y=torch.ones(1))
    with pytest.raises(DomainError, match="got NoneType None"):
        expect_tensors("room", x=None)
    with pytest.raises(DomainError, match="expected y to be a tensor"):
        expect_tensors_or_none("room", x=None, y=1)
