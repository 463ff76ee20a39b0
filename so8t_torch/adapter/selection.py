"""Which modules get a gate, which get LoRA, and whether every entry of the configuration found something.

Matching is PEFT's own (``check_target_module_exists``), applied to two rules: one made of ``target_modules`` and
its companions, one of ``lora_target_modules`` and its companions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_target_module_exists
from peft.utils import resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from so8t_torch.adapter.config import ALL_LINEAR, SO8TConfig
from so8t_torch.core.errors import AdapterError

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True)
class Rule:
    """One family of targets, with the attribute names that PEFT's matching reads."""

    names: tuple[str, str, str]
    target_modules: list[str] | set[str] | str
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    exclude_modules: list[str] | set[str] | str | None
    modules_to_save: list[str] | None
    target_parameters: None = None

    def selects(self, key: str) -> bool:
        """Whether the module called ``key`` is chosen."""
        return bool(self.target_modules) and bool(check_target_module_exists(self, key))


def gate_rule(config: SO8TConfig) -> Rule:
    """Return the rule that chooses gates."""
    return Rule(
        names=("target_modules", "layers_to_transform", "exclude_modules"),
        target_modules=config.target_modules or [],
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
    )


def lora_rule(config: SO8TConfig) -> Rule:
    """Return the rule that chooses LoRA."""
    return Rule(
        names=("lora_target_modules", "lora_layers_to_transform", ""),
        target_modules=config.lora_target_modules or [],
        layers_to_transform=config.lora_layers_to_transform,
        layers_pattern=config.layers_pattern,
        exclude_modules=None,
        modules_to_save=config.modules_to_save,
    )


def lora_rank(config: SO8TConfig, key: str) -> int:
    """Return the rank of LoRA on the module called ``key``, 0 where it gets none."""
    if not lora_rule(config).selects(key):
        return 0
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)


def expand_all_linear(config: SO8TConfig, model: nn.Module) -> None:
    """Replace the shorthand ``"all-linear"`` by the names of the linear layers, the output head left out."""
    for field in ("target_modules", "lora_target_modules"):
        value = getattr(config, field)
        if isinstance(value, str) and value.lower() == ALL_LINEAR:
            setattr(config, field, _linear_names(model))


def check(config: SO8TConfig, model: nn.Module) -> None:
    """Refuse a selection that cannot be installed as asked, before anything is changed.

    Args:
        config: with ``"all-linear"`` expanded.
        model: the model about to be wrapped.

    Raises:
        AdapterError: an entry matches nothing, no module gets a gate although gates are asked for, a chosen
            module is not a linear layer, or its width is not divisible by 8.
    """
    modules = dict(_adaptable(model))
    gates, lora = gate_rule(config), lora_rule(config)
    problems = [
        *_unmatched(gates, modules),
        *_unmatched(lora, modules),
        *_unmatched_patterns(config, modules),
        *_unmatched_saved(config, modules),
    ]
    if problems:
        raise AdapterError("SO8TConfig: every entry must match a module of this model.\n" + "\n".join(problems))
    for key in filter(gates.selects, modules):
        _check_linear(key, modules[key], gates.names[0])
        width = _get_in_out_features(_inner(modules[key]))[1]
        if width % 8:
            raise AdapterError(
                f"module {key!r}: a gate rotates blocks of eight channels, expected an output width divisible by 8, "
                f"got {width}; leave it out of target_modules or list it in exclude_modules."
            )
    for key in filter(lora.selects, modules):
        _check_linear(key, modules[key], lora.names[0])


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules, those inside an installed adapter layer left out."""
    inside: list[str] = []
    for key, module in model.named_modules():
        if not key or key.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{key}.")
        yield key, module


def _inner(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _linear_names(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [key for key, module in _adaptable(model) if _is_linear(_inner(module)) and _inner(module) is not head]


def _check_linear(key: str, module: nn.Module, field: str) -> None:
    foreign = isinstance(module, BaseTunerLayer) and not hasattr(module, "so8t_safe")
    if foreign:
        raise AdapterError(
            f"module {key!r}: already carries an adapter of another method ({type(module).__name__}); "
            "SO8TConfig owns LoRA too (r, lora_target_modules), so use one SO8TConfig for both."
        )
    inner = _inner(module)
    if _is_linear(inner):
        return
    backend = resolve_quantization_backend(inner)
    if backend is None or backend.layer_type != "linear":
        raise AdapterError(f"{field}: expected linear layers, but {key!r} is a {type(inner).__name__}.")


def _unmatched(rule: Rule, modules: Iterable[str]) -> Iterator[str]:
    """Yield one line for every entry of the rule that matches nothing."""
    if not rule.target_modules:
        return
    keys = list(modules)
    targets, layers, exclude = rule.names
    free = replace(rule, layers_to_transform=None, exclude_modules=None)
    for entry in _entries(rule.target_modules):
        if not any(_single(rule, entry).selects(key) for key in keys):
            why = (
                "all of its matches are excluded or outside the layers asked for"
                if any(_single(free, entry).selects(key) for key in keys)
                else _near(entry, keys)
            )
            if isinstance(rule.target_modules, str):
                why += f"; one string is a regular expression for the whole name, [{entry!r}] a list of endings"
            yield f"  {targets}: {entry!r} matches nothing; {why}."
    for index in _indices(rule.layers_to_transform):
        if not any(replace(rule, layers_to_transform=[index]).selects(key) for key in keys):
            present = sorted({int(m["idx"]) for k in keys if free.selects(k) and (m := _LAYER_INDEX.match(k))})
            yield f"  {layers}: {index} matches nothing; layers with such modules: {present}."
    for entry in _entries(rule.exclude_modules):
        if not any(_excluded_by(entry, isinstance(rule.exclude_modules, str))(key) for key in keys):
            yield f"  {exclude}: {entry!r} matches nothing; {_near(entry, keys)}."


def _unmatched_patterns(config: SO8TConfig, modules: Iterable[str]) -> Iterator[str]:
    """Yield one line for every entry of ``layers_pattern`` and ``rank_pattern`` that matches nothing."""
    keys = list(modules)
    rules = [rule for rule in (gate_rule(config), lora_rule(config)) if rule.layers_to_transform is not None]
    for pattern in _entries(config.layers_pattern):
        if not any(replace(rule, layers_pattern=[pattern]).selects(key) for rule in rules for key in keys):
            yield f"  layers_pattern: {pattern!r} matches nothing; {_near(pattern, keys)}."
    lora = [key for key in keys if lora_rule(config).selects(key)]
    for pattern in config.rank_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", key) for key in lora):
            yield f"  rank_pattern: {pattern!r} matches no module that gets LoRA; {_near(pattern, keys)}."


def _unmatched_saved(config: SO8TConfig, modules: Iterable[str]) -> Iterator[str]:
    """Yield one line for every entry of ``modules_to_save`` that is the end of no module's name, as PEFT matches."""
    keys = list(modules)
    for entry in config.modules_to_save or []:
        if not any(key.endswith(entry) for key in keys):
            yield f"  modules_to_save: {entry!r} matches nothing; {_near(entry, keys)}."


def _single(rule: Rule, entry: str) -> Rule:
    return rule if isinstance(rule.target_modules, str) else replace(rule, target_modules=[entry])


def _entries(value: list[str] | set[str] | str | None) -> list[str]:
    if not value:
        return []
    return [value] if isinstance(value, str) else sorted(value)


def _indices(value: list[int] | int | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _excluded_by(entry: str, regular: bool) -> Callable[[str], bool]:
    if regular:
        return lambda key: re.fullmatch(entry, key) is not None
    return lambda key: key == entry or key.endswith(f".{entry}")


def _near(entry: str, keys: Iterable[str]) -> str:
    """Return the names nearest to ``entry`` among the module names' endings of the same length."""
    depth = entry.count(".") + 1
    endings = {".".join(key.split(".")[-depth:]) for key in keys}
    close = difflib.get_close_matches(entry, sorted(e for e in endings if not e.isdigit()), n=3, cutoff=0.5)
    return f"near names: {', '.join(close)}" if close else "no name in this model is near it"
