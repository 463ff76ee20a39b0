"""What an SO(8) adapter is: which modules get a gate, which get LoRA, and what trains.

    y = R(W x + b + s B A x),   R = R_cmd R_safe,   R_• = chart(A_•),   s = lora_alpha / r

Two independent selections: ``target_modules`` and its companions choose the modules whose output is rotated,
``lora_target_modules`` and its companions those that get a low-rank update. A module may have one or both.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from so8t_torch.adapter.patterns import fault_of
from so8t_torch.adapter.registration import add_member
from so8t_torch.core.errors import AdapterError, ConfigError
from so8t_torch.core.json_text import nonfinite, read_object, short

PEFT_TYPE = add_member()

CHARTS = ("exp", "cayley")
TRAIN_GATES = ("safe", "cmd", "routed")
DEFAULT_GATE_TARGETS = ["o_proj"]
ALL_LINEAR = "all-linear"
MAX_BYTES = 1 << 18

Names = list[str] | set[str] | str | None
Indices = list[int] | int | None


@dataclass
class SO8TConfig(PeftConfig):
    """Configuration of an SO(8) adapter, for ``peft.get_peft_model`` and everything that takes a PEFT config.

    Every entry of every list must match something in the model, otherwise wrapping the model raises an error
    that names the entry and lists near names.

    Args:
        target_modules: modules whose output gets a gate: names or name endings, a regular expression, or
            ``"all-linear"``. None means ``["o_proj"]``; an empty list means no gates (LoRA only).
        layers_to_transform: indices of the layers that get gates; None means all.
        layers_pattern: name of the list of layers (``"layers"``), for gates and LoRA, when it is ambiguous.
        exclude_modules: modules that get no gate although ``target_modules`` names them.
        chart: ``"exp"`` or ``"cayley"``; stored with the weights and checked when they are loaded.
        shared: one generator per layer instead of one per block of eight channels.
        train_gates: which factor learns: ``"safe"``, ``"cmd"``, or ``"routed"`` (rows chosen by
            ``set_gate_routes`` give gradient to R_safe only, the others to R_cmd only).
        r: rank of LoRA; 0 means none.
        lora_target_modules: modules that get LoRA, as ``target_modules``; None means ``"all-linear"``.
        lora_layers_to_transform: indices of the layers that get LoRA; None means all.
        lora_alpha: LoRA is scaled by ``lora_alpha / r``.
        lora_dropout: dropout on LoRA's input, in [0, 1).
        rank_pattern: rank by module name ending or regular expression, where it differs from ``r``.
        modules_to_save: modules trained whole and stored beside the adapter.
        quantization: the base's quantisation configuration when the adapter was made, empty if it had none;
            filled in when a model is wrapped, and read by ``bake`` to fold into the weights that training saw.
    """

    target_modules: Names = None
    layers_to_transform: Indices = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: Names = None
    chart: str = "exp"
    shared: bool = False
    train_gates: str = "safe"
    r: int = 0
    lora_target_modules: Names = None
    lora_layers_to_transform: Indices = None
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_types()
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.target_modules is None:
            self.target_modules = list(DEFAULT_GATE_TARGETS)
        if self.r > 0 and self.lora_target_modules is None:
            self.lora_target_modules = ALL_LINEAR
        self._check_choices()
        self._check_selection()
        for place, value in nonfinite(vars(self)):
            raise ConfigError(f"SO8TConfig: expected finite numbers, got {value} in {place:.80}.")

    @property
    def has_gates(self) -> bool:
        """Whether any module is asked to have a gate."""
        return bool(self.target_modules)

    def _check_types(self) -> None:
        _expect("r", self.r, _is_whole(self.r), "a whole number")
        _expect("shared", self.shared, isinstance(self.shared, bool), "true or false")
        for name in ("lora_alpha", "lora_dropout"):
            value = getattr(self, name)
            _expect(name, value, isinstance(value, int | float) and not isinstance(value, bool), "a number")
        ranks = self.rank_pattern
        numbers = isinstance(ranks, dict) and all(_is_whole(rank) for rank in ranks.values())
        _expect("rank_pattern", ranks, numbers, "names with whole numbers")
        for name in ("target_modules", "lora_target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "modules_to_save":
                _check_regular(name, value)
            elif value is not None:
                listed = isinstance(value, list | tuple | set) and all(isinstance(entry, str) for entry in value)
                _expect(name, value, listed, "a list of names")
        for pattern in (*ranks, *(self.layers_pattern or [] if not isinstance(self.layers_pattern, str) else [])):
            _check_regular("rank_pattern or layers_pattern", pattern)
        for name in ("layers_to_transform", "lora_layers_to_transform"):
            value = getattr(self, name)
            whole = isinstance(value, list | tuple) and bool(value) and all(map(_is_whole, value))
            _expect(name, value, value is None or _is_whole(value) or whole, "indices of layers (None means all)")

    def _check_choices(self) -> None:
        for name, allowed in (("chart", CHARTS), ("train_gates", TRAIN_GATES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"SO8TConfig: expected {name} to be one of {', '.join(allowed)}, got {short(value)}.")
        if self.r < 0:
            raise ConfigError(f"SO8TConfig: expected r >= 0, got {short(self.r)}.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"SO8TConfig: expected 0 <= lora_dropout < 1, got {short(self.lora_dropout)}.")
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                raise ConfigError(
                    f"SO8TConfig: expected a rank of at least 1 in rank_pattern, got {short(key)}: {short(rank)}."
                )

    def _check_selection(self) -> None:
        if self.r == 0:
            low_rank = ("lora_target_modules", "lora_layers_to_transform", "lora_dropout", "rank_pattern")
            given = [name for name in low_rank if getattr(self, name)]
            if given:
                raise ConfigError(f"SO8TConfig: {', '.join(given)} given although r = 0 asks for no LoRA; set r.")
            if not self.has_gates:
                raise ConfigError("SO8TConfig: target_modules is empty and r = 0, so there is nothing to adapt.")
        for targets, layers in (
            ("target_modules", "layers_to_transform"),
            ("lora_target_modules", "lora_layers_to_transform"),
        ):
            if isinstance(getattr(self, targets), str) and getattr(self, layers) is not None:
                raise ConfigError(f"SO8TConfig: {layers} needs a list in {targets}, not one string; name the modules.")
        if self.layers_pattern and self.layers_to_transform is None and self.lora_layers_to_transform is None:
            raise ConfigError("SO8TConfig: layers_pattern has no effect without layers_to_transform.")

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read an adapter configuration and refuse unknown keys and numbers that are not finite.

        Args:
            path_json_file: path of ``adapter_config.json``.
            **kwargs: accepted as PEFT's interface asks, unused.

        Raises:
            AdapterError: naming the file and the key.
        """
        del kwargs
        stored = read_json(path_json_file)
        known = [f.name for f in fields(cls)]
        for key in stored:
            if key not in known:
                near = difflib.get_close_matches(key[:80], known, n=1, cutoff=0.6)
                hint = f" (near: {near[0]!r})" if near else ""
                raise AdapterError(
                    f"{path_json_file}: expected the fields of SO8TConfig, got {short(key)}{hint}; "
                    "it was saved by another method or a newer version."
                )
        return stored


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"SO8TConfig: expected {name} to be {wanted}, got {short(value)}.")


def _check_regular(name: str, pattern: str) -> None:
    if (fault := fault_of(pattern)) is not None:
        raise ConfigError(f"SO8TConfig: expected a regular expression in {name}, got {short(pattern)}: {fault}.")


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object of at most 256 KiB: keys once, finite numbers, whole characters.

    Args:
        path: of a regular UTF-8 file, with or without byte order mark.

    Raises:
        AdapterError: naming the file and the key that holds the number, or what cannot be read.
    """
    return read_object(path, AdapterError, limit=MAX_BYTES)
