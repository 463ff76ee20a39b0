"""Cross-entropy of the supervised tokens without the full logits.

    nll_n = log Σ_v exp(z_nv) − z_n,y(n),   z_n = W_head h_n

n runs over the positions whose next token is supervised, in chunks of C: at any time one (C, V) block of logits
exists instead of (B, T, V). Each block is recomputed in the backward pass, so no block is kept either.
Symbols: h hidden states after the last norm, V vocabulary, y(n) the next token. Cost: 6 N D V operations with the
recomputation, memory C V in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.data.chat import IGNORED


def supervised_nll(
    hidden: Float[Tensor, "b t d"], labels: Int[Tensor, "b t"], head: nn.Module, *, chunk: int
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the negative log-likelihood of every supervised token, and the row it stands in.

    Args:
        hidden: states that the head turns into logits.
        labels: token to learn at each position, ``IGNORED`` elsewhere; position 0 has no predecessor and is left out.
        head: module from hidden states to logits.
        chunk: number of positions whose logits exist at once.

    Returns:
        Values in nats, in the order of the supervised positions, and their row indices.
    """
    # positions are looked up once: each look-up makes a device wait for the host
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    states = hidden[rows, places].to(_input_dtype(head, hidden.dtype))
    parts = zip(states.split(chunk), labels[rows, places + 1].split(chunk), strict=True)
    nll = [checkpoint(_chunk_nll, s, t, head, use_reentrant=False, preserve_rng_state=False) for s, t in parts]
    return torch.cat(nll), rows


def row_sums(values: Float[Tensor, " n"], rows: Int[Tensor, " n"], count: int) -> Float[Tensor, "b 2"]:
    """Return, for each of ``count`` rows, the sum of its values and how many there are, in float64."""
    pairs = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    return torch.zeros(count, 2, dtype=torch.float64, device=values.device).index_add_(0, rows, pairs)


def _chunk_nll(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    logits = head(states)
    return functional.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), targets, reduction="none")


def _input_dtype(head: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype the head computes in; a quantised head takes what it is given."""
    weight = next(head.parameters())
    return weight.dtype if weight.dtype.is_floating_point else default
