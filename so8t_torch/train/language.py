"""A language model that is trained whole on running text: from settings to objects, and what is told at its end."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from so8t_torch.core.errors import ConfigError
from so8t_torch.data.ngram import ByteNgram, compressed
from so8t_torch.data.packing import PackedCollator, PackedRows, byte_tokenizer, pair_tokenizer
from so8t_torch.data.text import Text, TextSection, read
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.stored import make_known
from so8t_torch.models.streaming import Drawing, Writing
from so8t_torch.train import continuing
from so8t_torch.train.building import Job
from so8t_torch.train.config import ModelSection, TrainConfig
from so8t_torch.train.fingerprint import of_folder
from so8t_torch.train.preconditions import check_trainable
from so8t_torch.train.sharding import is_sharded
from so8t_torch.train.trained import PACKED_INPUTS, input_names

ORDER = 6
"""Of the n-gram model that is reported beside a run."""

_PEERS = {"llama": LlamaConfig, "mamba": MambaConfig}


def build(config: TrainConfig) -> Job:
    """Read the text, make the tokenizer and the model.

    Raises:
        SO8TError: whatever of the settings does not fit the model or the files, named.
    """
    section, text_section = config.model, config.data.text
    assert section is not None, "the settings were checked: there is a model"
    assert text_section is not None, "the settings were checked: a model has a text"
    configuration(section, 257, text_section.length)
    text = read(text_section)
    tokenizer = choose_tokenizer(section, text_section, text)
    rows = PackedRows(text.train, tokenizer, text_section.length, "training text")
    held_out = PackedRows(text.held_out, tokenizer, text_section.length, "held-out text")
    set_seed(config.seed)
    model = make_model(section, tokenizer, text_section.length)
    model.config.use_cache = False
    check_trainable(model)
    collator = PackedCollator(rows.end)
    base = {} if section.init_from is None else of_folder(continuing.folder_of(section))
    return Job(model, tokenizer, collator, rows, rows.report(), held_out, held_out.report(), [], base, text)


def choose_tokenizer(section: ModelSection, text_section: TextSection, text: Text) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the saved model that a run begins from, else that of the text.

    Args:
        section: of the model.
        text_section: of the text.
        text: a tokenizer that is trained reads its training part.

    Raises:
        ConfigError: it does not fit the saved model.
    """
    if section.init_from is None:
        return make_tokenizer(text_section, text)
    size = continuing.configuration(section).vocab_size
    tokenizer = continuing.tokenizer_of(section, size)
    if tokenizer is None:
        tokenizer = make_tokenizer(text_section, text)
        continuing.check_vocabulary(section, size, len(tokenizer))
    return tokenizer


def make_tokenizer(section: TextSection, text: Text) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a section; one that is trained reads the training part alone."""
    if section.tokenizer == "bytes":
        return byte_tokenizer()
    assert section.vocabulary is not None, "the settings were checked: bpe has a vocabulary"
    return pair_tokenizer(text.train, section.vocabulary)


def make_model(section: ModelSection, tokenizer: PreTrainedTokenizerFast, length: int) -> PreTrainedModel:
    """Return a model of the section's kind, with fresh weights or those it begins from, for the tokenizer's ids.

    Args:
        section: kind, preset and fields.
        tokenizer: gives vocabulary and special tokens.
        length: tokens of a row.

    Raises:
        ConfigError: a preset or a field that the kind does not have, or a value that it refuses.
        CheckpointError: weights of a saved model that are damaged, incomplete or not finite.
    """
    settings = configuration(section, len(tokenizer), length)
    for name in continuing.IDS:
        if section.init_from is None or getattr(settings, name) is None:
            setattr(settings, name, tokenizer.eos_token_id)
    if section.init_from is not None:
        return continuing.weights(section, settings)
    make_known()
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32)


def configuration(section: ModelSection, vocabulary: int, length: int) -> PreTrainedConfig:
    """Return the configuration of a section's model.

    Args:
        section: kind, preset and fields, or the folder that it begins from.
        vocabulary: number of the tokenizer's ids; a saved model has its own.
        length: tokens of a row.

    Raises:
        ConfigError: as for ``make_model``.
    """
    settings = _settings(section, vocabulary, length)
    if isinstance(settings, Phase2Config):
        _check_chunk(settings, length)
    return settings


def _settings(section: ModelSection, vocabulary: int, length: int) -> PreTrainedConfig:
    if section.kind in _PEERS:
        _check_peer(section)
    if section.init_from is not None:
        return continuing.configuration(section)
    fields = {"vocab_size": vocabulary, **section.fields}
    if section.kind in _PEERS:
        room = {"max_position_embeddings": max(2048, length + 1)} if section.kind == "llama" else {}
        return _peer(section, room | fields)
    return _own(section, {"n_seq": length, **fields})


def _check_chunk(settings: Phase2Config, length: int) -> None:
    """Refuse rows in which a part of the model is never trained."""
    if settings.hebbian_enabled and settings.resonance_enabled and length <= settings.memory_chunk:
        raise ConfigError(
            f"data.text.length {length} ends within one memory_chunk of {settings.memory_chunk} tokens, where "
            "resonance never acts: set model.fields.memory_chunk below it, or model.fields.resonance_enabled=false."
        )


def _own(section: ModelSection, fields: Mapping[str, Any]) -> Phase1Config | Phase2Config:
    if section.preset is None:
        return Phase1Config(**fields) if section.kind == "phase1" else Phase2Config(**fields)
    from so8t_torch.models import presets

    get = presets.get_preset if section.kind == "phase1" else presets.get_phase2_preset
    return get(section.preset).replace(**fields)


def _check_peer(section: ModelSection) -> None:
    """Refuse what a model of transformers does not have."""
    kind = _PEERS[section.kind]
    if section.preset is not None:
        raise ConfigError(f"model.preset {section.preset!r:.80}: {section.kind} has no presets; give model.fields.")
    known = {field.name for field in dataclasses.fields(kind)}
    for name in section.fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{kind.__name__} lists them."
            raise ConfigError(f"model.fields.{name:.80}: {section.kind} has no such field; {hint}")


def _peer(section: ModelSection, fields: Mapping[str, Any]) -> PreTrainedConfig:
    kind = _PEERS[section.kind]
    with continuing.converted(f"model.fields: {kind.__name__} refuses them"):
        settings = kind(**fields)
    continuing.check_buildable(section, settings)
    return settings


def baselines(text: Text) -> dict[str, float]:
    """Return bits per byte of the held-out part by what learns without a network from the whole training part."""
    ngram = ByteNgram(text.train, ORDER).bits_per_byte(text.held_out)
    return {f"kneser_ney_{ORDER}_gram": ngram} | compressed(text.train, text.held_out)


@dataclasses.dataclass(frozen=True)
class Ending:
    """What is told of a model of text at its end: bits per byte, those of other methods, a sample, a reservation."""

    bits_per_byte: float
    baselines: Mapping[str, float]
    sample: str
    reservation: str = ""

    def lines(self) -> list[str]:
        """Return it for printing."""
        others = "".join(f"; {name.replace('_', ' ')} {bits:.3f}" for name, bits in self.baselines.items())
        found = [f"held-out text {self.bits_per_byte:.3f} bits per byte{others}"]
        found += [self.reservation] if self.reservation else []
        return [*found, f"sample: {self.sample!r:.400}"] if self.sample else found

    def as_json(self) -> dict[str, Any]:
        """Return the numbers that were measured."""
        return {"bits_per_byte": self.bits_per_byte, "baselines_bits_per_byte": dict(self.baselines)}


def conclude(config: TrainConfig, job: Job, loss: float) -> Ending | None:
    """Measure what is told at the end of a run on text; ``None`` for any other run.

    Args:
        config: of the run.
        job: with the trained model.
        loss: of the held-out text, in nats per token.
    """
    if job.text is None or not isinstance(job.held_out, PackedRows):
        return None
    bits = loss * job.held_out.report().supervised / math.log(2) / job.held_out.bytes
    others = baselines(job.text) if config.evaluation.baselines else {}
    wanted = 0 if is_sharded(job.model) else config.evaluation.sample_tokens
    drawing = Drawing(wanted, seed=config.seed) if wanted else None
    sample = "" if drawing is None else "".join(Writing(job.model, job.tokenizer, "", drawing))
    return Ending(bits, others, sample, reservation(job.model))


def reservation(model: PreTrainedModel) -> str:
    """Return what is to be said of a model beside others on the same packed rows; nothing where they are its documents.

    Args:
        model: of any kind.
    """
    if set(PACKED_INPUTS) & set(input_names(model)):
        return ""
    return (
        f"documents of a row are not kept apart: {type(model).__name__} takes no segment_ids and no position_ids, so "
        "that its state runs on behind the token between two documents, in training and on held-out text"
    )
