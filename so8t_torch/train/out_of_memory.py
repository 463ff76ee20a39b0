"""What helps when the GPU runs out of memory in a training step, tried in order on the live model.

    free the cache → checkpointing on → split the micro-batch → lower the active rank → an error that says what fits

The loss is divided by the counts of the whole optimiser step, so a micro-batch in parts has the gradient it has whole.
What helped stays in force. A step that failed half-way is done again from its first micro-batch: its gradients are
partly added up, and nobody can tell which part.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from so8t_torch.core.failures import VRAMExhaustedError
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.ladder import Sink

MIB = 1 << 20


class MemoryRelief:
    """The remedies of one run.

    Args:
        model: in training.
        record: gets one mapping for each remedy.
        alone: whether no other process waits for this one's gradients; otherwise nothing is tried.
    """

    def __init__(self, model: nn.Module, record: Sink, *, alone: bool = True) -> None:
        self._model, self._record, self._alone = model, record, alone
        self.what_fits: Callable[[], list[str]] | None = None
        self.parts = 1
        self._freed_at: int | None = None

    def next(self, step: int, rows: int, error: str) -> str:
        """Apply the next remedy and return its name.

        Args:
            step: the optimiser step in which memory ran out.
            rows: of the micro-batch.
            error: what the framework said.

        Raises:
            VRAMExhaustedError: nothing is left to try.
        """
        # what lies on the heap of a failed step is freed in any case
        gc.collect()
        torch.cuda.empty_cache()
        remedy = self._remedy(step, rows)
        row = {"transition": "out of memory", "step": step, "remedy": remedy, "parts": self.parts}
        self._record(row | {"detail": error.partition("\n")[0]})
        if remedy is None:
            raise self._exhausted(step, rows)
        return remedy

    def _remedy(self, step: int, rows: int) -> str | None:
        if not self._alone:
            return None
        if self._freed_at != step:
            self._freed_at = step
            return "free"
        if not getattr(self._model, "is_gradient_checkpointing", True):
            checkpointing_on(self._model)
            return "checkpointing"
        if self.parts < rows:
            self.parts = min(2 * self.parts, rows)
            return "split"
        return "rank" if lower_rank(self._model) else None

    def _exhausted(self, step: int, rows: int) -> VRAMExhaustedError:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        tried = f"step {step} does not fit with checkpointing on, one row of {rows} at a time, at the smallest rank"
        if not self._alone:
            tried = (
                f"step {step} does not fit; with several processes a step is not tried again, the others wait for it"
            )
        fits = self.what_fits() if self.what_fits is not None else []
        return VRAMExhaustedError((total - free) / MIB, total / MIB, [tried, *fits])


def checkpointing_on(model: Any) -> None:
    """Recompute activations in the backward pass from now on."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def lower_rank(model: nn.Module) -> bool:
    """Halve the active rank of every layer that adapts it, down to its smallest; return whether one moved."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "active_rank")]
    movable = [layer for layer in layers if layer.active_rank > layer.min_rank]
    for layer in movable:
        layer.active_rank = max(layer.min_rank, layer.active_rank // 2)
    return bool(movable)


def split(inputs: Mapping[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    """Yield a micro-batch in parts of rows; values without a row for each are handed on as they are.

    Args:
        inputs: tensors by name, ``input_ids`` (rows, tokens) among them.
        parts: at most the number of rows.
    """
    rows = len(inputs["input_ids"])
    for part in torch.arange(rows).chunk(parts):
        first, last = int(part[0]), int(part[-1]) + 1
        yield {name: value[first:last] if _by_row(value, rows) else value for name, value in inputs.items()}


def _by_row(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows


def fitting(config: TrainConfig, limit: int) -> list[str]:
    """Return the largest batch and length, by the memory plan, that need no more than a card has.

    Args:
        config: the run that did not fit.
        limit: bytes.
    """
    from so8t_torch.train.plan import plan

    training, length = config.training, config.data.max_length
    while length >= 16:
        for rows in (training.batch_size, 1):
            new = training.model_copy(update={"batch_size": rows, "gradient_checkpointing": True})
            smaller = config.model_copy(
                update={"training": new, "data": config.data.model_copy(update={"max_length": length})}
            )
            need = plan(smaller).total
            if need <= limit:
                return [
                    f"training.batch_size {rows}, data.max_length {length} and training.gradient_checkpointing true: "
                    f"{need / MIB:,.0f} MiB of {limit / MIB:,.0f} by `so8t plan` (raise training.accumulation to keep "
                    "the batch)"
                ]
        length //= 2
    return [f"no batch and length fit {limit / MIB:,.0f} MiB by `so8t plan`: quantise the base, or use a larger card."]
