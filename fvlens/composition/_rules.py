"""Ways from scores to weights: each one function, rows are analogies, columns the basis.

Scores are whatever the affine map of a composite gives (by default log-probabilities of the source's answer under each
basis vector, in nats). Weights are at least 0 and sum to 1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Scores = Float[Tensor, "*row relation"]


def softmax_weights(scores: Scores) -> Scores:
    """``exp(s_i) / sum_j exp(s_j)``: every basis vector takes some part."""
    return scores.softmax(dim=-1)


def sparsemax_weights(scores: Scores) -> Scores:
    """The nearest point of the simplex, ``argmin_w |w - s|^2``: most weights are exactly 0.

    References:
        Martins and Astudillo 2016, arXiv:1602.02068, algorithm 1.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    above = 1 + rank * ordered > ordered.cumsum(dim=-1)
    support = above.sum(dim=-1, keepdim=True)
    threshold = (ordered.cumsum(dim=-1).gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)


def entmax_weights(scores: Scores) -> Scores:
    """1.5-entmax, ``w_i = max(s_i / 2 - t, 0)^2`` with t such that they sum to 1: between softmax and sparsemax.

    References:
        Peters, Niculae and Martins 2019, arXiv:1905.05702, algorithm 2.
    """
    half = scores / 2
    half = half - half.max(dim=-1, keepdim=True).values
    ordered = half.sort(dim=-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    mean = ordered.cumsum(dim=-1) / rank
    spread = rank * (ordered.square().cumsum(dim=-1) / rank - mean.square())
    threshold = mean - ((1 - spread) / rank).clamp(min=0).sqrt()
    support = (threshold <= ordered).sum(dim=-1, keepdim=True)
    return (half - threshold.gather(-1, support - 1)).clamp(min=0).square()


def uniform_weights(scores: Scores) -> Scores:
    """The same for every basis vector, whatever the scores."""
    return torch.full_like(scores, 1 / scores.shape[-1])


def best_single_weights(scores: Scores) -> Scores:
    """All on the basis vector with the highest score."""
    return torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)


def top_k_weights(scores: Scores, k: int = 5) -> Scores:
    """Softmax over the k highest scores, 0 elsewhere.

    Raises:
        ValueError: ``k`` is not between 1 and the size of the basis.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"top_k_weights: expected k in 1..{scores.shape[-1]} (the size of the basis), got {k}.")
    best = scores.topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, best.indices, best.values.softmax(dim=-1))


RULES: dict[str, Callable[[Scores], Scores]] = {
    "softmax": softmax_weights,
    "sparsemax": sparsemax_weights,
    "entmax": entmax_weights,
    "top_k": top_k_weights,
    "best_single": best_single_weights,
    "uniform": uniform_weights,
}
"""Rules by name; ``softmax`` is the paper's."""


def weights_by(rule: str, scores: Scores) -> Scores:
    """Weights by a rule of :data:`RULES`.

    Raises:
        ValueError: no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"no rule named {rule!r}; expected one of {', '.join(RULES)}.")
    return RULES[rule](scores)
