"""How much memory a run needs on a card, before anything is downloaded or allocated.

The model is built on the meta device from its configuration alone, adapted as the run would adapt it, and counted; see
``memory`` for what is exact (weights, adapter, gradients, optimiser states) and what is modelled (activations).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from rich.table import Table
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from so8t_torch.core.errors import ConfigError
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.memory import estimate_memory
from so8t_torch.train import memory
from so8t_torch.train.building import adapt, base_source, resolve_dtype
from so8t_torch.train.cards import CUDA_CONTEXT, GIB, HEADROOM, Card, find_card
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.language import configuration
from so8t_torch.train.scratch import architecture

MIB = 1 << 20


@dataclass(frozen=True)
class Component:
    """One part of the memory: bytes, and how they come about."""

    name: str
    size: int
    how: str


@dataclass(frozen=True)
class Plan:
    """Expected memory by component, the numbers behind it, and the card it is compared with."""

    components: tuple[Component, ...]
    parameters: int
    gates: int
    lora: int
    card: Card | None

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(component.size for component in self.components)

    @property
    def fits(self) -> bool:
        """Whether the total is within the card's memory; true where no card was named."""
        return self.card is None or self.total <= self.card.size

    def table(self) -> Table:
        """Return the plan for printing."""
        table = Table("component", "MiB", "how", title="expected GPU memory")
        table.columns[1].justify = "right"
        for component in self.components:
            table.add_row(component.name, f"{component.size / MIB:,.1f}", component.how)
        table.add_section()
        table.add_row("total", f"{self.total / MIB:,.1f}", self.verdict(), style="bold")
        return table

    def verdict(self) -> str:
        """Say whether it fits, and with how much to spare."""
        if self.card is None:
            return "no card named; set card or give --card"
        spare = (self.card.size - self.total) / GIB
        word = f"fits, {spare:.2f} GiB to spare" if self.fits else f"does not fit, {-spare:.2f} GiB too much"
        return f"{self.card.name} ({self.card.gib} GiB): {word}"


def plan(config: TrainConfig, card: str | None = None) -> Plan:
    """Count the memory of a run.

    Args:
        config: the run.
        card: name of a card in ``cards.CARDS``; ``None`` takes the one in the settings.

    Raises:
        ConfigError: the card is unknown, the base's configuration cannot be read, or a model of another library is
            trained whole.
    """
    name = card or config.card
    chosen = None if name is None else find_card(name)
    if config.model is not None:
        return whole_plan(config, chosen)
    dtype = planned_dtype(config, chosen)
    settings = base_configuration(config)
    AttentionInterface.register("so8t_plan", memory.fused_attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="so8t_plan")
        head = model.get_output_embeddings()
        base = memory.base_bytes(model, head, config.loading, dtype)
        parameters = sum(p.numel() for p in model.parameters())
        adapted = adapt(model.requires_grad_(False), config.adapter)
        return _collect(config, adapted, base, parameters, dtype, chosen)


def whole_plan(config: TrainConfig, card: Card | None) -> Plan:
    """Count the memory of a run that trains a whole model; one block is run on the CPU to see what it keeps.

    Args:
        config: of such a run.
        card: to compare with.

    Raises:
        ConfigError: the model is of another library, or its fields make none.
    """
    section, text, training = config.model, config.data.text, config.training
    assert section is not None, "the settings were checked: a whole model is trained"
    assert text is not None, "the settings were checked: it learns a text"
    settings = configuration(section, text.vocabulary or 257, text.length)
    if not isinstance(settings, Phase1Config | Phase2Config):
        raise ConfigError(f"so8t plan counts adapters and the models phase1 and phase2, not {section.kind}.")
    dtype = planned_dtype(config, card)
    found = estimate_memory(
        settings,
        batch_size=training.batch_size,
        length=text.length + 1,
        autocast=None if dtype == torch.float32 else dtype,
        gradient_checkpointing=config.checkpointing,
    )
    count = found.parameter_count
    states = count * (2 if training.optimiser.endswith("8bit") else 8)
    logits = memory.loss_bytes(settings.vocab_size, training, dtype)
    return _with_headroom(
        [
            Component("parameters", found.parameters, f"{count:,} numbers in float32, all trained"),
            Component("gradients", found.gradients, "float32"),
            Component("optimiser states", states, training.optimiser),
            Component("activations", found.activations, f"batch {training.batch_size} × {text.length + 1} tokens"),
            Component("logits", logits, f"{training.loss_chunk} positions at once"),
        ],
        (count, 0, 0),
        card,
    )


def _with_headroom(parts: list[Component], counts: tuple[int, int, int], card: Card | None) -> Plan:
    headroom = int(HEADROOM * sum(part.size for part in parts))
    parts.append(Component("headroom", headroom, f"{HEADROOM:.0%} for the allocator, assumed"))
    parts.append(Component("CUDA context", CUDA_CONTEXT, "assumed"))
    return Plan(tuple(parts), *counts, card)


def planned_dtype(config: TrainConfig, card: Card | None) -> torch.dtype:
    """Return the dtype of the base on the card named, or on this machine where none is."""
    if config.loading.dtype == "auto" and card is not None:
        return torch.bfloat16 if card.bfloat16 else torch.float32
    return resolve_dtype(config.loading.dtype)


def base_configuration(config: TrainConfig) -> PreTrainedConfig:
    """Read the base's configuration, or derive that of a base made from scratch.

    Raises:
        ConfigError: neither a local folder nor reachable on the hub.
    """
    section = config.base
    assert section is not None, "a plan of an adapter has a base"
    if section.kind == "scratch":
        return architecture(section, section.vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    source, revision = base_source(config)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base.path {section.path!r}: no model configuration there. Give a local folder with config.json, or a hub "
            "id on a machine with network."
        ) from error


def _collect(
    config: TrainConfig, model: PeftModel, base: dict[str, int], parameters: int, dtype: torch.dtype, card: Card | None
) -> Plan:
    training, loading = config.training, config.loading
    adapter = {n: p for n, p in model.named_parameters() if "so8t_" in n or p.requires_grad}
    trainable = sum(p.numel() for p in adapter.values() if p.requires_grad)
    gates = sum(p.numel() for n, p in adapter.items() if p.requires_grad and ("_safe." in n or "_cmd." in n))
    lora = sum(p.numel() for n, p in adapter.items() if "so8t_lora_" in n)
    held = memory.activation_bytes(model.train(), training.batch_size, config.data.max_length, training, dtype)
    vocabulary = model.get_base_model().config.vocab_size
    name = str(dtype).removeprefix("torch.")
    linear = name if loading.quantization == "none" else f"{loading.quantization} with its scales"
    rest = "float32" if loading.quantization != "none" and loading.float32_rest else name
    stored = sum(p.numel() * p.element_size() for p in adapter.values())
    parts = [
        Component("base: linear layers", base["linear"], linear),
        Component("base: the rest", base["rest"], f"embeddings, norms, head in {rest}"),
        Component("adapter", stored, f"{gates:,} numbers in gates, {lora:,} in LoRA train"),
        Component("gradients", trainable * memory.FLOAT, "float32, trainable numbers only"),
        Component("optimiser states", memory.optimiser_bytes(model, training.optimiser), training.optimiser),
        Component("activations", held["activations"], _activations(config)),
        Component("temporaries", held["temporaries"] + _widest(config, model), "backward of the widest layer"),
        Component("logits", memory.loss_bytes(vocabulary, training, dtype), f"{training.loss_chunk} positions at once"),
    ]
    return _with_headroom(parts, (parameters, gates, lora), card)


def _activations(config: TrainConfig) -> str:
    shape = f"batch {config.training.batch_size} × {config.data.max_length} tokens"
    return f"{shape}, " + ("one layer recomputed" if config.checkpointing else "every layer kept")


def _widest(config: TrainConfig, model: PeftModel) -> int:
    """Return the bytes of the widest weight turned back from its quantised form, as forward and backward do."""
    if config.loading.quantization == "none":
        return 0
    linear = (m for m in model.get_base_model().get_decoder().modules() if isinstance(m, torch.nn.Linear))
    return max(m.weight.numel() * m.weight.element_size() for m in linear)
