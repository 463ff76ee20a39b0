"""The training step: supervised cross-entropy in chunks, plus the penalty, on transformers' ``Trainer``.

    L = Σ_n nll_n / N_tokens + λ(step) PET + physics

N_tokens and PET's denominator count the whole optimiser step, over every micro-batch and process, so accumulation
4 × 1 is batch 4. The loop, the schedule, checkpoints and distribution are the library's; this class supplies the loss,
the parameter groups, the held-out loss (token-weighted, like the training one) and the checks that stop a run whose
loss cannot train anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from so8t_torch.adapter import gate_summary, so8t_param_groups
from so8t_torch.adapter.summary import whole
from so8t_torch.core.errors import TrainingError
from so8t_torch.data.batches import Collator
from so8t_torch.data.chat import Encoded
from so8t_torch.ops.second_difference import schedule_weight
from so8t_torch.train.checkpointed import CheckpointedTrainer, Keeping
from so8t_torch.train.config import PenaltySection, TrainingSection
from so8t_torch.train.guard import Guard
from so8t_torch.train.loss import LossAtHead, Watch, row_sums
from so8t_torch.train.manifest import Health
from so8t_torch.train.meter import LossMeter, held_out_metrics
from so8t_torch.train.out_of_memory import MemoryRelief, split
from so8t_torch.train.penalty import ResidualTap, gated_layers, penalty, triples
from so8t_torch.train.physics import Physics, PhysicsSection
from so8t_torch.train.rollback import RollbackRequested
from so8t_torch.train.sharding import is_sharded, prepare_sharding

LAST_STATES = -1
"""Key under which the tap keeps the states that go into the head."""

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class SO8TTrainer(CheckpointedTrainer):
    """Trains an adapted causal language model.

    Args:
        model: PEFT model around a Hugging Face decoder.
        args: the library's training arguments.
        rows: encoded training conversations.
        held_out: encoded held-out conversations, perhaps none.
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
        model: PeftModel,
        args: TrainingArguments,
        rows: Sequence[Encoded],
        held_out: Sequence[Encoded],
        collator: Collator,
        training: TrainingSection,
        penalty: PenaltySection,
        callbacks: Sequence[TrainerCallback] = (),
        keeping: Keeping | None = None,
        guard: Guard | None = None,
        physics: PhysicsSection | None = None,
    ) -> None:
        check_trainable(model)
        self.guard = guard or Guard()
        self.guard.remember_start(model)
        self.guard.on_drop, self.guard.samples, self.guard.go_back = self._take_back, self._samples, self._go_back
        super().__init__(
            model,
            args,
            rows,
            keeping or Keeping(),
            eval_dataset=held_out or None,
            data_collator=collator,
            compute_metrics=held_out_metrics,
            callbacks=[self.guard, *callbacks],
        )
        self.extras.append(self.guard)
        if self.args.n_gpu > 1:
            raise TrainingError("Several GPUs in one process are not supported; start with torchrun --nproc-per-node.")
        prepare_sharding(self.accelerator, model, training.optimiser)
        # The loss below is already divided by the counts of the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._training, self._penalty = training, penalty
        decoder, head = decoder_and_head(model)
        layers = gated_layers(decoder) if penalty.enabled else {}
        self._tap = ResidualTap({**layers, LAST_STATES: decoder})
        self._at_head = LossAtHead(head, LAST_STATES, chunk=training.loss_chunk)
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
        self.relief = MemoryRelief(model, self.guard.ladder.record, alone=self.args.world_size == 1)

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
        self._taken += 1
        todo = [inputs]
        while True:
            try:
                return [self._in_parts(model, each, num_items_in_batch) for each in todo][-1]
            except torch.OutOfMemoryError as error:
                said = str(error)
            self.relief.next(self.state.global_step + 1, len(inputs["input_ids"]), said)
            todo = self._micro_batches[: self._taken]
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
        nll, mask, streams = self._forward(model, inputs)
        language = nll.sum() / (nll.numel() if num_items_in_batch is None else num_items_in_batch)
        weight = self._weight()
        # What this step uses; by the time it is logged the schedules have moved on.
        self._settings = {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self._settings["pet_weight"] = weight
        pet = nll.new_zeros(())
        if streams:
            pet = penalty(streams, mask, self._triples, huber_delta=self._penalty.huber_delta)
        loss = (language + weight * pet + self._physics.part(mask)) * self.accelerator.num_processes
        self._check(loss, pet)
        self.guard.examination.saw_loss(language, loss / self.accelerator.num_processes)
        self._meter.add(self.state.global_step, nll.sum(), nll.numel(), mask.sum(), pet, weight)
        return loss

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the supervised losses, the attention mask and the streams after the gated layers."""
        if "routes" in inputs:
            self.model.base_model.set_gate_routes(inputs["routes"])
        with self._physics.observe():
            (nll, _), states = self._losses(model, inputs)
        return nll, inputs["attention_mask"], list(states.values())

    def _losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Tensor, Tensor], dict[int, Tensor]]:
        """Return the supervised losses with their rows, and the streams after the gated layers."""
        names = ("input_ids", "attention_mask", "position_ids")
        # the library evaluates a model in evaluation mode, and asks for gradients' exchange after the last micro-batch
        watch = self.watch(self.state) if model.training and self.accelerator.sync_gradients else None
        with self._tap.open() as states, self._at_head.open(inputs["labels"], states, watch) as losses:
            model(**{name: inputs[name] for name in names}, use_cache=False, logits_to_keep=1)
        del states[LAST_STATES]
        return losses.result(), states

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
            norm = super()._clip_grad_norm(model)
        finally:
            self.args.max_grad_norm = usual
        self.guard.examination.saw_norm(whole(norm))
        return norm

    def unhealthy(self, health: Health) -> None:
        """Let the ladder answer a state that must not be written."""
        self.guard.check_state(self.optimizer.optimizer)
        super().unhealthy(health)

    def _go_back(self, reason: str, steps_back: int) -> RollbackRequested | None:
        return self.rollback(reason, steps_back=steps_back)

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
        with torch.no_grad():
            (nll, rows), _ = self._losses(model, inputs)
            sums = row_sums(nll, rows, inputs["labels"].shape[0])
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


def decoder_and_head(model: PeftModel) -> tuple[nn.Module, nn.Module]:
    """Return the stack of layers and the output embedding of an adapted causal language model.

    Raises:
        TrainingError: the model changes its logits after the head, which the chunked loss does not.
    """
    plain = model.get_base_model()
    for name in LOGIT_TRANSFORMS:
        if getattr(plain.config, name, None) not in (None, 1, 1.0):
            raise TrainingError(f"{type(plain).__name__} applies {name} to its logits; the chunked loss does not.")
    return plain.get_decoder(), plain.get_output_embeddings()


def check_trainable(model: nn.Module) -> None:
    """Stop unless something is trainable and every gate parameter is float32.

    Raises:
        TrainingError: naming what is missing or the parameter of the wrong dtype.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError("Nothing is trainable: every parameter of the model is frozen; check the adapter section.")
    for name, parameter in model.named_parameters():
        if ("so8t_safe" in name or "so8t_cmd" in name) and parameter.dtype != torch.float32:
            raise TrainingError(f"{name} is {parameter.dtype}; gate generators must be float32 or they cannot move.")


def check_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Stop unless the groups hold exactly the trainable parameters, each once.

    Raises:
        TrainingError: naming parameters that no group or two groups hold.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = [id(p) for group in groups for p in group["params"]]
    wrong = [name for key, name in names.items() if held.count(key) != 1]
    if wrong or len(held) != len(names):
        raise TrainingError(f"The optimiser must hold every trainable parameter once; not so for {wrong[:5]}.")


def geometry(model: nn.Module) -> dict[str, float]:
    """Return the gates' geometry: angles in radians overall and by layer, commutator distance, orthogonality error."""
    gates = gate_summary(model)
    if not gates:
        return {}
    each = list(gates.values())
    return {
        "gate/max_angle": max(gate.max_angle for gate in each),
        "gate/mean_angle": sum(gate.mean_angle for gate in each) / len(each),
        "gate/commutator": sum(gate.commutator for gate in each) / len(each),
        "gate/orthogonality_error": max(gate.orthogonality_error for gate in each),
    } | {f"gate_angle/{_short(name)}": gate.mean_angle for name, gate in gates.items()}


def _short(name: str) -> str:
    """Return ``"4.o_proj"`` for ``"…layers.4.self_attn.o_proj"``."""
    parts = name.split(".")
    return ".".join([*(part for part in parts if part.isdecimal()), parts[-1]])
