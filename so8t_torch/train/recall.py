"""Short trainings of a language model, on a task of ``data.recall``, and its accuracy against the distance."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from so8t_torch.adapter import so8t_param_groups
from so8t_torch.core.config import Section
from so8t_torch.core.errors import TrainingError
from so8t_torch.data.chat import IGNORED
from so8t_torch.data.recall import RecallSection

__all__ = ["FittingSection", "RecallTrainingSection", "accuracy", "fit", "train_recall"]

TOKENS_AT_ONCE = 16384
"""Tokens of the rows that are judged together."""


class FittingSection(Section):
    """Steps and rates of a short training."""

    steps: int = Field(default=600, ge=1, description="Optimiser steps.")
    learning_rate: float = Field(default=3e-3, gt=0, description="Its largest value; it falls as a cosine.")
    warmup: int = Field(default=20, ge=0, description="Steps until it is reached.")
    weight_decay: float = Field(default=0.01, ge=0, description="Of matrices; vectors have none.")


class RecallTrainingSection(FittingSection):
    """How a model is trained on a task; each batch draws its distance, evenly in the logarithm.

    The largest distance grows from ``shortest`` to ``longest``, evenly in the logarithm, while ``growing`` of the steps
    are taken.
    """

    rows: int = Field(default=16, ge=1, description="Rows of a batch.")
    shortest: int = Field(default=16, ge=1, description="Least distance of a batch.")
    longest: int = Field(default=256, ge=1, description="Largest distance of a batch.")
    growing: float = Field(default=0.0, ge=0, le=1, description="Share of the steps in which that distance is reached.")

    @model_validator(mode="after")
    def _ordered(self) -> RecallTrainingSection:
        if self.longest < self.shortest:
            raise ValueError(f"expected longest ≥ shortest, got {self.longest} < {self.shortest}")
        return self

    def distance(self, step: int, share: float) -> int:
        """Return the distance of a batch.

        Args:
            step: number of the batch, from 0.
            share: place between the least distance and the largest of this step, in [0, 1).
        """
        grown = min(1.0, step / (self.growing * self.steps)) if self.growing else 1.0
        return round(self.shortest * (self.longest / self.shortest) ** (share * grown))


class _Batches(IterableDataset):
    """Batches of one task without end, the same ones for the same seed."""

    def __init__(self, task: RecallSection, settings: RecallTrainingSection, seed: int) -> None:
        self.task, self.settings, self.seed = task, settings, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for step in itertools.count():
            distance = self.settings.distance(step, float(torch.rand((), generator=generator)))
            yield self.task.batch(self.settings.rows, distance, generator)._asdict()


class _Silent(Trainer):
    """A trainer whose losses are kept and not printed, and whose parameters are grouped as in every other training."""

    optimizer: Any

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            rate, trained = self.args.learning_rate, self.model if model is None else model
            groups = so8t_param_groups(trained, rate, rate, weight_decay=self.args.weight_decay)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def log(self, logs: dict[str, float], *_: object) -> None:
        self.state.log_history.append(logs)


def train_recall(
    model: PreTrainedModel, task: RecallSection, settings: RecallTrainingSection, *, seed: int = 0
) -> list[float]:
    """Train a model in place and return the loss of every step.

    Args:
        model: causal language model with the vocabulary of the task or more.
        task: what it is to learn.
        settings: how.
        seed: of the batches.

    Raises:
        ConfigError: the task has no rows of the shortest distance.
        TrainingError: a loss is not finite.
    """
    task.length(settings.shortest)
    return fit(model, _Batches(task, settings, seed), settings, seed=seed)


def fit(model: PreTrainedModel, batches: IterableDataset, settings: FittingSection, *, seed: int = 0) -> list[float]:
    """Train a model in place on whole batches, and return the loss of every step.

    Args:
        model: causal language model.
        batches: what the model is called with, one after the other.
        settings: steps and rates.
        seed: of what the model draws.

    Raises:
        TrainingError: a loss is not finite.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=1,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta2=0.95,
            warmup_steps=settings.warmup,
            lr_scheduler_type="cosine",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            seed=seed,
            dataloader_num_workers=0,
        )
        trainer = _Silent(model, arguments, train_dataset=batches, data_collator=lambda found: found[0])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    broken = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if broken is not None:
        raise TrainingError(f"fit: the loss of step {broken} is not finite; lower the learning rate.")
    return losses


@torch.no_grad()
def accuracy(
    model: nn.Module, task: RecallSection, distances: Iterable[int], *, rows: int = 64, seed: int = 1
) -> dict[int, float]:
    """Return the share of right answers at each distance, the model in evaluation mode for the while.

    Args:
        model: causal language model.
        task: what is asked.
        distances: each at least ``task.least_distance``.
        rows: rows per distance.
        seed: of the rows.

    Raises:
        ConfigError: a distance is too short for the task.
    """
    was_training = model.training
    model.eval()
    found = {}
    device = next(model.parameters()).device
    for distance in distances:
        generator = torch.Generator().manual_seed(seed)
        right = asked = 0
        left, most = rows, max(1, TOKENS_AT_ONCE // task.length(distance))
        while left:
            batch = task.batch(min(left, most), distance, generator)
            left -= len(batch.input_ids)
            labels = batch.labels[:, 1:].to(device)
            wanted = labels != IGNORED
            guesses = model(input_ids=batch.input_ids.to(device), use_cache=False).logits[:, :-1].argmax(-1)
            right += int((guesses == labels)[wanted].sum())
            asked += int(wanted.sum())
        found[distance] = right / asked
    model.train(was_training)
    return found
