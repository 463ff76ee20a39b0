"""Parameter groups for any optimiser: gates apart, without weight decay, with 32-bit optimiser state.

Weight decay would pull a gate towards the identity, and 8-bit moments are too coarse for 28 numbers per block.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from so8t_torch.adapter.layer import GeneratorDict

GATES = ("so8t_safe", "so8t_cmd")


def so8t_param_groups(model: nn.Module, lr: float, gate_lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups: gates, matrices, and vectors (biases, norms).

    Args:
        model: wrapped by PEFT, or with injected layers.
        lr: learning rate of everything but the gates.
        gate_lr: learning rate of the gates.
        weight_decay: of matrices; gates and vectors get none.

    Returns:
        groups for ``torch.optim`` and bitsandbytes optimisers, empty ones left out; with bitsandbytes installed its
        8-bit optimisers are told to keep the gates' state in 32 bits.
    """
    gates = {id(p): p for m in model.modules() if isinstance(m, GeneratorDict) for p in m.values() if p.requires_grad}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]
    groups: list[dict[str, Any]] = [
        {"params": list(gates.values()), "lr": gate_lr, "weight_decay": 0.0, "name": "gates"},
        {"params": [p for p in others if p.ndim > 1], "lr": lr, "weight_decay": weight_decay, "name": "matrices"},
        {"params": [p for p in others if p.ndim <= 1], "lr": lr, "weight_decay": 0.0, "name": "vectors"},
    ]
    _keep_full_state(list(gates.values()), others)
    return [group for group in groups if group["params"]]


def _keep_full_state(gates: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    if gates and importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        # known by address for as long as the process lives: one of these may lie where a gate of another model lay
        for parameter in others:
            manager.pid2config.pop(id(parameter), None)
        manager.override_config(gates, "optim_bits", 32)
