"""What the configurations of the models share: how a ``config.json`` is read, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

__all__ = ["ModelConfig"]

RUNNING = ("backend", "bos_token_id", "dropout", "eos_token_id", "pad_token_id", "use_cache")
LIBRARY = (
    *(
        "_name_or_path",
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
    ),
    *("label2id", "layer_types", "model_type", "output_attentions", "output_hidden_states", "problem_type"),
    *("return_dict", "tokenizer_class", "torch_dtype", "transformers_version"),
)
"""Keys that transformers writes beside the fields."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Fields that are mathematics; here those that both phases have.

    Raises:
        ValueError: a field has a value that the definition does not know; the text names all of them.
    """

    model_type: ClassVar[str]
    running: ClassVar[tuple[str, ...]] = RUNNING
    """Fields of production that change how a model runs, trains or generates, and not what it computes."""

    vocab_size: int = 50257
    d_model: int = 512
    n_layers: int = 6
    n_seq: int = 1024
    ffn_dim: int | None = None
    layer_norm_eps: float = 1e-5
    position_embedding: Literal["zeta", "none"] = "none"
    position_scale: float = 0.05
    zeta_embedding_trainable: bool = False
    htt_rank: int = 16
    htt_num_cores: int = 2
    htt_phase_encoding: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float | None = None

    def __post_init__(self) -> None:
        """Refuse words that name nothing, and let rows begin at d_model^−½ where no number is given."""
        if self.initializer_range is None:
            object.__setattr__(self, "initializer_range", self.d_model**-0.5)
        kinds = {name: kind for name, kind in get_type_hints(type(self)).items() if get_origin(kind) is Literal}
        wrong = [
            f"{name}: expected {' or '.join(map(repr, get_args(kind)))}, got {getattr(self, name)!r}"
            for name, kind in kinds.items()
            if getattr(self, name) not in get_args(kind)
        ]
        if wrong:
            raise ValueError(f"the definition of {self.model_type!r} has no such model: " + "; ".join(wrong))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """Return the configuration that a ``config.json`` holds.

        Args:
            tree: its content.

        Raises:
            ValueError: it is of another model, has a key that is no field here, or a value that is none.
        """
        kind = tree.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"expected the configuration of a model {cls.model_type!r}, got {kind!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(tree.keys() - names - {*cls.running, *LIBRARY})
        if unknown:
            raise ValueError(f"the definition of {cls.model_type!r} has no field {', '.join(unknown)}")
        return cls(**{name: value for name, value in tree.items() if name in names})
