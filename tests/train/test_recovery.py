"""The face of the ladder for loops of one's own: every original stage, on live models (about four seconds)."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from so8t_torch.core.errors import SO8TError
from so8t_torch.core.failures import (
    HardwareCompatibilityError,
    InvalidConfigError,
    NumericalInstabilityError,
    VRAMExhaustedError,
    check_cuda_available,
    raise_numerical_instability,
    raise_vram_exhausted,
)
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer
from so8t_torch.train.ladder import Rules
from so8t_torch.train.recovery import ACTIONS, Phase1ErrorRecovery, create_recovery_context_manager
from so8t_torch.train.snapshots import SnapshotRing

ERROR = NumericalInstabilityError("1", {"has_nan": True})


class Settings:
    """Names of the original settings that recovery touches."""

    def __init__(self):
        self.stability_threshold = 1e-6
        self.gradient_norm_threshold = 10.0


def loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer, scale=1.0):
    optimizer.zero_grad()
    (scale * model(torch.randn(16, 8)).square().mean()).backward()
    optimizer.step()


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_seeds_own_call_reaches_every_stage_and_then_gives_up():
    """Optimiser, settings and model given each time: in the original that never left the first stage."""
    model, optimizer = loop()
    recovery = Phase1ErrorRecovery()
    recovery.save_checkpoint(model, optimizer, step=3)
    config = Settings()
    answers = [recovery.handle_numerical_instability(ERROR, optimizer, config, model) for _ in range(8)]
    assert answers == [True] * 7 + [False]
    taken = [row["action"] for row in recovery.history]
    assert taken[:5] == list(ACTIONS.values())[:5]
    assert taken[5:] == ["layer_reinitialization"] * 2 + ["stability_recovery_failed"]
    assert config.stability_threshold == pytest.approx(1e-5)
    assert config.gradient_norm_threshold == 1.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    summary = recovery.get_recovery_summary()
    assert summary["total"] == 7
    assert set(summary["actions"]) == set(list(ACTIONS.values())[:5])


def test_broken_weights_go_straight_back_to_the_snapshot_and_keep_the_cooled_rate():
    model, optimizer = loop()
    recovery = Phase1ErrorRecovery()
    recovery.save_checkpoint(model, optimizer, step=3)
    kept, moments = numbers(model), optimizer.state[model[0].weight]["exp_avg"].clone()
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 2e-4
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert recovery.handle_numerical_instability(ERROR, optimizer, None, model)
    assert recovery.history[-1]["action"] == "checkpoint_rollback"
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moments)
    assert optimizer.param_groups[0]["lr"] == 2e-4


def test_a_broken_moment_is_a_broken_state():
    model, optimizer = loop()
    recovery = Phase1ErrorRecovery()
    recovery.save_checkpoint(model, optimizer, step=3)
    optimizer.state[model[2].weight]["exp_avg_sq"][0, 0] = math.inf
    assert recovery.handle_numerical_instability(ERROR, optimizer, None, model)
    assert recovery.history[-1]["action"] == "checkpoint_rollback"
    assert torch.isfinite(optimizer.state[model[2].weight]["exp_avg_sq"]).all()


@pytest.mark.parametrize("component", ["0", "Embedding"])
def test_without_a_snapshot_the_broken_layer_alone_is_reset(component):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    broken = model[0] if component == "0" else model[2]
    others = {n: p.clone() for n, p in model.named_parameters() if all(p is not q for q in broken.parameters())}
    with torch.no_grad():
        broken.weight[0] = math.nan
    recovery = Phase1ErrorRecovery()
    assert recovery.handle_numerical_instability(NumericalInstabilityError(component, {}), optimizer, None, model)
    assert recovery.history[-1]["action"] == "layer_reinitialization"
    assert torch.isfinite(broken.weight).all()
    assert broken.weight not in optimizer.state
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in others.items())
    assert torch.equal(model[1].weight != 0, torch.ones(4, dtype=torch.bool)), "scales of a norm stay scales"


def test_a_failure_is_never_reported_as_a_recovery():
    """NaN weights, nothing to go back to, an unknown component: no stage can repair that."""
    model, optimizer = loop()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    recovery = Phase1ErrorRecovery()
    error = NumericalInstabilityError("AR_SSM", {})
    assert not recovery.handle_numerical_instability(error, optimizer, Settings(), model)
    assert not any(row["verified"] for row in recovery.history)
    assert not recovery.handle_numerical_instability(error)


def test_clipping_holds_for_steps_to_come_and_drops_what_is_not_finite():
    model, optimizer = loop()
    recovery = Phase1ErrorRecovery()
    for _ in range(2):
        assert recovery.handle_numerical_instability(ERROR, optimizer, None, model)
    seen = []
    optimizer.register_step_pre_hook(
        lambda held, *_: seen.append([p.grad.norm() for p in held.param_groups[0]["params"] if p.grad is not None])
    )
    step(model, optimizer, scale=1e4)
    assert torch.stack(seen[-1]).norm() <= 1 + 1e-5
    before = numbers(model)
    step(model, optimizer, scale=math.inf)
    assert seen[-1] == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_learning_rate_returns_and_the_ladder_comes_down():
    model, optimizer = loop()
    recovery = Phase1ErrorRecovery(rules=Rules(probation=5, cool_steps=5, cool_floor=0.5))
    for _ in range(3):
        recovery.handle_numerical_instability(ERROR, optimizer, None, model)
    rates = []
    for number in range(20):
        recovery.healthy_step(model, optimizer, number)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([5e-4] * 5 + [1e-3] * 15)
    assert recovery.ladder.level is None
    assert len(recovery.snapshots) == 0, "step 0 was on probation; the next snapshot is due at step 100"


def test_a_snapshot_shares_nothing_and_holds_every_generator():
    model, optimizer = loop()
    recovery = Phase1ErrorRecovery()
    assert recovery.save_checkpoint(model, optimizer, 3, {"cursor": [1, 2]})
    kept = recovery.snapshots.newest()
    expected = numbers(model)
    drawn = torch.rand(1), np.random.rand(), random.random()
    for _ in range(5):
        step(model, optimizer)
    assert all(torch.equal(value, expected[name]) for name, value in kept.model.items())
    assert kept.beside == {"cursor": [1, 2]}
    with torch.no_grad():
        model[0].bias[0] = math.inf
    assert recovery.handle_numerical_instability(ERROR, optimizer, None, model)
    assert (torch.rand(1), np.random.rand(), random.random()) == drawn


def test_an_unhealthy_moment_is_not_kept_and_the_ring_is_bounded():
    model, optimizer = loop()
    ring = SnapshotRing(count=3)
    for number in range(5):
        assert ring.take(model, optimizer, number, {})
    assert (len(ring), ring.newest().step) == (3, 4)
    small = SnapshotRing(max_bytes=2 * ring.newest().size)
    for number in range(5):
        small.take(model, optimizer, number, {})
    assert len(small) == 2
    optimizer.state[model[0].weight]["exp_avg"][0, 0] = math.nan
    assert not ring.take(model, optimizer, 9, {})
    assert ring.newest().step == 4


def test_the_context_recovers_or_raises_as_it_was():
    model, optimizer = loop()
    recovery = Phase1ErrorRecovery()
    with create_recovery_context_manager(recovery, model, optimizer):
        raise ERROR
    failing = Phase1ErrorRecovery(max_recovery_attempts=0)
    with (
        pytest.raises(NumericalInstabilityError, match="in 1") as caught,
        create_recovery_context_manager(failing, model, optimizer),
    ):
        raise ERROR
    assert caught.value is ERROR
    with pytest.raises(KeyError), create_recovery_context_manager(recovery, model, optimizer):
        raise KeyError("not a fault of this kind")


def test_counters_are_reset_and_the_history_stays():
    recovery = Phase1ErrorRecovery(max_recovery_attempts=0)
    model, optimizer = loop()
    assert not recovery.handle_numerical_instability(ERROR, optimizer, None, model)
    recovery.reset_recovery_counters()
    assert recovery.ladder.clock == 0
    assert len(recovery.history) == 1


def test_memory_is_saved_on_the_live_model_or_not_at_all():
    class Live(nn.Module):
        is_gradient_checkpointing = False

        def __init__(self):
            super().__init__()
            self.mixer = AdaptiveRankSemiseparableLayer(16, max_rank=8, min_rank=2)

        def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None):
            assert activation_checkpointing_kwargs == {"use_reentrant": False}
            self.is_gradient_checkpointing = True

    model, recovery, error = Live(), Phase1ErrorRecovery(), torch.OutOfMemoryError("CUDA out of memory")
    assert recovery.handle_vram_exhausted(error, None, model)
    assert model.is_gradient_checkpointing
    ranks = []
    while recovery.handle_vram_exhausted(error, None, model):
        ranks.append(model.mixer.active_rank)
    assert ranks == [4, 2]
    assert not recovery.handle_vram_exhausted(error, Settings(), None)
    with pytest.raises(torch.OutOfMemoryError), create_recovery_context_manager(recovery, model):
        raise error


@pytest.mark.parametrize(
    ("arguments", "present", "absent"),
    [
        ((9000, 8000, 4, 1024, True, True, False), ["4 → 2", "1024 → 512", "checkpointing", "rank", "LNS"], []),
        ((9000, 8000, 1, 512, False, False, True), ["mixed precision"], ["halve", "checkpointing on", "rank", "LNS"]),
    ],
)
def test_the_memory_error_lists_what_is_left(arguments, present, absent):
    with pytest.raises(VRAMExhaustedError) as caught:
        raise_vram_exhausted(*arguments)
    text = str(caught.value)
    assert all(word in text for word in present)
    assert not any(word in text for word in absent)
    assert (caught.value.current_mb, caught.value.limit_mb) == (9000, 8000)


def test_errors_carry_what_they_were_given():
    with pytest.raises(NumericalInstabilityError) as caught:
        raise_numerical_instability("BK_CORE", has_nan=True, gradient_norm=3.5, eigenvalue=-1.0)
    assert caught.value.component == "BK_CORE"
    assert caught.value.diagnostics == {"has_nan": True, "has_inf": False, "gradient_norm": 3.5, "eigenvalue": -1.0}
    assert isinstance(caught.value, RuntimeError)
    wrong = InvalidConfigError("rank", 0, "it must be at least 1")
    assert isinstance(wrong, ValueError)
    assert str(wrong).splitlines() == ["rank = 0 is not valid.", "  - it must be at least 1"]
    lacking = HardwareCompatibilityError("a CUDA device", "none", fallback="the CPU")
    assert "instead: the CPU" in str(lacking)
    assert all(isinstance(error, SO8TError) for error in (caught.value, wrong, lacking))


def test_a_machine_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareCompatibilityError, match="a CUDA device"):
        check_cuda_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_cuda_available()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(HardwareCompatibilityError, match="Triton"):
        check_cuda_available(require_triton=True)
