"""Embeddings as tensor trains: the layer, the contraction of two cores, and what builds, swaps in and checks a layer.

    E[i] = Σ_ρ f(θ_ρ) C_1[j_1, 1, ρ_1, :] ⊗ C_2[j_2, ρ_1, ρ_2, :] ⊗ …      j = π(i)

Symbols and initialisation: so8t_torch/nn/holographic_embedding.py. A table that is swapped for a train is decomposed by
default, and refused when the train is further away than allowed.
Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Inexact, Int
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.tensor_train_compression import compress_embedding
from so8t_torch.ops import tensor_train

__all__ = [
    "HolographicTTEmbedding",
    "calculate_htt_memory_savings",
    "create_htt_embedding",
    "replace_embedding_with_htt",
    "tt_contraction_memory_efficient",
    "verify_compression_ratio",
    "verify_gradient_flow",
]

MEGABYTE = 1024**2


def tt_contraction_memory_efficient(
    idx1: Int[Tensor, "*batch"],
    idx2: Int[Tensor, "*batch"],
    core1: Inexact[Tensor, "v1 1 r d1"],
    core2: Inexact[Tensor, "v2 r 1 d2"],
    d_model: int,
    use_triton: bool = True,
    block_size: int = 32,
) -> Inexact[Tensor, "*batch d"]:
    """Return Σ_ρ core1[i₁, 0, ρ, a] core2[i₂, ρ, 0, b] as rows a·d₂ + b, cropped to d_model, with gradients.

    Args:
        idx1: first digits of the ids, in [0, v1).
        idx2: second digits, in [0, v2).
        core1: first core.
        core2: second core.
        d_model: width of a row, at most d1·d2.
        use_triton: take the kernel where it can run; without it the plain PyTorch path.
        block_size: accepted for callers of the original, at least 1; tiles come from the tile table.

    Raises:
        DomainError: an index is out of range or no whole number.
        ShapeError: the cores do not fit each other, idx1 or d_model.
        ConfigError: block_size is below 1.
    """
    if block_size < 1:
        raise ConfigError(f"tt_contraction_memory_efficient: expected block_size ≥ 1, got {block_size}.")
    if idx1.shape != idx2.shape:
        raise ShapeError(
            f"tt_contraction_memory_efficient: expected indices of one shape, got {tuple(idx1.shape)} and "
            f"{tuple(idx2.shape)}."
        )
    if any(x.is_floating_point() or x.is_complex() or x.dtype == torch.bool for x in (idx1, idx2)):
        raise DomainError(
            f"tt_contraction_memory_efficient: expected indices of an integer dtype, got {idx1.dtype} and "
            f"{idx2.dtype}; convert them."
        )
    idx1, idx2 = idx1.long(), idx2.long()
    inside = (idx1 >= 0) & (idx1 < core1.shape[0]) & (idx2 >= 0) & (idx2 < core2.shape[0])
    ids = torch.where(inside, idx1 * core2.shape[0] + idx2, -1)
    return tensor_train.rows(ids, core1, core2, d_model=d_model, backend="auto" if use_triton else "eager")


def create_htt_embedding(
    vocab_size: int, d_model: int, config: Mapping[str, Any] | object | None = None
) -> HolographicTTEmbedding:
    """Return a layer with rank, cores and phase from a configuration.

    Args:
        vocab_size: V.
        d_model: D.
        config: mapping or object with any of ``htt_rank``, ``htt_num_cores`` and ``htt_phase_encoding``; what it lacks
            is the class's default.
    """
    return HolographicTTEmbedding(vocab_size, d_model, **_settings(config))


def replace_embedding_with_htt(
    model: nn.Module,
    embedding_attr: str = "token_embedding",
    config: Mapping[str, Any] | object | None = None,
    *,
    initialise: Literal["decompose", "random"] = "decompose",
    sweeps: int = 3,
    max_relative_error: float | None = 0.1,
    predicate: Callable[[str, nn.Embedding], bool] | None = None,
) -> nn.Module:
    """Replace embeddings of a model in place: the named one, or those that a predicate chooses.

    Nothing is replaced unless everything can be. Other embeddings (of positions, say) stay. A head that shares the
    table keeps its own; tie it with ``TensorTrainHead``.

    Args:
        model: any module.
        embedding_attr: dotted name of the ``nn.Embedding``; unused with a predicate.
        config: as for ``create_htt_embedding``.
        initialise: ``"decompose"`` approximates the present table, ``"random"`` starts afresh.
        sweeps: of least squares after the decomposition.
        max_relative_error: the largest error of the decomposition that is kept; None keeps everything.
        predicate: called with the dotted name and the module of every ``nn.Embedding``; True replaces it.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such attribute (a ConfigError), or the predicate chooses nothing.
        TypeError: it is not an ``nn.Embedding``, or one whose lookup does more than return a row.
        DomainError: the error is above the gate; the text names ranks that are enough.
    """
    if initialise not in ("decompose", "random"):
        raise ConfigError(f"expected initialise 'decompose' or 'random', got {initialise!r}.")
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    names = [embedding_attr] if predicate is None else [n for n, m in embeddings.items() if predicate(n, m)]
    if not names:
        raise ConfigError(f"expected the predicate to choose an embedding, got none of {', '.join(embeddings)}.")
    fresh = {}
    for name in names:
        embedding = _plain_embedding(model, name, list(embeddings))
        fresh[name] = _train_of(embedding, _settings(config), initialise, sweeps, max_relative_error)
    for name, layer in fresh.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.train(model.training))
    return model


def verify_compression_ratio(embedding: HolographicTTEmbedding, target_ratio: float = 0.1) -> dict[str, Any]:
    """Return parameter counts, their ratio, and whether it is at most the target.

    Args:
        embedding: the layer.
        target_ratio: largest share of the full table.
    """
    standard, found = embedding.get_parameter_counts()
    return {
        "standard_params": standard,
        "tt_params": found,
        "compression_ratio": found / standard,
        "compression_percentage": 100.0 * found / standard,
        "meets_target": found / standard <= target_ratio,
        "parameter_reduction": standard - found,
    }


def verify_gradient_flow(embedding: HolographicTTEmbedding, input_ids: Int[Tensor, "*batch"]) -> dict[str, Any]:
    """Return for every parameter whether ½ Σ|E[ids]|² sends it a gradient, and that gradient's norm.

    Args:
        embedding: the layer; its ``grad`` fields are left alone.
        input_ids: ids to look up.
    """
    rows = embedding.forward_complex(input_ids) if embedding.complex_cores else embedding(input_ids)
    named = dict(embedding.named_parameters())
    energy = torch.view_as_real(rows).square().sum() if rows.is_complex() else rows.float().square().sum()
    gradients = torch.autograd.grad(0.5 * energy, list(named.values()))
    norms = {name: float(g.norm()) for name, g in zip(named, gradients, strict=True)}
    flags = {f"{name}_has_grad": norm > 0 for name, norm in norms.items()}
    return {
        **flags,
        **{f"{name}_grad_norm": norm for name, norm in norms.items()},
        "all_have_grad": all(flags.values()),
    }


def calculate_htt_memory_savings(
    vocab_size: int, d_model: int, rank: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Return the bytes of the parameters alone, in MB of 2²⁰ bytes: full table, two cores with phase, difference.

    Args:
        vocab_size: V.
        d_model: D.
        rank: of the bond.
        dtype: of both.
    """
    layer = HolographicTTEmbedding(vocab_size, d_model, rank, device="meta")
    standard, found = (n * dtype.itemsize / MEGABYTE for n in layer.get_parameter_counts())
    return {
        "standard_mb": standard,
        "tt_mb": found,
        "saved_mb": standard - found,
        "saved_percentage": 100.0 * (1.0 - found / standard),
    }


def _settings(config: Mapping[str, Any] | object | None) -> dict[str, Any]:
    known = {"htt_rank": "rank", "htt_num_cores": "num_cores", "htt_phase_encoding": "phase_encoding"}
    given = config if isinstance(config, Mapping) else {n: getattr(config, n) for n in known if hasattr(config, n)}
    return {argument: given[name] for name, argument in known.items() if name in given}


def _plain_embedding(model: nn.Module, name: str, known: list[str]) -> nn.Embedding:
    """Return the embedding of that name if it does nothing but look up a row."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(
            f"expected an embedding at {name!r}, got no such module; this model has {', '.join(known) or 'none'}."
        ) from error
    if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq:
        raise TypeError(f"expected a plain nn.Embedding at {name!r}, got {module}; its lookup would change.")
    return module


def _train_of(
    embedding: nn.Embedding,
    settings: dict[str, Any],
    initialise: str,
    sweeps: int,
    max_relative_error: float | None,
) -> HolographicTTEmbedding:
    """Return the tensor train that takes the place of an embedding."""
    table, padding = embedding.weight, embedding.padding_idx
    if initialise == "random":
        size = embedding.num_embeddings, embedding.embedding_dim
        scale = float(table.detach().double().square().mean().sqrt()) or 0.02
        return HolographicTTEmbedding(
            *size, **settings, init_scale=scale, padding_idx=padding, device=table.device, dtype=table.dtype
        )
    phase = settings.pop("phase_encoding", False)
    found = compress_embedding(table, **settings, sweeps=sweeps, max_relative_error=max_relative_error)
    padding = padding if padding is not None and not bool(table[padding].any()) else None
    return HolographicTTEmbedding.from_compressed(found, padding_idx=padding, phase_encoding=phase)
