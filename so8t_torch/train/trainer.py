"""The training step: supervised cross-entropy in chunks, plus the penalty, on transformers' ``Trainer``.

    L = Σ_n nll_n / N_tokens + λ(step) PET + Σ_m (N_m / N_tokens) aux_m + physics

aux_m is what a model adds to the loss of micro-batch m by itself (``aux_loss`` of its output). N_tokens and PET's
denominator count the whole optimiser step, over every micro-batch and process, so accumulation 4 × 1 is batch 4. The
loop, the schedule, checkpoints and distribution are the library's; this class supplies the loss, the parameter groups,
the held-out loss (token-weighted, like the training one) and the checks that stop a run whose loss trains nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from so8t_torch.adapter import so8t_param_groups
from so8t_torch.adapter.summary import whole
from so8t_torch.core.errors import TrainingError
from so8t_torch.data.chat import Encoded
from so8t_torch.ops.second_difference import schedule_weight
from so8t_torch.train.checkpoint_state import generators, set_generators
from so8t_torch.train.checkpointed import CheckpointedTrainer, Keeping
from so8t_torch.train.config import PenaltySection, TrainingSection
from so8t_torch.train.guard import Guard
from so8t_torch.train.loss import LossAtHead, Watch, row_sums
from so8t_torch.train.manifest import Health
from so8t_torch.train.meter import LossMeter, perplexity
from so8t_torch.train.out_of_memory import MemoryRelief, split
from so8t_torch.train.penalty import ResidualTap, gated_layers, penalty, triples
from so8t_torch.train.physics import Physics, PhysicsSection
from so8t_torch.train.preconditions import check_groups, check_trainable, decoder_and_head
from so8t_torch.train.rollback import RollbackRequested
from so8t_torch.train.sharding import is_sharded, prepare_sharding
from so8t_torch.train.trained import geometry, input_names

LAST_STATES = -1
"""Key under which the tap keeps the states that go into the head."""


class SO8TTrainer(CheckpointedTrainer):
    """Trains a causal language model: what an adapter adds to a frozen one, or all of it.

    Args:
        model: PEFT model around a Hugging Face decoder, or a language model to be trained whole.
        args: the library's training arguments.
        rows: encoded training conversations, or packed text.
        held_out: the same, perhaps none; where it knows its ``bytes``, the loss is told in bits per byte, too.
        collator: stacks rows into batches.
        training: optimiser, batch and loss settings.
        penalty: settings of PET.
        callbacks: further callbacks.
        keeping: how checkpoints are marked, and how many stay.
        guard: watches the steps and recovers from their faults.
        physics: settings of the physics terms.
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Encoded],
        held_out: Sequence[Encoded],
        collator: Callable[[Sequence[Encoded]], dict[str, Tensor]],
        training: TrainingSection,
        penalty: PenaltySection,
        callbacks: Sequence[TrainerCallback] = (),
        keeping: Keeping | None = None,
        guard: Guard | None = None,
        physics: PhysicsSection | None = None,
    ) -> None:
        check_trainable(model)
        self.guard = guard or Guard()
        self.guard.on_drop, self.guard.samples, self.guard.go_back = self._take_back, self._samples, self._go_back
        super().__init__(
            model,
            args,
            rows,
            keeping or Keeping(),
            eval_dataset=held_out or None,
            data_collator=collator,
            compute_metrics=functools.partial(_held_out_metrics, size=getattr(held_out, "bytes", None)),
            callbacks=[self.guard, *callbacks],
        )
        self.guard.initial = self.start.numbers
        self.extras.append(self.guard)
        if self.args.n_gpu > 1:
            raise TrainingError("Several GPUs in one process are not supported; start with torchrun --nproc-per-node.")
        prepare_sharding(self.accelerator, model, training.optimiser)
        # The loss below is already divided by the counts of the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._training, self._penalty = training, penalty
        self._inputs = input_names(model)
        decoder, head = decoder_and_head(model)
        layers = gated_layers(decoder) if penalty.enabled else {}
        self._tap = ResidualTap({**layers, LAST_STATES: decoder})
        inside = any(part is head for part in model.modules())
        self._at_head = LossAtHead(head, LAST_STATES, chunk=training.loss_chunk, called=inside)
        self._physics = Physics(
            physics or PhysicsSection(), decoder, self.args.seed, self.args.process_index, self._over_processes
        )
        self.add_callback(self._physics)
        self._meter = LossMeter(self.args.device)
        self._triples = torch.tensor(0)
        self._settings: dict[str, float] = {}
        self.watch: Callable[[TrainerState], Watch | None] = lambda _: None
        """Who sees the logits of a step's last micro-batch; asked before each."""
        self._kept: tuple[Tensor, dict[str, float]] | None = None
        self._micro_batches: list[Any] = []
        self._taken = 0
        self._generators: dict[str, Any] = {}
        self.relief = MemoryRelief(model, self.guard.ladder.record, alone=self.args.world_size == 1)
        self.extras.append(self.relief)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train; throughput is counted from here."""
        self._meter.reset()
        return super().train(resume_from_checkpoint, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the held-out loss; its time does not count as training time.

        Raises:
            TrainingError: several processes, and training has not begun; the library would then never wrap the model,
                and the processes would train apart without an error.
        """
        wrapped = self.model_wrapped is not self.model or is_sharded(self.model)
        if self.args.world_size > 1 and not wrapped:
            raise TrainingError("With several processes evaluate after train() has begun; set eval_on_start instead.")
        with self._meter.paused():
            return super().evaluate(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimiser over gates (their own rate, no decay), LoRA and modules trained whole."""
        if self.optimizer is None:
            groups = so8t_param_groups(
                self.model if model is None else model,
                self._training.lr,
                self._training.gate_lr,
                weight_decay=self._training.weight_decay,
            )
            check_groups(self.model, groups)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
            self.relief.watch(self.optimizer, lambda: self.state.global_step + 1)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of one optimiser step and its number of supervised tokens; count its triples."""
        samples, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.guard.begin(self.state.global_step + 1)
        self._meter.mark()
        self._micro_batches, self._taken = samples, 0
        self._kept = (self._tr_loss.clone(), self._settings)
        self._physics.begin(self.state.global_step, [batch["attention_mask"] for batch in samples], device)
        if self._penalty.enabled and samples:
            count = torch.stack([triples(batch["attention_mask"]) for batch in samples]).sum()
            self._triples = self._over_processes(count.to(device))
        return samples, tokens

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take a micro-batch; where memory runs out, try on the live model what may help, and take it again.

        Raises:
            VRAMExhaustedError: nothing helped.
        """
        if not self._taken:
            self._generators = generators()
        self._taken += 1
        todo = [inputs]
        while True:
            try:
                return [self._in_parts(model, each, num_items_in_batch) for each in todo][-1]
            except torch.OutOfMemoryError as error:
                said = str(error)
            self.relief.next(self.state.global_step + 1, len(inputs["input_ids"]), said)
            todo = self._micro_batches[: self._taken]
            set_generators(self._generators)
            model.zero_grad()
            self._meter.undo()
            self._physics.undo()
            self.guard.begin(self.state.global_step + 1)
            self._step_loss = (-1, None)

    def _in_parts(self, model: nn.Module, inputs: dict[str, Any], tokens: Tensor | int | None) -> Tensor:
        """Return a micro-batch's loss, summed over the parts in which it is taken."""
        parts = [inputs] if self.relief.parts == 1 else split(inputs, self.relief.parts)
        return torch.stack([super(SO8TTrainer, self).training_step(model, part, tokens) for part in parts]).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's part of the step's loss.

        Raises:
            TrainingError: nothing trainable reaches the loss; the step is named.
        """
        del return_outputs
        nll, streams, extra = self._forward(model, inputs)
        tokens = nll.numel() if num_items_in_batch is None else num_items_in_batch
        language = nll.sum() / tokens
        weight = self._weight()
        mask = inputs["attention_mask"]
        # What this step uses; by the time it is logged the schedules have moved on.
        self._settings = {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self._settings["pet_weight"] = weight
        pet = nll.new_zeros(())
        if streams:
            pet = penalty(streams, mask, self._triples, huber_delta=self._penalty.huber_delta)
        extra = extra * nll.numel() / tokens
        loss = (language + weight * pet + extra + self._physics.part(mask)) * self.accelerator.num_processes
        self._check(loss, pet)
        self.guard.examination.saw_loss(language, loss / self.accelerator.num_processes)
        self._meter.add(self.state.global_step, nll.sum(), nll.numel(), mask.sum(), pet, weight, extra)
        return loss

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the supervised losses, the streams after the gated layers, and what the model adds to the loss."""
        if "routes" in inputs:
            self.model.base_model.set_gate_routes(inputs["routes"])
        with self._physics.observe():
            (nll, _), states, extra = self._losses(model, inputs)
        return nll, list(states.values()), nll.new_zeros(()) if extra is None else extra

    def _losses(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, Tensor], dict[int, Tensor], Tensor | None]:
        """Return the supervised losses with their rows, the streams after the gated layers, the model's own loss."""
        # the library evaluates a model in evaluation mode, and asks for gradients' exchange after the last micro-batch
        watch = self.watch(self.state) if model.training and self.accelerator.sync_gradients else None
        with self._tap.open() as states, self._at_head.open(inputs["labels"], states, watch) as losses:
            output = model(**{name: inputs[name] for name in self._inputs}, use_cache=False, logits_to_keep=1)
        del states[LAST_STATES]
        return losses.result(), states, getattr(output, "aux_loss", None)

    def _weight(self) -> float:
        if not self._penalty.enabled:
            return 0.0
        progress = self.state.global_step / max(1, self.state.max_steps)
        return schedule_weight(progress, boundaries=self._penalty.boundaries, weights=self._penalty.weights)

    def _check(self, loss: Tensor, pet: Tensor) -> None:
        needed = {"the loss": loss, "the penalty": pet} if self._penalty.enabled else {"the loss": loss}
        for name, value in needed.items():
            if not value.requires_grad:
                where = f"Step {self.state.global_step + 1}"
                raise TrainingError(f"{where}: {name} has no gradient; nothing trainable lies before it.")

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip as the library does, to a tighter bound while the ladder clips; show the guard what was there."""
        self.guard.examination.saw_gradients(self.state.global_step + 1)
        usual = self.args.max_grad_norm
        self.args.max_grad_norm = self.guard.norm_bound(usual)
        try:
            clip = super()._clip_grad_norm
            norm = self.relief.once_more(self.state.global_step + 1, lambda: clip(model))
        finally:
            self.args.max_grad_norm = usual
        self.guard.examination.saw_norm(whole(norm))
        return norm

    def unhealthy(self, health: Health) -> None:
        """Let the ladder answer a state that must not be written."""
        self.guard.check_state(self.optimizer.optimizer)
        super().unhealthy(health)

    def _go_back(self, reason: str, steps_back: int) -> RollbackRequested:
        return self.rollback(reason, steps_back=steps_back)

    def begin_anew(self) -> None:
        """Be as the run was before its first step, with nothing summed up or seen."""
        super().begin_anew()
        self._meter.reset()
        self._settings = {}
        self._physics.begin_anew()
        self.guard.begin_anew()

    def _samples(self, step: int) -> list[int]:
        """Return the span of the stream that a step reads."""
        assert self.stream is not None, "a run has samples"
        return list(self.stream.span(self.consumption.after(step - 1), self.consumption.after(step)))

    def _take_back(self) -> None:
        """Take the dropped step's losses out of what is logged."""
        if self._kept is not None:
            self._tr_loss.copy_(self._kept[0])
            self._settings = self._kept[1]
        self._meter.undo()
        self._physics.undo()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return for each row its summed loss and its number of supervised tokens."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)

        def measure(part: dict[str, Any]) -> Tensor:
            (nll, rows), *_ = self._losses(model, part)
            return row_sums(nll, rows, part["labels"].shape[0])

        with torch.no_grad():
            sums = self.relief.evaluated(self.state.global_step, inputs, measure)
        return None, sums, sums[:, 1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms, the learning rate of each group and the gates' geometry to a training log entry.

        Steps that the ladder dropped count in none of them; an interval without any other has no entry.
        """
        if "loss" in logs:
            kept, dropped = self.guard.counted()
            if not kept:
                return
            logs["loss/total"] = logs.pop("loss") * ((kept + dropped) / kept if dropped else 1)
            logs.pop("learning_rate", None)
            if not math.isfinite(logs.get("grad_norm", 0)):
                del logs["grad_norm"]
            logs |= self._meter.read(self._over_processes)
            logs |= self._settings | self._physics.read() | geometry(self.model)
            self._meter.reset()
            self._physics.reset()
        super().log(logs, start_time)

    def orthogonality_error(self) -> float | None:
        """Return the largest entry of RᵀR − I over the gates, ``None`` without gates."""
        return geometry(self.model).get("gate/orthogonality_error")

    def loop_state(self) -> dict[str, Any]:
        """Return the sums of this process since the last log entry."""
        return super().loop_state() | {
            "meter": self._meter.state(),
            "settings": self._settings,
            "physics": self._physics.state(),
            "guard": self.guard.sight(),
        }

    def load_loop_state(self, state: Mapping[str, Any]) -> None:
        """Take up what ``loop_state`` returned."""
        super().load_loop_state(state)
        self._meter.load(state["meter"])
        self._settings = dict(state["settings"])
        self._physics.load(state["physics"])
        self.guard.load_sight(state["guard"])

    def phases(self) -> dict[str, Any]:
        """Return the place in the schedules, the penalty's weight among them."""
        return super().phases() | {"pet_weight": self._weight()}

    def _over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.accelerator.num_processes > 1 else value


def _held_out_metrics(prediction: EvalPrediction, size: int | None) -> dict[str, float]:
    """Return the token-weighted loss over every row; a row counts by its tokens, not by its batch.

    Args:
        prediction: summed loss and number of tokens of each row.
        size: bytes of text that the rows predict, where they are known.
    """
    nll, tokens = prediction.predictions.sum(0).tolist()
    found = {"lm": nll / tokens, "perplexity": perplexity(nll / tokens), "supervised_tokens": tokens}
    return found if size is None else found | {"bits_per_byte": nll / math.log(2) / size}
