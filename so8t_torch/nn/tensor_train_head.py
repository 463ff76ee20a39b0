"""The output head that is exactly the transpose of a tensor-train embedding, and its cross-entropy without logits.

    logits[i] = ⟨h, E[i]⟩      loss = mean over labels t of  log Σ_{i<V} exp(logits_i) − logits_t

Symbols: h hidden states (…, D), E the rows of the embedding in the order of the ids. The operations work on positions
π(i); here ids go in and ids come out. The embedding's parameters are shared, not copied.
Cost: that of ``ops.tensor_train.logits`` and ``cross_entropy``: the latter holds a tile, never T × V numbers.
Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.nn.holographic_embedding import NOWHERE, HolographicTTEmbedding
from so8t_torch.ops import tensor_train

__all__ = ["TensorTrainHead"]


class TensorTrainHead(nn.Module):
    """Scores of all ids from hidden states, tied to an embedding.

    Under autocast hidden states and cores are cast to its dtype, as those of ``nn.Linear`` are.

    Args:
        embedding: whose cores, phase and permutation are used; it stays a module of its own, with shared parameters.

    Raises:
        DomainError: the embedding is complex: a head has no unique complex meaning.
        ConfigError: the embedding has a ``padding_idx``: its zero row is not part of the train, so the train's
            transpose would score that id.
    """

    def __init__(self, embedding: HolographicTTEmbedding) -> None:
        super().__init__()
        if embedding.complex_cores:
            raise DomainError("TensorTrainHead: expected an embedding with real cores; a head has no complex meaning.")
        if embedding.padding_idx is not None:
            raise ConfigError(
                f"TensorTrainHead: expected an embedding without padding_idx, got {embedding.padding_idx}; its zero "
                "row is not part of the train. Leave padding to the attention mask and to ignored labels."
            )
        self.embedding = embedding

    bias = None
    """There is none, as callers of a linear head may want to know."""

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """The table E, V·D numbers with a gradient, for callers that multiply by it themselves."""
        return self.embedding.dense_table()

    def forward(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch v"]:
        """Return the logits of all ids; V numbers for each hidden state.

        Args:
            hidden: of width d_model.

        Raises:
            DomainError: the width is not d_model.
        """
        hidden, cores = self._operands(hidden)
        placed = tensor_train.logits(hidden, *cores, vocab_size=self.embedding.vocab_size, backend=self._tiles())
        return placed.index_select(-1, self.embedding.id_permutation)

    def last_logits(self, hidden: Float[Tensor, "*batch t d"]) -> Float[Tensor, "*batch v"]:
        """Return the logits of the last position alone, which is all that decoding needs.

        Args:
            hidden: (…, T, d_model).
        """
        return self(hidden[..., -1, :])

    def loss(
        self,
        hidden: Float[Tensor, "*batch d"],
        labels: Int[Tensor, "*batch"],
        *,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Return the cross-entropy of labels, as ``torch.nn.functional.cross_entropy`` of the logits; none are stored.

        Args:
            hidden: of width d_model.
            labels: the id wanted at each position, not shifted, or ignore_index.
            ignore_index: the label that counts for nothing.
            reduction: ``"mean"`` over labels that count (NaN if there is none, as in PyTorch), ``"sum"`` or ``"none"``.

        Raises:
            DomainError: a label is out of range, or the width is not d_model.
            ConfigError: an unknown reduction.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ConfigError(f"TensorTrainHead: expected reduction 'mean', 'sum' or 'none', got {reduction!r}.")
        hidden, cores = self._operands(hidden)
        losses = tensor_train.cross_entropy(
            hidden,
            self.embedding.positions(labels, ignore_index),
            *cores,
            vocab_size=self.embedding.vocab_size,
            ignore_index=NOWHERE,
            backend=self._loss_backend(),
        )
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / (labels != ignore_index).sum()

    def topk(
        self, hidden: Float[Tensor, "*batch d"], k: int
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """Return the k largest logits and their ids, largest first, found slab by slab.

        Args:
            hidden: of width d_model.
            k: 1 ≤ k ≤ V.

        Returns:
            Logits and ids; of equal logits the one at the lower position π(i) comes first.

        Raises:
            DomainError: the width is not d_model.
            ConfigError: k is out of range.
        """
        hidden, cores = self._operands(hidden)
        size = self.embedding.vocab_size
        values, places = tensor_train.topk(hidden, *cores, k=k, vocab_size=size, backend=self._tiles())
        return values, self.embedding.id_permutation.argsort()[places]

    def _operands(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        width = self.embedding.d_model
        if hidden.ndim == 0 or hidden.shape[-1] != width:
            raise DomainError(f"TensorTrainHead: expected hidden states of width {width}, got {tuple(hidden.shape)}.")
        cores = self.embedding.cores()
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            return hidden.to(dtype), tuple(core.to(dtype) for core in cores)
        return hidden, cores

    def _tiles(self) -> str:
        """Return the backend of logits and top-k, which have no kernel."""
        return "eager" if self.embedding.backend == "eager" else "auto"

    def _loss_backend(self) -> str:
        return "triton" if self.embedding.backend == "triton_atomic" else self.embedding.backend
