"""Configurations under a name, read anew from data files at each call, and what they are meant for.

A preset has the fields of a configuration, and beside them what it aims at: memory, quality, speed, hardware. Targets
change no model and are not measurements; ``print_preset_comparison`` sets computed figures beside them.
Files: so8t_torch/models/presets.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import PositiveFloat
from rich.console import Console
from rich.table import Table

from so8t_torch.core.config import Section, load_config
from so8t_torch.core.errors import ConfigError
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.memory import estimate_memory

__all__ = [
    "Preset",
    "for_hardware",
    "get_phase2_preset",
    "get_preset",
    "list_phase2_presets",
    "list_presets",
    "preset_comparison",
    "print_preset_comparison",
    "read_preset",
]

Phase = Literal["phase1", "phase2"]

FOLDER = Path(__file__).parent / "presets"
LADDER = ("max_efficiency", "8gb", "10gb", "24gb", "max_quality")
"""Presets of Phase 1 by the memory that they aim at."""


class Targets(Section):
    """What a preset aims at."""

    vram_gb: PositiveFloat
    ppl_degradation: PositiveFloat | None = None
    speedup: PositiveFloat


class Preset(Section):
    """A data file of a preset."""

    description: str
    aliases: tuple[str, ...] = ()
    hardware: str = ""
    targets: Targets
    gradient_checkpointing: bool = False
    config: dict[str, Any]


def read_preset(phase: Phase, name: str) -> Preset:
    """Return the data of a preset.

    Args:
        phase: ``"phase1"`` or ``"phase2"``.
        name: a name or an alias.

    Raises:
        ConfigError: there is no such preset; the text lists all.
    """
    presets = _presets(phase)
    for known, preset in presets.items():
        if name == known or name in preset.aliases:
            return preset
    words = [word for known, preset in presets.items() for word in (known, *preset.aliases)]
    near = difflib.get_close_matches(str(name), words, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"There is no {phase} preset {name!r}: expected one of {', '.join(words)}{hint}")


def get_preset(name: str) -> Phase1Config:
    """Return a fresh configuration of Phase 1.

    Args:
        name: of ``list_presets``, or an alias: memory_oriented, balanced, speed_oriented, quality, efficiency.

    Raises:
        ConfigError: there is no such preset.
    """
    return Phase1Config(**read_preset("phase1", name).config)


def get_phase2_preset(name: str) -> Phase2Config:
    """Return a fresh configuration of Phase 2.

    Args:
        name: small, base or large.

    Raises:
        ConfigError: there is no such preset.
    """
    return Phase2Config(**read_preset("phase2", name).config)


def list_presets() -> dict[str, str]:
    """Return the presets of Phase 1 with a line about each."""
    return {name: preset.description for name, preset in _presets("phase1").items()}


def list_phase2_presets() -> dict[str, str]:
    """Return the presets of Phase 2 with a line about each."""
    return {name: preset.description for name, preset in _presets("phase2").items()}


def for_hardware(vram_gb: float) -> Phase1Config:
    """Return the preset of Phase 1 with the highest target that a card has room for.

    Args:
        vram_gb: memory of the card in GB.

    Raises:
        ConfigError: no preset aims at so little, or it is no number.
    """
    if isinstance(vram_gb, bool) or not isinstance(vram_gb, int | float):
        raise ConfigError(f"for_hardware: expected vram_gb as a number of GB, got {vram_gb!r}.")
    fitting = [name for name in LADDER if read_preset("phase1", name).targets.vram_gb <= vram_gb]
    if not fitting:
        least = read_preset("phase1", LADDER[0]).targets.vram_gb
        raise ConfigError(f"for_hardware: expected vram_gb ≥ {least:g}, the target of {LADDER[0]}, got {vram_gb!r}.")
    return get_preset(fitting[-1])


def preset_comparison(phase: Phase = "phase1", *, batch_size: int = 1) -> Table:
    """Return what the presets of a phase set, and what that makes, computed.

    Args:
        phase: ``"phase1"`` or ``"phase2"``.
        batch_size: rows of n_seq tokens of the training step whose memory is computed.
    """
    table = Table(title=f"{phase} presets, training on {batch_size} × n_seq tokens in float32")
    for column in (
        "preset",
        "aims at (not measured)",
        "AR-SSM rank",
        "TT rank",
        "parameters",
        "compression",
        "training memory",
    ):
        table.add_column(column, justify="left" if column == "preset" else "right")
    table.add_column("blocks computed twice")
    table.add_column("sign-log")
    table.add_column("hardware")
    for name, preset in _presets(phase).items():
        config = get_preset(name) if phase == "phase1" else get_phase2_preset(name)
        found = estimate_memory(config, batch_size=batch_size, gradient_checkpointing=preset.gradient_checkpointing)
        one = isinstance(config, Phase1Config)
        table.add_row(
            name,
            _aims(preset.targets),
            f"{config.ar_ssm_min_rank}–{config.ar_ssm_max_rank}" if one else "–",
            str(config.htt_rank) if config.embedding != "dense" else "–",
            f"{found.parameter_count / 1e6:.1f} M",
            f"{1 - found.embedding_count / (config.vocab_size * config.d_model):.1%}",
            f"{found.total / 2**30:.2f} GiB",
            "yes" if preset.gradient_checkpointing else "no",
            "yes" if one and config.lns_enabled else "no",
            preset.hardware or "any",
        )
    return table


def print_preset_comparison(phase: Phase = "phase1", *, batch_size: int = 1) -> None:
    """Print ``preset_comparison``.

    Args:
        phase: see there.
        batch_size: see there.
    """
    Console(width=180).print(preset_comparison(phase, batch_size=batch_size))


def _aims(targets: Targets) -> str:
    """Return the targets in a few words."""
    quality = "" if targets.ppl_degradation is None else f", +{targets.ppl_degradation:.0%} perplexity"
    return f"{targets.vram_gb:g} GB, {targets.speedup:g}× speed{quality}"


def _presets(phase: Phase) -> dict[str, Preset]:
    """Return the presets of a phase by the memory that they aim at.

    Raises:
        ConfigError: there is no such phase.
    """
    if phase not in get_args(Phase):
        raise ConfigError(f"expected the presets of {' or '.join(map(repr, get_args(Phase)))}, got {phase!r}.")
    found = {path.stem: load_config(Preset, path) for path in (FOLDER / phase).glob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: (item[1].targets.vram_gb, item[0])))
