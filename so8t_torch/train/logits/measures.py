"""What saved logits say: loss, entropy, accuracy, calibration, and how two records of the same tokens differ.

With p_i = exp(z_i − logsumexp):

    nll = logsumexp − z_label     confidence = max p     H = −Σ p_i log p_i     KL(a‖b) = Σ p_i log(p_i / q_i)

Of k logits the rest m = 1 − Σ p_i is known but not how it is spread over the other V − k tokens, none of which has
more than p_k; so the entropy lies between S − m log p_k and S − m log(m / (V − k)), S the part of the k. KL over the
partition {each token that both kept, all the others} is at most the true one. Both are exact when every logit was kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from so8t_torch.core.errors import DataError
from so8t_torch.safety.metrics import calibration_error
from so8t_torch.train.logits.record import PLACED, LogitsRecord


@dataclass(frozen=True)
class Judged:
    """What the model said at each of N positions, in float64; ``left_out`` counts positions with a number not finite.

    ``entropy`` has two columns, its lower and its upper bound in nats.
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    nll: Tensor
    entropy: Tensor
    left_out: int

    @property
    def right(self) -> Tensor:
        """Return where the likeliest token was the label."""
        return self.predicted == self.labels


@dataclass(frozen=True)
class Summary:
    """Means of one record or of several; entropy between two bounds, in nats."""

    positions: int
    left_out: int
    loss: float
    entropy: tuple[float, float]
    accuracy: float
    confidence: float
    calibration_error: float


@dataclass(frozen=True)
class Difference:
    """How record b differs from record a on the same tokens; ``divergence`` is KL(a‖b) or, of top-k, less than it."""

    agreement: float
    label_change: float
    divergence: float
    exact: bool


def largest(record: LogitsRecord) -> tuple[Tensor, Tensor]:
    """Return the kept logits in float64 and their ids, (N, k) each; the whole rows in mode ``full``."""
    if record.mode == "topk":
        return record.tensors["values"].double(), record.tensors["ids"].long()
    logits = record.tensors["logits"].double()
    return logits, torch.arange(record.vocabulary).expand(logits.shape[0], -1)


def judge(record: LogitsRecord) -> Judged:
    """Return what the model said at each position; see this module's formulas."""
    values, ids = largest(record)
    total = record.tensors["logsumexp"].double()
    nll = total - record.tensors["label_logits"].double()
    # a masked token has the logit −∞; NaN and +∞ are no logits
    good = (values < math.inf).all(1) & torch.isfinite(nll)
    values, ids, total = values[good], ids[good], total[good]
    best = values.argmax(1, keepdim=True)
    return Judged(
        record.tensors["labels"][good].long(),
        ids.gather(1, best)[:, 0],
        (values.gather(1, best)[:, 0] - total).exp().clamp(max=1.0),
        nll[good],
        entropy_bounds(values - total[:, None], record.vocabulary),
        int((~good).sum()),
    )


def entropy_bounds(log_p: Tensor, vocabulary: int) -> Tensor:
    """Return the lower and the upper bound of each row's entropy.

    Args:
        log_p: (N, k) logarithms of the largest probabilities.
        vocabulary: number of tokens they were chosen from.
    """
    p = log_p.exp()
    part = torch.special.entr(p).sum(1)
    unseen = vocabulary - log_p.shape[1]
    if unseen <= 0:
        return torch.stack([part, part], dim=1)
    rest = (1 - p.sum(1)).clamp(min=0)
    low = part - rest * log_p.amin(1)
    high = part - torch.special.xlogy(rest, rest / unseen)
    # rounding of logsumexp may put the even spread below the concentrated one where hardly anything is left
    return torch.stack([torch.minimum(low, high), torch.maximum(low, high)], dim=1)


def together(parts: Sequence[Judged]) -> Judged:
    """Return the positions of several records as one."""
    names = ("labels", "predicted", "confidence", "nll", "entropy")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Judged(**joined, left_out=sum(part.left_out for part in parts))


def summarise(judged: Judged) -> Summary:
    """Return the means; NaN where no position is left."""
    low, high = judged.entropy.mean(0).tolist() if len(judged.nll) else (math.nan, math.nan)
    error = calibration_error(zip(judged.confidence.tolist(), judged.right.tolist(), strict=True))
    return Summary(
        len(judged.nll),
        judged.left_out,
        judged.nll.mean().item(),
        (low, high),
        judged.right.double().mean().item(),
        judged.confidence.mean().item(),
        math.nan if error is None else error,
    )


def top_tokens(judged: Judged, count: int) -> list[tuple[int, float, float]]:
    """Return the tokens most often predicted: id, share of the predictions, share of the labels."""
    total = max(1, len(judged.labels))
    said, meant = Counter(judged.predicted.tolist()), Counter(judged.labels.tolist())
    return [(token, number / total, meant[token] / total) for token, number in said.most_common(count)]


def reliability(judged: Judged, bins: int = 10) -> list[tuple[float, float, int]]:
    """Return mean confidence, accuracy and number of positions of each equal-width bin that is not empty."""
    cell = (judged.confidence * bins).ceil().long().clamp(1, bins) - 1
    cells = [cell == index for index in range(bins)]
    return [
        (judged.confidence[at].mean().item(), judged.right[at].double().mean().item(), int(at.sum()))
        for at in cells
        if at.any()
    ]


def same_tokens(a: LogitsRecord, b: LogitsRecord) -> bool:
    """Whether two records are about the same tokens at the same places."""
    placed = [name for name in PLACED if name in ("labels", "rows", "positions")]
    alike = a.batch_shape == b.batch_shape and a.vocabulary == b.vocabulary
    return alike and all(torch.equal(a.tensors[name], b.tensors[name]) for name in placed)


def difference(a: LogitsRecord, b: LogitsRecord) -> Difference:
    """Return how b differs from a.

    Raises:
        DataError: they are not about the same tokens.
    """
    if not same_tokens(a, b):
        raise DataError("These records are about different tokens; only records of the same batch have a difference.")
    chances = [_log_chances(record) for record in (a, b)]
    good = torch.stack([(log_p < math.inf).all(1) for log_p, _ in chances]).all(0)
    (log_p, ids), (log_q, other) = ((values[good], tokens[good]) for values, tokens in chances)
    change = _log_label(b)[good] - _log_label(a)[good]
    predicted = [tokens.gather(1, values.argmax(1, keepdim=True)) for values, tokens in ((log_p, ids), (log_q, other))]
    return Difference(
        (predicted[0] == predicted[1]).double().mean().item(),
        change.abs().mean().item(),
        _divergence(log_p, ids, log_q, other, a.vocabulary).mean().item(),
        min(log_p.shape[1], log_q.shape[1]) == a.vocabulary,
    )


def _log_chances(record: LogitsRecord) -> tuple[Tensor, Tensor]:
    values, ids = largest(record)
    return values - record.tensors["logsumexp"].double()[:, None], ids


def _log_label(record: LogitsRecord) -> Tensor:
    return record.tensors["label_logits"].double() - record.tensors["logsumexp"].double()


def _divergence(log_p: Tensor, ids: Tensor, log_q: Tensor, other: Tensor, vocabulary: int) -> Tensor:
    """Return KL over the tokens that both kept and one cell of all the others, row by row to save memory."""
    found = []
    for row in range(ids.shape[0]):
        wide = torch.full((vocabulary,), -math.inf, dtype=torch.float64)
        wide[other[row]] = log_q[row]
        q = wide[ids[row]]
        shared = q > -math.inf
        p, q = log_p[row][shared], q[shared]
        known = (p.exp() * (p.clamp(min=-1e4) - q)).sum()
        rest_p, rest_q = ((1 - part.exp().sum()).clamp(min=0) for part in (p, q))
        if int(shared.sum()) < vocabulary and rest_p > 0:
            known = known + rest_p * (rest_p.log() - rest_q.clamp(min=torch.finfo(torch.float64).tiny).log())
        found.append(known)
    return torch.stack(found) if found else torch.full((1,), math.nan, dtype=torch.float64)
