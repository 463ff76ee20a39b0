"""The settings of one training run, as ``so8t train`` reads them.

Every section stands beside its default; contradictions between sections are collected and reported together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from so8t_torch.core.config import Section
from so8t_torch.data.chat import TooLong
from so8t_torch.data.intake import ReadingSection
from so8t_torch.data.records import Columns
from so8t_torch.data.scenarios import ScenarioSection
from so8t_torch.data.text import TextSection
from so8t_torch.train.physics import PhysicsSection
from so8t_torch.train.scratch import ScratchBase

Positive = Annotated[int, Field(ge=1)]

SHORTEST_HISTORY = 10
"""Losses from which a median and a spread can be told from noise."""


class PretrainedBase(Section):
    """A base model read from a directory or a hub id."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    revision: str | None = None


class ModelSection(Section):
    """A language model that is trained whole, from nothing or from a saved one.

    ``phase1`` and ``phase2`` are this library's, ``llama`` and ``mamba`` those of transformers, to compare with.
    ``fields`` are those of the kind's configuration, and replace a preset's; the tokenizer sets ``vocab_size``.
    ``init_from`` is a run or a model's folder: weights, configuration and, where it holds one, the tokenizer are taken
    from there (``data.text.tokenizer`` then says nothing), ``fields`` may change what changes no shape, and all weights
    train, those that were frozen before as well.
    """

    kind: Literal["phase1", "phase2", "llama", "mamba"]
    preset: str | None = None
    init_from: Path | None = None
    fields: dict[str, bool | int | float | str | None] = Field(default_factory=dict)


class LoadingSection(Section):
    """How the frozen base is held in memory.

    ``dtype: auto`` is bfloat16 where the card has it and float32 elsewhere. ``float32_rest`` turns embeddings, norms
    and the head of a quantised base into float32 (PEFT's preparation); off, they keep ``dtype`` and half the memory.
    A model that is trained whole stays float32 and computes in ``dtype``.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "nf4", "int8"] = "none"
    double_quantization: bool = True
    float32_rest: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


class AdapterSection(Section):
    """Where gates and LoRA go; the fields are those of ``SO8TConfig``. ``target_modules: []`` installs no gate."""

    target_modules: list[str] = Field(default_factory=lambda: ["o_proj"])
    layers_to_transform: list[int] | None = None
    layers_pattern: str | None = None
    exclude_modules: list[str] | None = None
    chart: Literal["exp", "cayley"] = "exp"
    shared: bool = False
    train_gates: Literal["safe", "cmd", "routed"] = "safe"
    r: Annotated[int, Field(ge=0)] = 0
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_target_modules: list[str] | None = None
    lora_layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    modules_to_save: list[str] | None = None


class DataSection(Section):
    """What is learned: files, generated scenarios, or running text; ``template`` names a marked Jinja file."""

    train: Path | None = None
    eval: Path | None = None
    scenarios: ScenarioSection | None = None
    text: TextSection | None = None
    columns: Columns = Columns()
    reading: ReadingSection = ReadingSection()
    template: Path | None = None
    max_length: Positive = 1024
    too_long: TooLong = "truncate"


class PenaltySection(Section):
    """The second-difference penalty (PET) on the residual stream after the gated layers.

    ``weights[i]`` holds up to the share ``boundaries[i]`` of the optimiser steps, the last one to the end.
    """

    enabled: bool = False
    weights: tuple[float, float, float] = (0.01, 0.05, 0.1)
    boundaries: tuple[float, float] = (0.2, 0.6)
    huber_delta: Annotated[float, Field(ge=0)] = 0.0


class TrainingSection(Section):
    """Optimiser, schedule and batch; give ``max_steps`` or ``epochs``. ``warmup`` is a share of the steps.

    ``loss_chunk`` is the number of supervised positions whose logits exist at once; ``beta2`` is Adam's average of
    squared gradients. ``gradient_checkpointing`` null does as the model's preset says, and not without one.
    """

    max_steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 1
    accumulation: Positive = 1
    optimiser: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    gate_lr: Annotated[float, Field(gt=0)] = 5e-3
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool | None = None
    loss_chunk: Positive = 256


class RecordingSection(Section):
    """How often the run is written down; ``tensorboard`` and ``progress`` switch those two off or on."""

    every_steps: Positive = 10
    tensorboard: bool = True
    progress: bool = True


class LogitsSection(Section):
    """Logits of every ``save_logits_steps``-th optimiser step, at the supervised tokens of its last micro-batch.

    ``save_logits_dir`` is taken from the run folder. Mode ``topk`` keeps the ``save_logits_top_k`` largest of each
    position with the log-sum-exp of all. The oldest files beyond ``save_logits_max_files`` or ``save_logits_max_mb``
    (MiB) are removed. ``float16`` holds logits up to 65504.
    """

    save_logits: bool = False
    save_logits_steps: Positive = 100
    save_logits_dir: Path = Path("logits")
    save_logits_max_files: Positive = 10
    save_logits_max_mb: Annotated[float, Field(gt=0)] = 1024.0
    save_logits_mode: Literal["topk", "full"] = "topk"
    save_logits_top_k: Positive = 64
    save_logits_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    save_logits_format: Literal["safetensors", "pt"] = "safetensors"


class CheckpointSection(Section):
    """How often a checkpoint is written and how many are kept.

    A fault costs at least as many steps as lie between checkpoints. ``every_steps`` and ``every_minutes`` (3 is a good
    value for a machine that may go away) work side by side; ``None`` switches one off. ``keep_best`` keeps the one with
    the lowest held-out loss beside the ``keep`` youngest.
    """

    every_steps: Positive | None = 100
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep: Positive = 5
    keep_best: bool = True


class RecoverySection(Section):
    """When a step counts as faulty and how the recovery ladder answers (see ``train/ladder.py``); counts are steps.

    A loss is a spike over median + max(``spike_mads`` MAD, ``spike_floor`` nats) of the last ``window`` steps, once
    there were ``history`` of them; ``divergence_steps`` losses in a row over ``divergence_ratio`` averages (plus the
    floor) roll back, ``rollback_distance`` steps at least. More than ``recoveries`` in ``recovery_window`` steps, those
    done again not counted, stop the run with exit code 75; 0 stops at the first fault. ``reinitialise`` allows
    resetting a layer, which is meant for models trained from scratch.
    """

    window: Positive = 200
    history: Positive = 20
    spike_mads: Annotated[float, Field(gt=0)] = 6.0
    spike_floor: Annotated[float, Field(gt=0)] = 1.0
    divergence_ratio: Annotated[float, Field(gt=1)] = 3.0
    divergence_steps: Positive = 10
    clip_quantile: Annotated[float, Field(gt=0, le=1)] = 0.9
    skip_window: Positive = 20
    skips: Positive = 2
    probation: Positive = 100
    cool_steps: Positive = 100
    cool_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    cool_floor: Annotated[float, Field(gt=0, le=1)] = 1 / 16
    rollback_distance: Annotated[int, Field(ge=0)] = 100
    recoveries: Annotated[int, Field(ge=0)] = 5
    recovery_window: Positive = 1000
    reinitialise: bool = False


class EvaluationSection(Section):
    """Held-out language-model loss every ``every_steps`` (and before and after), and what is measured at the end.

    ``triage`` asks for decisions. Of running text, ``baselines`` measures an n-gram model and two compressors on the
    same parts, and ``sample_tokens`` tokens are generated (0 for none).
    """

    every_steps: Positive | None = None
    batch_size: Positive = 8
    triage: bool = False
    baselines: bool = False
    sample_tokens: Annotated[int, Field(ge=0)] = 200


class TrainConfig(Section):
    """One training run: an adapter on a frozen ``base``, or a whole ``model``.

    ``card`` names the card that ``so8t plan`` compares with; ``threads`` 0 takes every core.
    """

    output_dir: Path
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=0)] = 0
    card: str | None = None
    base: Annotated[PretrainedBase | ScratchBase, Field(discriminator="kind")] | None = None
    model: ModelSection | None = None
    loading: LoadingSection = LoadingSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    penalty: PenaltySection = PenaltySection()
    physics: PhysicsSection = PhysicsSection()
    training: TrainingSection = TrainingSection()
    recording: RecordingSection = RecordingSection()
    logits: LogitsSection = LogitsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    recovery: RecoverySection = RecoverySection()
    evaluation: EvaluationSection = EvaluationSection()

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass: as asked for, else as the model's preset says.

        Raises:
            ConfigError: there is no such preset.
        """
        asked, section = self.training.gradient_checkpointing, self.model
        if asked is not None or section is None or section.preset is None or section.kind not in ("phase1", "phase2"):
            return bool(asked)
        from so8t_torch.models.presets import read_preset

        return read_preset(section.kind, section.preset).gradient_checkpointing

    @model_validator(mode="after")
    def _agrees(self) -> TrainConfig:
        found = list(contradictions(self))
        if found:
            raise ValueError("settings contradict each other: " + " ".join(found))
        return self


def contradictions(config: TrainConfig) -> Iterator[str]:
    """Yield every pair of settings that cannot both hold, as sentences."""
    if (config.base is None) == (config.model is None):
        yield "exactly one of base (frozen, with an adapter) and model (trained whole) is needed."
    yield from _adapter_contradictions(config.adapter) if config.model is None else _whole_contradictions(config)
    if [config.data.train, config.data.scenarios, config.data.text].count(None) != 2:
        yield "data needs exactly one of train (a file), scenarios and text."
    if config.data.text is not None:
        yield from _text_contradictions(config, config.data.text)
    if config.data.scenarios is not None and config.data.eval is not None:
        yield "data.scenarios brings its own held-out split; drop data.eval."
    if (config.training.max_steps is None) == (config.training.epochs is None):
        yield "training needs exactly one of max_steps and epochs."
    if config.penalty.enabled and not config.adapter.target_modules:
        yield "penalty.enabled reads the stream after gated layers, but adapter.target_modules is empty."
    low, high = config.penalty.boundaries
    if not 0 <= low <= high <= 1:
        yield f"penalty.boundaries must be two shares of the run in order, got {config.penalty.boundaries}."
    if min(config.penalty.weights) < 0:
        yield f"penalty.weights must not be negative, got {config.penalty.weights}."
    if config.recovery.reinitialise and config.base is not None and config.base.kind == "pretrained":
        yield "recovery.reinitialise is for models trained from scratch, but base.kind is pretrained."
    yield from _recovery_contradictions(config.recovery)
    held_out = any(part is not None for part in (config.data.eval, config.data.scenarios, config.data.text))
    if (config.evaluation.every_steps or config.evaluation.triage) and not held_out:
        yield "evaluation needs held-out data: give data.eval or data.scenarios."


def _whole_contradictions(config: TrainConfig) -> Iterator[str]:
    section = config.model
    if section is not None and "vocab_size" in section.fields:
        yield f"model.fields.vocab_size {section.fields['vocab_size']}: the tokenizer sets it; drop it."
    if section is not None and section.init_from is not None and section.preset is not None:
        yield f"model.preset {section.preset}: model.init_from brings its own configuration; drop one of them."
    if config.adapter != AdapterSection():
        yield "adapter is for a frozen base; a model is trained whole."
    if config.data.text is None:
        yield "a model that is trained whole learns from data.text."
    if config.loading.quantization != "none":
        yield f"loading.quantization {config.loading.quantization} is for a frozen base; a model is trained whole."
    if config.penalty.enabled:
        yield "penalty.enabled reads the stream after gated layers, and a model that is trained whole has no gates."


def _text_contradictions(config: TrainConfig, text: TextSection) -> Iterator[str]:
    if config.model is None:
        yield "data.text is for a model that is trained whole; an adapter learns conversations."
    if config.data.eval is not None:
        yield "data.text brings its own held-out part; drop data.eval."
    if config.evaluation.triage:
        yield "evaluation.triage needs labelled conversations, and data.text has none."
    if (text.vocabulary is not None) != (text.tokenizer == "bpe"):
        yield "data.text.vocabulary belongs to the tokenizer bpe, which needs it."


def _recovery_contradictions(recovery: RecoverySection) -> Iterator[str]:
    if recovery.history < SHORTEST_HISTORY:
        yield (
            f"recovery.history {recovery.history} is too short: the median and spread of fewer than {SHORTEST_HISTORY} "
            "losses are noise, so ordinary steps would count as spikes, and the run would go back again and again."
        )
    if recovery.window < recovery.history:
        yield (
            f"recovery.window {recovery.window} remembers fewer losses than recovery.history {recovery.history} waits "
            "for: no loss would ever count as a spike."
        )
    if recovery.recovery_window <= recovery.recoveries:
        yield (
            f"recovery.recovery_window {recovery.recovery_window} has no room for more than recovery.recoveries "
            f"{recovery.recoveries}: a fault in every step would roll back for ever and never stop the run."
        )


def _adapter_contradictions(adapter: AdapterSection) -> Iterator[str]:
    if adapter.r == 0:
        for name in ("lora_target_modules", "lora_layers_to_transform", "lora_dropout", "rank_pattern"):
            if getattr(adapter, name):
                yield f"adapter.{name} needs LoRA, but adapter.r is 0."
        if not adapter.target_modules:
            yield "adapter has neither gates (target_modules is empty) nor LoRA (r is 0): nothing would be trained."
    if adapter.train_gates == "routed" and not adapter.target_modules:
        yield "adapter.train_gates is routed, but adapter.target_modules is empty."
