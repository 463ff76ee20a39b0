"""Recovery for a training loop of one's own: ``Phase1ErrorRecovery``, a face of the recovery ladder.

    stage of the ladder   action                          name in the history
    skip                  gradients dropped, damping × 10  increase_stability_threshold
    clip                  norm ≤ 1 on every step to come   enable_gradient_clipping
    cool                  learning rate × ½ for a while    reduce_learning_rate
    rollback              newest healthy snapshot          checkpoint_rollback
    reinitialise          one layer and its moments        layer_reinitialization
    stop                  the error is raised              stability_recovery_failed

A call takes the first stage, from the one the ladder names on, that applies and whose effect is then seen on the
model; nothing else counts as a recovery. Broken parameters begin at the roll-back. ``healthy_step`` takes snapshots,
gives the learning rate back and lets the ladder down. Runs of ``so8t train`` use the same ladder in ``guard``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from so8t_torch.core.failures import NumericalInstabilityError, VRAMExhaustedError
from so8t_torch.train.detection import layer_of
from so8t_torch.train.ladder import Cause, Fault, Ladder, Rules, Stage
from so8t_torch.train.out_of_memory import checkpointing_on, lower_rank
from so8t_torch.train.snapshots import SnapshotRing, broken, restore

logger = logging.getLogger(__name__)

ACTIONS = {
    Stage.SKIP: "increase_stability_threshold",
    Stage.CLIP: "enable_gradient_clipping",
    Stage.COOL: "reduce_learning_rate",
    Stage.ROLLBACK: "checkpoint_rollback",
    Stage.REINITIALISE: "layer_reinitialization",
    Stage.STOP: "stability_recovery_failed",
}

DAMPING = ("damping", "regularization", "stability_threshold")
"""Attributes of modules and settings that keep a computation away from a singularity; a larger value damps more."""

CLIP_NORM = 1.0
"""Bound on the gradient norm while the ladder clips."""


@dataclass(frozen=True)
class RecoveryResult:
    """What one stage did: ``applied`` says that it had something to act on, ``verified`` that its effect was seen."""

    action: str
    applied: bool
    verified: bool
    detail: str = ""


class Phase1ErrorRecovery:
    """Recovers a training loop from numerical faults and from running out of memory.

    Args:
        max_recovery_attempts: recoveries within ``recovery_window`` steps before giving up.
        enable_checkpoint_rollback: whether snapshots are restored.
        checkpoint_save_interval: steps between the snapshots of ``healthy_step``.
        enable_logging: whether each result is logged.
        rules: of the ladder; the default lets the learning rate be halved once before the roll-back.
    """

    def __init__(
        self,
        max_recovery_attempts: int = 5,
        enable_checkpoint_rollback: bool = True,
        checkpoint_save_interval: int = 100,
        enable_logging: bool = True,
        rules: Rules | None = None,
    ) -> None:
        self._rules = rules or Rules(cool_floor=0.5, recoveries=max_recovery_attempts, reinitialise=True)
        self.enable_checkpoint_rollback = enable_checkpoint_rollback
        self.checkpoint_save_interval = checkpoint_save_interval
        self._logs = enable_logging
        self.snapshots = SnapshotRing()
        self.history: list[dict[str, Any]] = []
        self._hooked: set[int] = set()
        self._rate = 1.0
        self.reset_recovery_counters()

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        step: int = 0,
        additional_state: Mapping[str, Any] | None = None,
    ) -> bool:
        """Take a snapshot unless something in it is not finite or a fault is on probation; return whether it was taken.

        Args:
            model: of the loop.
            optimizer: its moments are copied too.
            step: for the record.
            additional_state: whatever else must come back (scheduler, scaler, place in the data).
        """
        if self.ladder.open_incident:
            return False
        return self.snapshots.take(model, optimizer, step, additional_state or {})

    def healthy_step(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, step: int = 0) -> None:
        """Tell of a step without fault: probation goes on, and every ``checkpoint_save_interval`` a snapshot is due."""
        decision = self.ladder.observe(step, None)
        if optimizer is not None:
            self._set_rate(optimizer, decision.rate)
        if step % self.checkpoint_save_interval == 0:
            self.save_checkpoint(model, optimizer, step)

    def handle_numerical_instability(
        self,
        error: Exception,
        optimizer: torch.optim.Optimizer | None = None,
        config: Any = None,
        model: nn.Module | None = None,
    ) -> bool:
        """Recover from a numerical fault.

        Args:
            error: ``component``, where it has one, names a module by its path or its class.
            optimizer: of the loop.
            config: its damping settings are raised, if they can be set.
            model: of the loop.

        Returns:
            Whether a stage was applied and its effect verified; the loop then goes on with its next batch.
        """
        component = getattr(error, "component", None)
        fault = _fault(error, component, model, optimizer)
        while True:
            stage = self.ladder.observe(0, fault).stage
            assert stage is not None, "a fault always has a stage"
            result = self._take(stage, error, optimizer, config, model, component or fault.layer)
            self._note(result)
            if result.verified or stage is Stage.STOP:
                return result.verified

    def _take(
        self,
        stage: Stage,
        error: Exception,
        optimizer: torch.optim.Optimizer | None,
        config: Any,
        model: nn.Module | None,
        component: str | None,
    ) -> RecoveryResult:
        if stage is Stage.SKIP:
            return self._damp(model, config)
        if stage is Stage.CLIP:
            return self._clip(model, optimizer, config)
        if stage is Stage.COOL:
            return self._cool(optimizer, self.ladder.rate)
        if stage is Stage.ROLLBACK:
            return self._roll_back(model, optimizer)
        if stage is Stage.REINITIALISE:
            return self._reinitialise(model, optimizer, component)
        return RecoveryResult(ACTIONS[Stage.STOP], False, False, str(error))

    def handle_vram_exhausted(self, error: Exception, config: Any = None, model: nn.Module | None = None) -> bool:
        """Make the live model need less memory: checkpointing on, then a lower rank, then no logarithmic arithmetic.

        Args:
            error: for the record.
            config: settings that say the same are brought in line.
            model: without one nothing can be done, and ``False`` is returned.
        """
        torch.cuda.empty_cache()
        result = _less_memory(model, config) if model is not None else None
        self._note(result or RecoveryResult("vram_recovery_failed", False, False, str(error)))
        return result is not None

    def reset_recovery_counters(self) -> None:
        """Begin with an untouched ladder; the history stays."""
        self.ladder = Ladder(self._rules)

    def get_recovery_summary(self) -> dict[str, Any]:
        """Return how many recoveries there were, how many of each action, and the whole history."""
        done = [row for row in self.history if row["verified"]]
        counts = Counter(row["action"] for row in done)
        return {"total": len(done), "actions": dict(counts), "history": list(self.history), **self.ladder.state()}

    def _damp(self, model: nn.Module | None, config: Any) -> RecoveryResult:
        name = ACTIONS[Stage.SKIP]
        _drop_gradients(model)
        holders = [*([] if model is None else model.modules()), *([] if config is None else [config])]
        raised = [text for holder in holders if (text := _raise_damping(holder))]
        dropped = model is not None and all(p.grad is None for p in model.parameters())
        detail = "; ".join(raised) or "gradients dropped, nothing to damp"
        return RecoveryResult(name, bool(raised) or dropped, (bool(raised) or dropped) and not _damaged(model), detail)

    def _clip(self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, config: Any) -> RecoveryResult:
        name = ACTIONS[Stage.CLIP]
        if optimizer is None:
            return RecoveryResult(name, False, False, "no optimiser to hang the bound on")
        _drop_gradients(model)
        if id(optimizer) not in self._hooked:
            optimizer.register_step_pre_hook(lambda held, *_: self._bounded(held))
            self._hooked.add(id(optimizer))
        if hasattr(config, "gradient_norm_threshold"):
            _assign(config, "gradient_norm_threshold", CLIP_NORM)
        return RecoveryResult(name, True, self.ladder.clipping and not _damaged(model), f"norm ≤ {CLIP_NORM}")

    def _bounded(self, optimizer: torch.optim.Optimizer) -> None:
        """Hold the gradient norm; a gradient that is not finite drops the step."""
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self.ladder.clipping or not held:
            return
        norm = torch.nn.utils.clip_grad_norm_(held, CLIP_NORM)
        if not torch.isfinite(norm):
            for parameter in held:
                parameter.grad = None

    def _cool(self, optimizer: torch.optim.Optimizer | None, rate: float) -> RecoveryResult:
        name = ACTIONS[Stage.COOL]
        if optimizer is None:
            return RecoveryResult(name, False, False, "no optimiser")
        before = [group["lr"] for group in optimizer.param_groups]
        self._set_rate(optimizer, rate)
        after = [group["lr"] for group in optimizer.param_groups]
        lower = all(0 < now < then for now, then in zip(after, before, strict=True))
        return RecoveryResult(name, True, lower, f"{before} → {after}")

    def _set_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        if rate != self._rate:
            for group in optimizer.param_groups:
                group["lr"] *= rate / self._rate
            self._rate = rate

    def _roll_back(self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> RecoveryResult:
        name, snapshot = ACTIONS[Stage.ROLLBACK], self.snapshots.newest()
        if not self.enable_checkpoint_rollback or model is None or snapshot is None:
            return RecoveryResult(name, False, False, "no snapshot to go back to")
        rates = None if optimizer is None else [group["lr"] for group in optimizer.param_groups]
        restore(snapshot, model, optimizer)
        if optimizer is not None and rates is not None:
            # a cooled rate survives the roll-back
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        back = all(torch.equal(value.cpu(), snapshot.model[key]) for key, value in model.state_dict().items())
        return RecoveryResult(name, True, back and not broken(model, optimizer), f"snapshot of step {snapshot.step}")

    def _reinitialise(
        self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, component: str | None
    ) -> RecoveryResult:
        name = ACTIONS[Stage.REINITIALISE]
        found = None if model is None or component is None else find_component(model, component)
        if model is None or found is None:
            return RecoveryResult(name, False, False, f"no module is called {component}")
        path, module = found
        snapshot = self.snapshots.newest()
        if snapshot is not None and self.enable_checkpoint_rollback:
            prefix = f"{path}." if path else ""
            module.load_state_dict({key: snapshot.model[prefix + key] for key in module.state_dict()})
        else:
            reset_parameters(module)
        for parameter in module.parameters():
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
        return RecoveryResult(name, True, not broken(module), path)

    def _note(self, result: RecoveryResult) -> None:
        self.history.append(asdict(result))
        if self._logs:
            level = logging.WARNING if result.verified else logging.INFO
            logger.log(level, "%s: applied %s, verified %s. %s", *asdict(result).values())


def create_recovery_context_manager(
    recovery: Phase1ErrorRecovery,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    config: Any = None,
    training_state: Any = None,
) -> Any:
    """Return a context in which faults are recovered from; those that cannot be are raised as they were.

    Args:
        recovery: what handles them.
        model: of the loop.
        optimizer: of the loop.
        config: its settings.
        training_state: its ``stability_violations``, where it has them, are counted.
    """

    @contextmanager
    def protected() -> Iterator[None]:
        try:
            yield
        except NumericalInstabilityError as error:
            if hasattr(training_state, "stability_violations"):
                training_state.stability_violations += 1
            if not recovery.handle_numerical_instability(error, optimizer, config, model):
                raise
        except (VRAMExhaustedError, torch.OutOfMemoryError) as error:
            if not recovery.handle_vram_exhausted(error, config, model):
                raise

    return protected()


def find_component(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """Return path and module that a component's name means: a path, or a class of which there is one."""
    modules = dict(model.named_modules())
    if name in modules:
        return name, modules[name]
    of_class = [(path, module) for path, module in modules.items() if type(module).__name__ == name]
    return of_class[0] if len(of_class) == 1 else None


def reset_parameters(module: nn.Module) -> None:
    """Reset a module and all in it by their own ``reset_parameters``; what has none keeps its numbers."""
    for part in module.modules():
        own: Any = getattr(part, "reset_parameters", None)
        if callable(own):
            own()


def _fault(error: Exception, component: str | None, model: Any, optimizer: Any) -> Fault:
    bad = [] if model is None else broken(model, optimizer)
    moment = next((name for name in bad if ":" in name), None)
    if moment is None and not bad:
        return Fault(Cause.GRADIENT, component, str(error))
    cause = Cause.MOMENT if moment == bad[0] else Cause.PARAMETER
    return Fault(cause, component or layer_of(bad[0].partition(":")[0]), f"{bad[0]} is not finite")


def _damaged(model: nn.Module | None) -> bool:
    return model is not None and bool(broken(model))


def _drop_gradients(model: nn.Module | None) -> None:
    for parameter in () if model is None else model.parameters():
        parameter.grad = None


def _raise_damping(holder: Any) -> str:
    for name in DAMPING:
        value = getattr(holder, name, None)
        if isinstance(value, float) and value > 0 and _assign(holder, name, 10 * value):
            return f"{type(holder).__name__}.{name} {value:g} → {10 * value:g}"
    return ""


def _assign(holder: Any, name: str, value: Any) -> bool:
    """Set an attribute; return whether it then has the value, which it has not where the holder is frozen."""
    try:
        setattr(holder, name, value)
    except (AttributeError, TypeError, ValueError):
        return False
    return getattr(holder, name) == value


def _less_memory(model: nn.Module, config: Any) -> RecoveryResult | None:
    live: Any = model
    if hasattr(live, "activation_checkpointing_enable") and not live.is_gradient_checkpointing:
        checkpointing_on(live)
        for name in ("use_gradient_checkpointing", "checkpoint_ar_ssm"):
            if hasattr(config, name):
                _assign(config, name, True)
        return RecoveryResult("enable_gradient_checkpointing", True, bool(live.is_gradient_checkpointing))
    if lower_rank(model):
        return RecoveryResult("reduce_ar_ssm_rank", True, True)
    logarithmic = [module for module in model.modules() if getattr(module, "lns_enabled", False) is True]
    for module in logarithmic:
        _assign(module, "lns_enabled", False)
    return RecoveryResult("disable_lns", True, True) if logarithmic else None
