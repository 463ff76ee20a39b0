"""Language models from a configuration, from the name of a preset, or from fields given directly.

    create_phase2_model("small")     create_phase2_model(config)     create_phase2_model(d_model=256, n_layers=4)
    create_phase2_model("small", vocab_size=1000)

Fields change a copy: neither the configuration nor the preset is touched. With a seed the weights are drawn without
moving PyTorch's global generators.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, TypeVar

import torch

from so8t_torch.core.errors import ConfigError
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.phase1 import Phase1ForCausalLM
from so8t_torch.models.phase2 import Phase2ForCausalLM, Phase2Model
from so8t_torch.models.presets import Phase, read_preset
from so8t_torch.models.settings import RecurrentConfig

__all__ = ["create_phase1_model", "create_phase2_model"]

C = TypeVar("C", bound=RecurrentConfig)


def create_phase1_model(
    config: Phase1Config | str | None = None,
    *,
    preset: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    **fields: Any,
) -> Phase1ForCausalLM:
    """Return a language model of Phase 1 with drawn weights.

    Args:
        config: a configuration, or the name of a preset; the defaults without.
        preset: the name of a preset, in place of config. One that asks for it computes blocks again in the backward
            pass.
        device: of the model; PyTorch's default without.
        dtype: of the parameters; PyTorch's default without.
        seed: of the weights; PyTorch's global generators without.
        **fields: of ``Phase1Config``, which take precedence.

    Raises:
        ConfigError: both a configuration and a preset, an unknown preset, fields that make no configuration, a dtype
            or a seed that is none.
    """
    chosen, again = _chosen(Phase1Config, "phase1", config, preset, fields)
    model = _built(Phase1ForCausalLM, chosen, device, dtype, seed)
    if again:
        model.activation_checkpointing_enable()
    return model


def create_phase2_model(
    config: Phase2Config | str | None = None,
    *,
    preset: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    **fields: Any,
) -> Phase2ForCausalLM | Phase2Model:
    """Return a language model of Phase 2 with drawn weights; with ``is_encoder`` the model without a head.

    Args:
        config: a configuration, or the name of a preset; the defaults without.
        preset: the name of a preset, in place of config.
        device: as for ``create_phase1_model``.
        dtype: see there.
        seed: see there.
        **fields: of ``Phase2Config``, which take precedence.

    Raises:
        ConfigError: as ``create_phase1_model``.
    """
    chosen, _ = _chosen(Phase2Config, "phase2", config, preset, fields)
    return _built(Phase2Model if chosen.is_encoder else Phase2ForCausalLM, chosen, device, dtype, seed)


def _chosen(
    kind: type[C], phase: Phase, config: C | str | None, preset: str | None, fields: dict[str, Any]
) -> tuple[C, bool]:
    """Return the configuration asked for, and whether its preset computes blocks twice."""
    if config is not None and preset is not None:
        given = repr(config) if isinstance(config, str) else f"a {type(config).__name__}"
        raise ConfigError(f"expected a configuration or a preset, got both {given} and {preset!r}; give one of them.")
    if isinstance(config, str):
        config, preset = None, config
    if config is not None and not isinstance(config, kind):
        raise ConfigError(f"expected a {kind.__name__} or the name of a preset, got a {type(config).__name__}.")
    if preset is None:
        return (kind(**fields) if config is None else config.replace(**fields)), False
    found = read_preset(phase, preset)
    return kind(**found.config).replace(**fields), found.gradient_checkpointing


def _built(
    model_class: Any,
    config: RecurrentConfig,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    seed: int | None,
) -> Any:
    """Return a model whose weights are drawn on the host, whatever the device."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"expected dtype as a floating torch.dtype, such as torch.bfloat16, got {dtype!r}.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"expected seed as a whole number, got {seed!r}.")
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        model = model_class(config)
    return model.to(device=torch.get_default_device() if device is None else device, dtype=dtype)
