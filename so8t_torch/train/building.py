"""From settings to objects: the frozen base, the adapted model, encoded data, the library's training arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from so8t_torch.adapter import SO8TConfig
from so8t_torch.core.errors import ConfigError
from so8t_torch.core.files import read_text
from so8t_torch.core.weights import check_folder
from so8t_torch.data.batches import Collator
from so8t_torch.data.chat import Encoded, EncodingReport, encode_records
from so8t_torch.data.records import Record, read_file
from so8t_torch.data.scenarios import scenario_records
from so8t_torch.data.text import Text
from so8t_torch.train.config import AdapterSection, DataSection, LoadingSection, TrainConfig
from so8t_torch.train.fingerprint import Fingerprint, of_folder
from so8t_torch.train.preconditions import check_trainable

MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class Job:
    """Everything a run needs: model, tokenizer, encoded rows, the held-out data as they were read, and the fingerprint
    of what it begins with: a frozen base, or a saved model.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    collator: Callable[[Sequence[Encoded]], dict[str, Tensor]]
    rows: Sequence[Encoded]
    report: EncodingReport
    held_out: Sequence[Encoded]
    held_out_report: EncodingReport | None
    held_out_records: list[Record]
    base: Fingerprint
    text: Text | None = None


def build(config: TrainConfig) -> Job:
    """Load the base, adapt it and encode the data.

    Raises:
        SO8TError: whatever of the settings does not fit the model or the files, named.
    """
    source, revision = base_source(config)
    tokenizer = load_tokenizer(source, revision)
    train, held_out = records(config)
    template = None if config.data.template is None else read_template(config.data.template)
    options: Any = {"max_length": config.data.max_length, "template": template, "too_long": config.data.too_long}
    rows, report = encode_records(train, tokenizer, **options)
    held_rows, held_report = encode_records(held_out, tokenizer, **options) if held_out else ([], None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    routed = config.adapter.train_gates == "routed"
    collator = Collator(pad, tokenizer.padding_side, routed=routed)
    set_seed(config.seed)
    loaded = load_model(source, revision, config.loading)
    base = base_fingerprint(source, loaded)
    model = adapt(loaded, config.adapter)
    check_trainable(model)
    return Job(model, tokenizer, collator, rows, report, held_rows, held_report, held_out, base)


def base_source(config: TrainConfig) -> tuple[str, str | None]:
    """Return where the base is read from, and its revision; a base made from scratch is built or reused first."""
    section = config.base
    assert section is not None, "the settings were checked: an adapter has a base"
    if section.kind == "pretrained":
        local = Path(section.path).expanduser()
        return (str(local.resolve()) if local.is_dir() else section.path), section.revision
    from so8t_torch.train.scratch import build_base

    directory = build_base(section, config.output_dir.parent / "bases", threads=thread_count(config))
    return str(directory.resolve()), None


def base_fingerprint(source: str, loaded: PreTrainedModel) -> Fingerprint:
    """Return what a resumed run compares its base by: of a local folder its files, else the commit that was loaded."""
    if os.path.isdir(source):
        return of_folder(Path(source))
    return {"repository": source, "commit": getattr(loaded.config, "_commit_hash", None)}


def thread_count(config: TrainConfig) -> int:
    """Return the number of CPU threads the settings ask for."""
    return config.threads or os.cpu_count() or 1


@contextmanager
def _reading(what: str, source: str) -> Iterator[None]:
    """Check a local folder, and turn the library's error into one that names the setting."""
    if os.path.isdir(source):
        try:
            check_folder(Path(source), ConfigError)
        except ConfigError as error:
            raise ConfigError(f"base.path {source!r:.400}: no model can be read there. {error}") from error
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base.path {source!r:.400}: no {what} can be read there. Give a local folder with config.json, the "
            f"weights and tokenizer.json, or a hub id on a machine with network. The library says: {error!s:.400}"
        ) from error


def read_template(path: Path) -> str:
    """Return a chat template.

    Raises:
        ConfigError: there is no such file, or it is no text of at most 1 MiB.
    """
    if not os.path.lexists(path):
        raise ConfigError(f"data.template: no file at {path}; give a Jinja file, or null for the tokenizer's own.")
    return read_text(path, ConfigError, limit=MAX_TEMPLATE_BYTES)


def load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerFast:
    """Read the tokenizer.

    Raises:
        ConfigError: there is no fast tokenizer at ``source``.
    """
    with _reading("tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ConfigError(f"{source}: a fast tokenizer is needed (character offsets tell the answer from the prompt).")
    return tokenizer


def load_model(source: str, revision: str | None, loading: LoadingSection) -> PreTrainedModel:
    """Read the base in its dtype and quantisation, frozen, without a key-value cache.

    Raises:
        ConfigError: there are no weights at ``source``.
    """
    dtype = resolve_dtype(loading.dtype)
    with _reading("model", source):
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            quantization_config=quantization(loading, dtype),
            attn_implementation=loading.attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model.config.use_cache = False
    if loading.quantization != "none" and loading.float32_rest:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model.requires_grad_(False)


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of the base; ``auto`` is bfloat16 where the card has it, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def quantization(loading: LoadingSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the library's quantisation settings, or ``None`` for an unquantised base."""
    if loading.quantization == "none":
        return None
    if loading.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=loading.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def adapter_config(section: AdapterSection) -> SO8TConfig:
    """Return the PEFT configuration of the adapter section."""
    return SO8TConfig(
        task_type="CAUSAL_LM",
        target_modules=list(section.target_modules),
        layers_to_transform=section.layers_to_transform,
        layers_pattern=section.layers_pattern,
        exclude_modules=section.exclude_modules,
        chart=section.chart,
        shared=section.shared,
        train_gates=section.train_gates,
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        lora_target_modules=section.lora_target_modules,
        lora_layers_to_transform=section.lora_layers_to_transform,
        rank_pattern=dict(section.rank_pattern),
        modules_to_save=section.modules_to_save,
    )


def adapt(model: PreTrainedModel, section: AdapterSection) -> PeftModel:
    """Wrap the base with gates and LoRA."""
    return get_peft_model(model, adapter_config(section))


def records(config: TrainConfig) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records."""
    data = config.data
    if data.scenarios is not None:
        return scenario_records(data.scenarios, "train"), scenario_records(data.scenarios, "held_out")
    assert data.train is not None, "the settings were checked: data has scenarios or train"
    need = config.adapter.train_gates == "routed"
    train = _read(data, data.train, need)
    if data.eval is None:
        return train, []
    return train, _read(data, data.eval, need or config.evaluation.triage)


def _read(data: DataSection, path: Path, need_label: bool) -> list[Record]:
    found = read_file(path, data.columns, need_label=need_label, reading=data.reading)
    Console(stderr=True).print(found.summary(), markup=False, highlight=False, soft_wrap=True)
    return found.records


def training_arguments(config: TrainConfig, checkpoints: Path, *, first: bool = True) -> TrainingArguments:
    """Return the library's arguments; reporting, filtering of NaN and key-value caches are off.

    Args:
        config: the run.
        checkpoints: folder for them.
        first: whether the run begins here; held-out data are then measured before the first step.
    """
    training, recording, data = config.training, config.recording, config.data
    every, evaluate = config.checkpoint.every_steps, config.evaluation.every_steps
    checkpointing: dict[str, Any] = {}
    if config.checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(checkpoints),
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=resolve_dtype(config.loading.dtype) == torch.bfloat16,
        max_steps=training.max_steps or -1,
        num_train_epochs=training.epochs or 1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=config.evaluation.batch_size,
        gradient_accumulation_steps=training.accumulation,
        optim=training.optimiser,
        learning_rate=training.lr,
        adam_beta2=training.beta2,
        weight_decay=training.weight_decay,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        warmup_steps=training.warmup,
        max_grad_norm=training.max_grad_norm,
        # every trainable number is reached in every step (the guard checks the first), so none is searched for
        ddp_find_unused_parameters=False,
        **checkpointing,
        logging_steps=recording.every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=not recording.progress,
        report_to="none",
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        save_total_limit=None,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=evaluate,
        # Evaluating before training would leave the model unwrapped: processes would not share gradients.
        eval_on_start=first and any(part is not None for part in (data.eval, data.scenarios, data.text)),
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
