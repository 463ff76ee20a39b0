from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model

from so8t_torch import SO8TConfig
from so8t_torch.adapter import set_gate_routes
from so8t_torch.core.errors import AdapterError, TrainingError

ROWS = torch.tensor([True, False, False, True])


@pytest.fixture
def routed(make_model, shake):
    return shake(get_peft_model(make_model(), SO8TConfig(train_gates="routed", r=2)).double().train())


def summed_loss(model, ids):
    """A loss that is a sum over rows, so that separate backward passes add up."""
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def test_each_row_trains_its_own_factor_and_no_other(routed, make_model, shake, ids) -> None:
    routed.set_gate_routes(ROWS)
    summed_loss(routed, ids).backward()
    got = {n: p.grad for n, p in routed.named_parameters() if p.grad is not None}

    expected = {}
    for factor, rows in (("safe", ROWS), ("cmd", ~ROWS)):
        plain = shake(get_peft_model(make_model(), SO8TConfig(train_gates=factor, r=2)).double())
        summed_loss(plain, ids[rows]).backward()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0) + parameter.grad
    assert got.keys() == expected.keys()
    assert sum("so8t_safe" in n for n in got) == sum("so8t_cmd" in n for n in got) == 3
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12 * float(expected[name].abs().max()))


def test_all_rows_to_one_side_leave_the_other_factor_exactly_without_gradient(routed, ids) -> None:
    routed.set_gate_routes(torch.ones(4, dtype=torch.bool))
    summed_loss(routed, ids).backward()
    for name, parameter in routed.named_parameters():
        if "so8t_cmd" in name:
            assert parameter.grad is None or not parameter.grad.any()
        if "so8t_safe" in name:
            assert parameter.grad.any()


def test_the_forward_value_does_not_depend_on_the_routes(routed, ids) -> None:
    with torch.no_grad():
        plain = routed(ids).logits
    for rows in (ROWS, ~ROWS):
        routed.set_gate_routes(rows)
        assert torch.equal(routed(ids).logits, plain)


def test_routes_by_token(routed, ids) -> None:
    routed.set_gate_routes(ROWS)
    summed_loss(routed, ids).backward()
    by_row = {n: p.grad.clone() for n, p in routed.named_parameters() if p.grad is not None}
    routed.zero_grad()
    routed.set_gate_routes(ROWS[:, None].expand(ids.shape))
    summed_loss(routed, ids).backward()
    assert all(torch.equal(p.grad, by_row[n]) for n, p in routed.named_parameters() if p.grad is not None)


def test_routes_survive_non_reentrant_recomputation(routed, ids) -> None:
    routed.set_gate_routes(ROWS)
    summed_loss(routed, ids).backward()
    plain = {n: p.grad.clone() for n, p in routed.named_parameters() if p.grad is not None}
    routed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for afterwards in (ROWS, ~ROWS, torch.ones(3, dtype=torch.bool), None):
        routed.zero_grad(set_to_none=True)
        routed.set_gate_routes(ROWS)
        loss = summed_loss(routed, ids)
        routed.set_gate_routes(afterwards)
        loss.backward()
        got = {n: p.grad for n, p in routed.named_parameters() if p.grad is not None}
        assert got.keys() == plain.keys()
        assert all(torch.equal(got[n], plain[n]) for n in plain)


def test_dropped_routes_under_reentrant_checkpointing_are_an_error(routed, ids) -> None:
    routed.enable_input_require_grads()
    routed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    routed.set_gate_routes(ROWS)
    loss = summed_loss(routed, ids)
    routed.set_gate_routes(None)
    with pytest.raises(TrainingError, match="dropped between a forward pass and its backward pass"):
        loss.backward()


def test_training_without_routes_or_with_another_batch_is_refused(routed, ids) -> None:
    with pytest.raises(TrainingError, match="expected the routes of this batch"):
        routed(ids)
    routed.set_gate_routes(torch.ones(3, dtype=torch.bool))
    with pytest.raises(TrainingError, match=r"routes for a batch of shape \(4, 9\), got routes of shape \(3,\)"):
        routed(ids)
    with pytest.raises(TrainingError, match="expected a boolean tensor"):
        routed.set_gate_routes(torch.ones(4))


def test_evaluation_needs_no_routes_and_trains_nothing(routed, ids) -> None:
    with torch.no_grad():
        routed(ids)
    routed.eval()
    loss = summed_loss(routed, ids)
    loss.backward()
    for name, parameter in routed.named_parameters():
        if "so8t_safe" in name or "so8t_cmd" in name:
            assert parameter.grad is None
        if "so8t_lora_B" in name:
            assert parameter.grad.any()


def test_routes_reach_injected_layers_and_other_models_refuse_them(make_model, ids) -> None:
    model = inject_adapter_in_model(SO8TConfig(train_gates="routed"), make_model()).train()
    set_gate_routes(model, ROWS)
    summed_loss(model, ids).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "so8t_safe" in n)
    with pytest.raises(AdapterError, match="no SO\\(8\\) layers"):
        set_gate_routes(make_model(), ROWS)
