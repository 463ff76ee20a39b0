"""What helps when the GPU runs out of memory, tried in order on the live model.

    a training step    free the cache → checkpointing on → split the micro-batch → lower the active rank → error
    evaluation         free the cache → split the batch → error
    the optimiser      take the step back → free the cache → step once more → error
    clipping           free the cache → clip once more → error
    anything else      error

The error says what would fit. The loss is divided by the counts of the whole optimiser step, so a micro-batch in parts
has the gradient it has whole; a physics term, which is no sum over rows, is another for each part. What helped stays in
force, also in a run that is taken up from a checkpoint. A step that
failed half-way is done again from its first micro-batch: its gradients are partly added up, and nobody can tell which
part.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from so8t_torch.core.errors import SO8TError
from so8t_torch.core.failures import VRAMExhaustedError
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.ladder import Sink
from so8t_torch.train.undo import Undo

T = TypeVar("T")

MIB = 1 << 20

SHORTER = "shorter rows need less: lower data.max_length, or data.text.length"
LESS_TO_TRAIN = (
    "fewer trained numbers, or training.optimiser adamw_8bit, which keeps its moments in a quarter of the memory"
)


class MemoryRelief:
    """The remedies of one run, which a checkpoint carries along.

    Args:
        model: in training.
        record: gets one mapping for each remedy.
        alone: whether no other process waits for this one's gradients; otherwise nothing is tried.

    ``what_fits`` gets the card's bytes and returns sentences about settings that fit; asked when nothing helped.
    """

    name, open_incident = "memory", False

    def __init__(self, model: nn.Module, record: Sink, *, alone: bool = True) -> None:
        self._model, self._record, self._alone = model, record, alone
        self.what_fits: Callable[[int], list[str]] | None = None
        self.parts = self.evaluation_parts = 1
        self._freed_at: int | None = None
        self._checkpointing = self._lowered = False

    def state(self) -> dict[str, Any]:
        """Return which remedies are in force, as JSON values."""
        ranks = {name: layer.active_rank for name, layer in _ranked(self._model).items()} if self._lowered else {}
        parts = {"parts": self.parts, "evaluation_parts": self.evaluation_parts, "freed_at": self._freed_at}
        return {**parts, "checkpointing": self._checkpointing, "ranks": ranks}

    def load(self, state: dict[str, Any]) -> None:
        """Put the remedies in force that ``state`` told."""
        self.parts, self.evaluation_parts = state["parts"], state["evaluation_parts"]
        self._freed_at, self._checkpointing = state["freed_at"], state["checkpointing"]
        if self._checkpointing and not is_checkpointing(self._model):
            checkpointing_on(self._model)
        self._lowered = bool(state["ranks"])
        layers = _ranked(self._model)
        for name, rank in state["ranks"].items():
            layers[name].active_rank = rank

    def next(self, step: int, rows: int, error: str, *, evaluating: bool = False) -> str:
        """Apply the next remedy and return its name.

        Args:
            step: the optimiser step in which memory ran out.
            rows: of the micro-batch.
            error: what the framework said.
            evaluating: whether no gradients were asked for, so that recomputing would save nothing.

        Raises:
            VRAMExhaustedError: nothing is left to try.
        """
        _free()
        remedy = self._remedy(step, rows, evaluating)
        self._note(step, remedy, "evaluation" if evaluating else "step", error)
        if remedy is None:
            if evaluating:
                raise self._exhausted(f"a row of the held-out data does not fit at step {step}", SHORTER)
            raise self._exhausted(
                f"step {step} does not fit with checkpointing on, one row of {rows} at a time, at the smallest rank",
                *self._settings(),
            )
        return remedy

    def once_more(self, step: int, act: Callable[[], T]) -> T:
        """Return what an act gives that changes nothing before it has all its memory, done again with the cache freed.

        Args:
            step: the optimiser step under way.
            act: done at most twice.
        """
        try:
            return act()
        except torch.OutOfMemoryError as error:
            if not self._alone:
                raise
            said = str(error)
        _free()
        self._note(step, "free", "clipping", said)
        return act()

    def unrelieved(self, step: int, error: str) -> VRAMExhaustedError:
        """Return the error for memory that ran out where there is no remedy.

        Args:
            step: the optimiser step in which it happened.
            error: what the framework said.
        """
        _free()
        self._note(step, None, "between steps", error)
        return self._exhausted(
            f"step {step} does not fit beside what is held between steps", SHORTER, *self._settings()
        )

    def evaluated(self, step: int, inputs: Mapping[str, Any], measure: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """Return what a batch measures, row by row, in parts where it does not fit at once.

        Args:
            step: the last optimiser step.
            inputs: of the batch, as ``split`` says.
            measure: from a part of them to a tensor with a row for each of its rows.

        Raises:
            VRAMExhaustedError: nothing helped.
        """
        rows = len(inputs["input_ids"])
        while True:
            try:
                return torch.cat([measure(part) for part in split(inputs, min(self.evaluation_parts, rows))])
            except torch.OutOfMemoryError as error:
                said = str(error)
            self.next(step, rows, said, evaluating=True)

    def watch(self, optimizer: torch.optim.Optimizer, step: Callable[[], int]) -> None:
        """Have a step of the optimiser in which memory runs out taken back, and taken once more with the cache freed.

        Args:
            optimizer: before anything wraps its ``step``.
            step: returns the number of the step under way.
        """
        inner = optimizer.step

        def patient(_: torch.optim.Optimizer, *args: Any) -> Any:
            undo = Undo(optimizer) if self._alone else None
            for freed in (False, True):
                try:
                    return inner(*args)
                except torch.OutOfMemoryError as error:
                    said = str(error)
                self._take_back(undo, step(), said, freed=freed)
            return None

        # what wraps it next asks for a method
        vars(optimizer)["step"] = MethodType(patient, optimizer)

    def _take_back(self, undo: Undo | None, step: int, error: str, *, freed: bool) -> None:
        whole = undo is not None and undo.take_back()
        _free()
        remedy = "free" if whole and not freed else None
        self._note(step, remedy, "optimiser", error)
        if remedy is None:
            half = (
                "" if whole else "; it may be half done, so the run has to go on from a checkpoint, with --resume auto"
            )
            raise self._exhausted(f"the optimiser's part of step {step} does not fit{half}", LESS_TO_TRAIN)

    def _remedy(self, step: int, rows: int, evaluating: bool) -> str | None:
        if not self._alone:
            return None
        if self._freed_at != step:
            self._freed_at = step
            return "free"
        if not evaluating and not is_checkpointing(self._model):
            checkpointing_on(self._model)
            self._checkpointing = True
            return "checkpointing"
        if evaluating and self.evaluation_parts < rows:
            self.evaluation_parts = min(2 * self.evaluation_parts, rows)
            return "split"
        if not evaluating and self.parts < rows:
            self.parts = min(2 * self.parts, rows)
            return "split"
        if evaluating or not lower_rank(self._model):
            return None
        self._lowered = True
        return "rank"

    def _note(self, step: int, remedy: str | None, place: str, error: str) -> None:
        row = {"transition": "out of memory", "step": step, "place": place, "remedy": remedy}
        parts = {"parts": self.parts, "evaluation_parts": self.evaluation_parts}
        self._record(row | parts | {"detail": error.partition("\n")[0]})

    def _exhausted(self, tried: str, *more: str) -> VRAMExhaustedError:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        if not self._alone:
            tried += "; with several processes nothing is tried, since the others wait"
        return VRAMExhaustedError((total - free) / MIB, total / MIB, [tried, *more])

    def _settings(self) -> list[str]:
        """Return sentences about settings that fit, where the plan can tell."""
        total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
        if self.what_fits is None or not total:
            return [SHORTER]
        try:
            return self.what_fits(total)
        except SO8TError as error:
            return [SHORTER, f"so8t plan cannot tell what fits: {error}"]


def _free() -> None:
    """Return what nobody holds to the card, also what lies on the heap of a failed step."""
    gc.collect()
    torch.cuda.empty_cache()


def is_checkpointing(model: Any) -> bool:
    """Whether activations are recomputed in the backward pass, or the model does not know how to."""
    return bool(getattr(model, "is_activation_checkpointing", True))


def checkpointing_on(model: Any) -> None:
    """Recompute activations in the backward pass from now on."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def lower_rank(model: nn.Module) -> bool:
    """Halve the active rank of every layer that adapts it, down to its smallest; return whether one moved."""
    movable = [layer for layer in _ranked(model).values() if layer.active_rank > layer.min_rank]
    for layer in movable:
        layer.active_rank = max(layer.min_rank, layer.active_rank // 2)
    return bool(movable)


def _ranked(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "active_rank")}


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
    sizes = [training.batch_size >> i for i in range(training.batch_size.bit_length())]
    while length >= 16:
        for rows in sizes:
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
