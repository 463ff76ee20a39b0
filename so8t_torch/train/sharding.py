"""Training with the weights in shards over the processes (FSDP2): what it needs, and how whole tensors come back.

Every process keeps a part of each weight; a module's weights are whole only while it runs, so the loss is computed
where the model calls its head. A 4-bit base stays whole in every process: accelerate does not cut it. Gathering is
collective: every process has to ask for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from so8t_torch.adapter.summary import whole
from so8t_torch.core.errors import TrainingError
from so8t_torch.nn.tensor_train_head import TensorTrainHead

_ADAPTER = ("so8t_", ".modules_to_save.")


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are in shards by now; they are whole until training begins."""
    return isinstance(model, FSDPModule)


def prepare_sharding(accelerator: Accelerator, model: nn.Module, optimiser: str) -> None:
    """Stop where shards were asked for and cannot work, and keep the gates' generators float32 where they can.

    Args:
        accelerator: the library's, before it wraps the model.
        model: still whole.
        optimiser: ``training.optimiser``.

    Raises:
        TrainingError: saying which setting to change.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise TrainingError(
                f"FSDP was asked for, but accelerate leaves it off for {accelerator.distributed_type}: it needs "
                "torchrun and GPUs. Unset ACCELERATE_USE_FSDP to train with whole weights in each process."
            )
        return
    wrong = list(_obstacles(plugin, model, optimiser))
    if wrong:
        raise TrainingError("Training on shards cannot begin: " + " ".join(wrong))
    # accelerate's policy would gather the generators in bfloat16, where a gate stops learning
    plugin.mixed_precision_policy = None


def _obstacles(plugin: Any, model: nn.Module, optimiser: str) -> Iterator[str]:
    if plugin.fsdp_version != 2:
        yield f"FSDP version {plugin.fsdp_version} flattens gates and base into one tensor; set FSDP_VERSION=2."
    if plugin.cpu_ram_efficient_loading:
        yield "Every process reads the base itself; set FSDP_CPU_RAM_EFFICIENT_LOADING=false."
    if isinstance(model, PeftModel) and getattr(model.get_base_model(), "is_loaded_in_8bit", False):
        yield "An 8-bit base cannot be cut into shards; set loading.quantization to nf4 or none."
    if not isinstance(model, PeftModel) and isinstance(_head(model), TensorTrainHead):
        yield "A tensor train that is its own head is not whole behind the model; set model.fields.htt_enabled=false."
    if optimiser != "adamw_torch":
        yield f"training.optimiser {optimiser} cannot step on shards; set adamw_torch."


def _head(model: Any) -> nn.Module:
    """Return what turns a model's states into logits."""
    return model.get_output_embeddings()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's numbers, or without one all, by the model's names, whole, on the CPU; a collective call.

    Args:
        model: with its weights in shards.
    """
    state = model.state_dict()
    parts = _ADAPTER if isinstance(model, PeftModel) else ("",)
    return {name: whole(value).cpu() for name, value in state.items() if any(part in name for part in parts)}
