"""Fields of a model's configuration that carry their own rule, and the configuration class that enforces them at once.

    width: int = setting(512, whole())        a value outside its rule → "width must be > 0, got -1"

All violations of a configuration come in one error: wrong values, contradictions between fields, and keys that are no
field, each with the nearest field, or with the place to which an earlier key has moved.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, ClassVar, Literal, Self

from transformers import PreTrainedConfig

from so8t_torch.core.errors import ConfigError
from so8t_torch.ops.tensor_train.decomposition import check_factors
from so8t_torch.ops.tensor_train.factors import balanced_factors, padded_factors

__all__ = ["RecurrentConfig", "choice", "flag", "number", "optional", "setting", "token_ids", "whole"]

Rule = Callable[[Any], str | None]
"""What a value fails to be, or ``None`` where it is all right."""

_OF_THE_LIBRARY = (
    *("attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels"),
    *("output_attentions", "quantization_config", "torch_dtype"),
)
"""Keys that transformers itself hands to every configuration."""


def setting(default: Any, rule: Rule) -> Any:
    """Return a dataclass field with a rule.

    Args:
        default: value where none is given.
        rule: what is said about a value that is not allowed.
    """
    return field(default=default, metadata={"rule": rule})


def whole(least: int = 1, *, power_of_two: bool = False) -> Rule:
    """Return the rule of a whole number.

    Args:
        least: smallest value.
        power_of_two: whether it must be one.
    """
    bound = f"must be > {least - 1}" if least == 1 else f"must be ≥ {least}"

    def rule(value: Any) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return "must be a whole number"
        if value < least:
            return bound
        return "must be a power of two" if power_of_two and value & (value - 1) else None

    return rule


def number(least: float = 0.0, below: float = math.inf, *, zero: bool = False) -> Rule:
    """Return the rule of a finite real number.

    Args:
        least: the value is above it, or from it on with ``zero``.
        below: the value is below it.
        zero: whether ``least`` itself is allowed.
    """
    bound = f"must be {'≥' if zero else '>'} {least:g}" + (f" and < {below:g}" if below < math.inf else "")

    def rule(value: Any) -> str | None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return "must be a number"
        return None if (least <= value if zero else least < value) and value < below else bound

    return rule


def flag(value: Any) -> str | None:
    """Return what a truth value has to be.

    Args:
        value: to be judged.
    """
    return None if isinstance(value, bool) else "must be true or false"


def choice(*values: Any) -> Rule:
    """Return the rule of a value out of a few.

    Args:
        values: what is allowed.
    """
    wanted = f"must be one of {', '.join(map(repr, values))}"
    return lambda value: None if any(type(value) is type(v) and value == v for v in values) else wanted


def token_ids(value: Any) -> str | None:
    """Return what one id of a token, or several, have to be.

    Args:
        value: to be judged.
    """
    several = value if isinstance(value, list) else [value]
    wrong = any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in several)
    return "must be an id ≥ 0, or a list of such" if wrong else None


def optional(rule: Rule) -> Rule:
    """Return a rule that allows ``None`` as well.

    Args:
        rule: of every other value.
    """
    return lambda value: None if value is None else rule(value)


class RecurrentConfig(PreTrainedConfig):
    """What the configurations of recurrent language models share.

    Args:
        vocab_size: V.
        d_model: width D of the residual stream.
        n_layers: blocks.
        n_seq: tokens of a training row, and rows of a trained table of positions; any length runs.
        ffn_dim: inner width of the feed-forward parts; 4D by default.
        dropout: share of activations dropped in training.
        layer_norm_eps: of every layer norm.
        position_embedding: ``"zeta"`` adds sines and cosines of the zeta zeros, ``"none"`` nothing.
        position_scale: size of a position's row beside a token's at the start; a small one lets a memory find a key
            again wherever its token stands.
        zeta_embedding_trainable: the first n_seq rows of them are trained.
        htt_rank: of every bond of an embedding that is a tensor train.
        htt_num_cores: its cores, 2, or 3 for a hierarchy of the vocabulary.
        htt_phase_encoding: whether it has a trained phase.
        tie_word_embeddings: the head is the transpose of the embedding.
        backend: of every operation that has more than one.
        initializer_range: standard deviation of embeddings and of a head of its own; d_model^−½ without, so that logits
            begin with unit variance.
        use_cache: whether a forward pass without labels returns its state.
        bos_token_id: for generation, as are the next two.
        eos_token_id: an id, or several.
        pad_token_id: an id.

    Raises:
        ConfigError: values, contradictions and unknown keys, all in one text.
    """

    model_type = ""
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model", "num_hidden_layers": "n_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "hidden_states", "aux_loss", "diagnostics"]
    moved: ClassVar[dict[str, str]] = {}
    """Where keys of the original went that are no field here."""

    vocab_size: int = setting(50257, whole())
    d_model: int = setting(512, whole())
    n_layers: int = setting(6, whole())
    n_seq: int = setting(1024, whole())
    ffn_dim: int | None = setting(None, optional(whole()))
    dropout: float = setting(0.1, number(below=1.0, zero=True))
    layer_norm_eps: float = setting(1e-5, number())
    position_embedding: Literal["zeta", "none"] = setting("none", choice("zeta", "none"))
    position_scale: float = setting(0.05, number())
    zeta_embedding_trainable: bool = setting(False, flag)
    htt_rank: int = setting(16, whole())
    htt_num_cores: int = setting(2, choice(2, 3))
    htt_phase_encoding: bool = setting(True, flag)
    tie_word_embeddings: bool = setting(True, flag)
    backend: Literal["auto", "eager", "triton"] = setting("auto", choice("auto", "eager", "triton"))
    initializer_range: float | None = setting(None, optional(number()))
    use_cache: bool = setting(True, flag)
    bos_token_id: int | None = setting(None, optional(whole(0)))
    eos_token_id: int | list[int] | None = setting(None, optional(token_ids))
    pad_token_id: int | None = setting(None, optional(whole(0)))

    def __post_init__(self, **kwargs: Any) -> None:
        """Give unknown keys and wrong values one error, and the rest to transformers."""
        problems = [self._unknown(key) for key in kwargs if not self._takes(key)]
        for key, name in self.attribute_map.items():
            if key in kwargs:
                value, default = kwargs.pop(key), type(self).__dataclass_fields__[name].default
                if getattr(self, name) not in (default, value):
                    problems.append(f"{key} is {name}, got {value!r} and {getattr(self, name)!r}; give one of them")
                setattr(self, name, value)
        self._refuse(problems + self._violations())
        if self.initializer_range is None:
            self.initializer_range = self.d_model**-0.5
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of a mapping; fields among the further arguments take precedence.

        Args:
            config_dict: what ``to_dict`` returned; it is not changed.
            **kwargs: fields, or arguments of ``PreTrainedConfig.from_dict``.

        Raises:
            ConfigError: as the class.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ConfigError(
                f"{cls.__name__}: expected the configuration of a {cls.model_type} model, got that of {kind!r:.80}; "
                "read it with AutoModelForCausalLM, or make a Phase 2 model of a Phase 1 one by so8t convert."
            )
        ours = {*cls.settings(), *cls.attribute_map}
        tree = dict(config_dict) | {key: kwargs.pop(key) for key in list(kwargs) if key in ours}
        return super().from_dict(tree, **kwargs)

    @classmethod
    def settings(cls) -> dict[str, Rule]:
        """Return the fields that have a rule, with it."""
        return {f.name: f.metadata["rule"] for f in fields(cls) if "rule" in f.metadata}

    @property
    def layer_types(self) -> list[str]:
        """The kind of state of each block, for the library's cache."""
        return ["linear_attention"] * self.n_layers

    def validate(self) -> None:
        """Check all fields, also those set after construction.

        Raises:
            ConfigError: one line for each violation.
        """
        self._refuse(self._violations())

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values.

        Args:
            **changes: fields.

        Raises:
            ConfigError: as the class.
        """
        renamed = {self.attribute_map.get(key, key): value for key, value in changes.items()}
        follows = {"initializer_range": None} if self.initializer_range == self.d_model**-0.5 else {}
        return type(self)(**self.to_dict() | follows | renamed)

    def _takes(self, key: str) -> bool:
        return key.startswith("_") or key in _OF_THE_LIBRARY or key in self.attribute_map

    def _unknown(self, key: str) -> str:
        """Return what to do about a key that is no field."""
        if key in self.moved:
            return f"{key} is no field: {self.moved[key]}"
        names = list(self.settings())
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        return f"{key} is no field: " + (f"did you mean {near[0]}?" if near else f"expected {', '.join(names)}")

    def _violations(self) -> list[str]:
        """Return what is wrong with single fields, and then between those that are all right."""
        problems = {name: rule(getattr(self, name)) for name, rule in self.settings().items()}
        found = [f"{name} {text}, got {getattr(self, name)!r}" for name, text in problems.items() if text]
        return found + self._contradictions({name for name, text in problems.items() if text is None})

    def _contradictions(self, sound: set[str]) -> list[str]:
        """Return what is wrong between fields, as far as each of them alone is sound."""
        found = []
        if self.zeta_embedding_trainable is True and self.position_embedding == "none":
            found.append("zeta_embedding_trainable needs position_embedding 'zeta', got 'none'")
        if "vocab_size" in sound:
            found += self._outside_the_vocabulary(sound)
        if self.embedding == "complex_tt" and self.tie_word_embeddings is True:
            found.append("tie_word_embeddings must be false with complex cores: a head has no complex meaning")
        if self.embedding in ("tt", "complex_tt") and {"vocab_size", "d_model", "htt_rank", "htt_num_cores"} <= sound:
            found += self._of_the_train(2 if self.embedding == "complex_tt" else 1)
        return found

    def _outside_the_vocabulary(self, sound: set[str]) -> list[str]:
        """Return which special tokens no row of the embedding belongs to."""
        found = []
        for name in sorted({"bos_token_id", "eos_token_id", "pad_token_id"} & sound):
            value = getattr(self, name)
            several = value if isinstance(value, list) else [value]
            if any(i is not None and i >= self.vocab_size for i in several):
                found.append(f"{name} must be < vocab_size {self.vocab_size}, got {value!r}")
        return found

    def _of_the_train(self, parts: int) -> list[str]:
        """Return why there is no embedding of real (1 part) or complex cores (2) with the rank and cores asked for."""
        if self.d_model % parts:
            return [f"d_model must be even with complex cores, got {self.d_model}"]
        width, cores, rank = self.d_model // parts, self.htt_num_cores, self.htt_rank
        try:
            factors = padded_factors(self.vocab_size, cores), balanced_factors(width, cores)
            check_factors("tensor train", (self.vocab_size, width), *factors, (rank,) * (cores - 1))
        except ConfigError as error:
            return [f"htt_rank {rank} and htt_num_cores {cores} do not fit d_model {self.d_model}: {error}"]
        return []

    def _refuse(self, violations: list[str]) -> None:
        if violations:
            lines = "".join(f"\n  {line}" for line in violations)
            raise ConfigError(f"This {type(self).__name__} is not valid; correct every line:{lines}")
