"""Scores and their uncertainty, as pure tensor functions.

Two groups. Per-prompt scores read next-token logits: :func:`probability`, :func:`log_probability`, :func:`rank`,
:func:`best_token`, :func:`is_best`, :func:`kl_divergence`.
Summaries turn many scores into one number: accuracy, bootstrap intervals, rank correlation, overlap of two rankings.
Whole-answer scores of generated text close the file: :func:`exact_match`, :func:`token_f1`.

One definition of right: tokens are ordered by their logit, largest first, and equal logits by their id, smallest first.
An answer is right if its token comes first. :func:`rank`, :func:`best_token`, :func:`best_tokens` and :func:`is_best`
all read this one order, so that ranks and predictions never disagree, in half precision neither, where ties are common.
Whatever decides what a model answers calls one of them.

Precision: logits below float32 are widened to float32 before any sum; numbers returned as Python floats are summed in
float64 on the CPU. Tensors stay on the device of the logits, and probabilities keep their gradient.
"""

import string
from collections import Counter
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor

_CHUNK = 1 << 22
"""Most resampled values held at once by the bootstrap."""


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: lower end.
        high: upper end.
        level: the share of repetitions whose interval is meant to hold the true value, such as 0.95.
    """

    low: float
    high: float
    level: float


class Difference(NamedTuple):
    """The mean of paired differences ``a - b`` with its interval.

    Attributes:
        mean: mean of ``a - b``; positive where ``a`` is larger.
        interval: bootstrap interval of that mean.
    """

    mean: float
    interval: Interval


def probability(logits: Float[Tensor, "*batch d_vocab"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Probability of a token under the softmax of the logits.

    ``P(y) = exp(logit_y) / sum_v exp(logit_v)``. CIE and AIE use this, as in the paper, not its logarithm.

    Args:
        logits: next-token logits.
        tokens: id of the token to read at each place, such as ``prompts.first_answer_token``.

    Returns:
        Probabilities in 0..1, float32 or wider, on the device of the logits.

    Raises:
        ValueError: a token id is negative or not below ``d_vocab``.

    Example:
        >>> import torch
        >>> from fvlens.metrics import probability
        >>> round(probability(torch.tensor([[1.0, 3.0, 6.0]]).log(), torch.tensor([1])).item(), 6)
        0.3

    References:
        arXiv:2310.15213, section 2.3 (the probability of the answer's first token).
    """
    return log_probability(logits, tokens).exp()


def log_probability(logits: Float[Tensor, "*batch d_vocab"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Log-probability of a token under the softmax of the logits.

    ``log P(y) = logit_y - log sum_v exp(logit_v)``, exact also where the probability itself underflows.

    Args:
        logits: next-token logits.
        tokens: id of the token to read at each place.

    Returns:
        Log-probabilities in nats, at most 0, float32 or wider, on the device of the logits.

    Raises:
        ValueError: a token id is negative or not below ``d_vocab``.

    Example:
        >>> import torch
        >>> from fvlens.metrics import log_probability
        >>> log_probability(torch.tensor([0.0, -200.0]), torch.tensor(1)).item()
        -200.0
    """
    _check_tokens("log_probability", tokens, logits.shape[-1])
    wide = _widen(logits)
    return _at(wide, tokens) - wide.logsumexp(-1)


def rank(logits: Float[Tensor, "*batch d_vocab"], tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Rank of a token: its place, from 0, among all tokens in order of falling logit and, at ties, of rising id.

    ``rank(y) = |{v : logit_v > logit_y}| + |{v < y : logit_v = logit_y}|``. 0 means right: the token is
    :func:`best_token`.

    Args:
        logits: next-token logits.
        tokens: id of the token to rank at each place.

    Returns:
        Ranks in ``0..d_vocab - 1``, on the device of the logits.

    Raises:
        ValueError: a token id is negative or not below ``d_vocab``; a logit is NaN (a comparison with NaN is false, so
            a broken model would look perfect).

    Example:
        >>> import torch
        >>> from fvlens.metrics import rank
        >>> rank(torch.tensor([[0.1, 0.7, 0.2], [0.7, 0.1, 0.7]]), torch.tensor([2, 2])).tolist()
        [1, 1]
    """
    _check_tokens("rank", tokens, logits.shape[-1])
    _check_no_nan_logits("rank", logits)
    mine = _at(logits, tokens).unsqueeze(-1)
    earlier = _ids(logits) < tokens.to(logits.device).unsqueeze(-1)
    # a sum of bytes as int32 takes a third of the time of one as int64
    return torch.where(earlier, logits >= mine, logits > mine).sum(-1, dtype=torch.int32).long()


def best_token(logits: Float[Tensor, "*batch d_vocab"]) -> Int[Tensor, "*batch"]:
    """The token with the largest logit; of several, the one with the smallest id: what the model answers.

    ``min {v : logit_v = max_u logit_u}``, the token of :func:`rank` 0.

    Args:
        logits: next-token logits.

    Returns:
        Token ids, on the device of the logits.

    Raises:
        ValueError: a logit is NaN; the vocabulary is empty.

    Example:
        >>> import torch
        >>> from fvlens.metrics import best_token
        >>> best_token(torch.tensor([[0.1, 0.7, 0.2], [0.7, 0.1, 0.7]])).tolist()
        [1, 0]
    """
    _check_no_nan_logits("best_token", logits)
    return _first_largest(logits)


def best_tokens(logits: Float[Tensor, "*batch d_vocab"], k: int) -> Int[Tensor, "*batch k"]:
    """The ``k`` best tokens, best first, in the order of :func:`rank`: the token at place i has rank i.

    Args:
        logits: next-token logits, or anything that puts tokens in order.
        k: how many.

    Returns:
        Token ids, on the device of the logits.

    Raises:
        ValueError: a logit is NaN; ``k`` is not in ``1..d_vocab``.

    Example:
        >>> import torch
        >>> from fvlens.metrics import best_tokens
        >>> best_tokens(torch.tensor([0.1, 0.7, 0.2, 0.7]), 3).tolist()
        [1, 3, 2]
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"best_tokens: expected k in 1..{logits.shape[-1]} (the vocabulary), got {k}.")
    _check_no_nan_logits("best_tokens", logits)
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def is_best(logits: Float[Tensor, "*batch d_vocab"], tokens: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
    """Whether a token is right: whether it is :func:`best_token`, of :func:`rank` 0.

    Unlike these two it takes NaN, where no token is right: a training that diverges goes on with its other relations.

    Args:
        logits: next-token logits.
        tokens: id of the token to judge at each place; an id outside the vocabulary, such as padding, is never right.

    Returns:
        True where the token is right, on the device of the logits.

    Raises:
        ValueError: the vocabulary is empty.

    Example:
        >>> import torch
        >>> from fvlens.metrics import is_best
        >>> is_best(torch.tensor([[0.1, 0.7, 0.2], [0.7, 0.1, 0.7]]), torch.tensor([1, 2])).tolist()
        [True, False]
    """
    first = _first_largest(logits)
    return (first == tokens.to(logits.device)) & (first < logits.shape[-1])


def kl_divergence(
    logits: Float[Tensor, "*batch d_vocab"], other: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence of two next-token distributions.

    ``KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))``, summed in float64. Tokens with ``P(v) = 0`` add nothing.

    Args:
        logits: next-token logits of P.
        other: next-token logits of Q at the same places.

    Returns:
        Divergences in nats, 0 or more, float64, on the device of the logits.

    Example:
        >>> import torch
        >>> from fvlens.metrics import kl_divergence
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(kl_divergence(p, q).item(), 6)
        0.143841
    """
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
    return terms.sum(-1).clamp(min=0)


def top_k_accuracy(ranks: Int[Tensor, " n"], k: int) -> float:
    """Share of prompts whose answer is among the ``k`` tokens with the largest logits.

    ``mean over prompts of [rank < k]``.

    Args:
        ranks: ranks from :func:`rank`, 0 for the top token.
        k: how many tokens count as right; 1 gives top-1 accuracy.

    Returns:
        A share in 0..1.

    Raises:
        ValueError: there are no ranks; ``k`` is below 1.

    Example:
        >>> import torch
        >>> from fvlens.metrics import top_k_accuracy
        >>> top_k_accuracy(torch.tensor([0, 4, 5, 1]), 5)
        0.75
    """
    if ranks.numel() == 0:
        raise ValueError("top_k_accuracy: expected at least 1 rank, got 0; give at least one prompt.")
    if k < 1:
        raise ValueError(f"top_k_accuracy: expected k of at least 1, got {k}; k=1 asks for the top token.")
    return (ranks < k).double().mean().item()


def bootstrap_interval(
    values: Real[Tensor, " n"] | Bool[Tensor, " n"],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    generator: torch.Generator,
) -> Interval:
    """Percentile bootstrap interval of the mean.

    The values are drawn n at a time with replacement, ``n_resamples`` times; the interval runs from the
    ``(1 - level) / 2`` to the ``(1 + level) / 2`` quantile of the resampled means. If all values are equal, so are both
    ends: the bootstrap cannot see what did not occur in the sample, so [1, 1] from few prompts says little.

    Args:
        values: one score a prompt (True and False count as 1 and 0).
        level: coverage aimed at, between 0 and 1.
        n_resamples: number of resampled means.
        generator: the only source of randomness. The same seed gives the same interval on one machine.

    Returns:
        The interval, in the units of the values.

    Raises:
        ValueError: there are no values; a value is not finite; ``level`` is not strictly between 0 and 1;
            ``n_resamples`` is below 1.

    Example:
        >>> import torch
        >>> from fvlens.metrics import bootstrap_interval
        >>> hits = torch.arange(100) < 80
        >>> low, high, level = bootstrap_interval(hits, generator=torch.Generator().manual_seed(0))
        >>> 0.70 < low < 0.75 and 0.85 < high < 0.90
        True

    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
    """
    _check_resampling("bootstrap_interval", values, level, n_resamples)
    return _percentile_interval(values, level, n_resamples, generator)


def paired_difference(
    a: Real[Tensor, " n"] | Bool[Tensor, " n"],
    b: Real[Tensor, " n"] | Bool[Tensor, " n"],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    generator: torch.Generator,
) -> Difference:
    """Mean difference of two scores of the same prompts, with its bootstrap interval.

    ``mean_i (a_i - b_i)``; whole prompts are resampled, so that what both scores share cancels. See
    :func:`bootstrap_interval`.

    Args:
        a: one score a prompt.
        b: the other score of the same prompts, in the same order.
        level: coverage aimed at, between 0 and 1.
        n_resamples: number of resampled means.
        generator: the only source of randomness.

    Returns:
        The mean, positive where ``a`` is larger, and its interval.

    Raises:
        ValueError: ``a`` and ``b`` differ in length; there are no values; a value is not finite; ``level`` is not
            strictly between 0 and 1; ``n_resamples`` is below 1.

    Example:
        >>> import torch
        >>> from fvlens.metrics import paired_difference
        >>> before, after = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 1, 1, 0])
        >>> paired_difference(after, before, generator=torch.Generator().manual_seed(0)).mean
        0.5
    """
    _check_same_length("paired_difference", a, b)
    for values in (a, b):
        _check_resampling("paired_difference", values, level, n_resamples)
    differences = a.detach().cpu().double() - b.detach().cpu().double()
    return Difference(differences.mean().item(), _percentile_interval(differences, level, n_resamples, generator))


def spearman(a: Real[Tensor, " n"], b: Real[Tensor, " n"]) -> float:
    """Spearman's rank correlation.

    Pearson's correlation of the ranks, where tied values share the average of their ranks.

    Args:
        a: scores, such as a flattened map of approximate effects.
        b: scores of the same things in the same order, such as the flattened exact map.

    Returns:
        A correlation in -1..1; 1 if both put everything in the same order.

    Raises:
        ValueError: ``a`` and ``b`` differ in length; there are fewer than 2 values; a value is NaN; all values of one
            argument are equal (the correlation is then undefined).

    Example:
        >>> import torch
        >>> from fvlens.metrics import spearman
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 1000.0, 100.0])), 6)
        0.5
    """
    _check_same_length("spearman", a, b)
    if len(a) < 2:
        raise ValueError(f"spearman: expected at least 2 values, got {len(a)}; a correlation needs several.")
    centred = []
    for name, values in (("a", a), ("b", b)):
        _check_no_nan("spearman", name, values)
        ranks = _average_ranks(values)
        if bool((ranks == ranks[0]).all()):
            raise ValueError(
                f"spearman: expected values that differ, got {len(values)} equal values in {name}; they have no order."
            )
        centred.append(ranks - ranks.mean())
    x, y = centred
    return max(-1.0, min(1.0, ((x @ y) / (x.norm() * y.norm())).item()))


def top_k_overlap(a: Real[Tensor, " n"], b: Real[Tensor, " n"], k: int) -> float:
    """Share of the ``k`` largest entries of one ranking that are among the ``k`` largest of the other.

    ``|top_k(a) & top_k(b)| / k``. Among tied entries the earlier one ranks higher.

    Args:
        a: scores, such as a flattened map of approximate effects.
        b: scores of the same things in the same order.
        k: how many entries are compared.

    Returns:
        A share in 0..1. Two unrelated rankings of n things share ``k / n`` on average.

    Raises:
        ValueError: ``a`` and ``b`` differ in length; ``k`` is not in ``1..n``; a value is NaN.

    Example:
        >>> import torch
        >>> from fvlens.metrics import top_k_overlap
        >>> top_k_overlap(torch.tensor([9.0, 8.0, 1.0, 0.0]), torch.tensor([5.0, 0.0, 7.0, 1.0]), 2)
        0.5
    """
    _check_same_length("top_k_overlap", a, b)
    if not 1 <= k <= len(a):
        raise ValueError(f"top_k_overlap: expected k in 1..{len(a)} (the number of values), got {k}.")
    tops = []
    for name, values in (("a", a), ("b", b)):
        _check_no_nan("top_k_overlap", name, values)
        tops.append(set(values.detach().cpu().sort(descending=True, stable=True).indices[:k].tolist()))
    return len(tops[0] & tops[1]) / k


def exact_match(predicted: str, expected: str) -> bool:
    """Whether two answers are the same text after SQuAD's normalisation.

    Lower case, ASCII punctuation and the articles a, an, the removed, runs of white space made one space. We differ in
    one case: where that would leave nothing (the answer ``a`` of a spelling relation), only case and space change.

    Args:
        predicted: the generated answer.
        expected: the true answer.

    Returns:
        True if the normalised texts are equal.

    Example:
        >>> from fvlens.metrics import exact_match
        >>> exact_match(" The Hague.", "the hague"), exact_match("a", "the")
        (True, False)

    References:
        arXiv:1606.05250, section 6.1 (evaluation of SQuAD).
    """
    return _normalised(predicted) == _normalised(expected)


def token_f1(predicted: str, expected: str) -> float:
    """F1 of the words that two answers share.

    ``F1 = 2 p r / (p + r)`` with precision ``p = shared / words predicted`` and recall ``r = shared / words expected``.
    Words are counted with repetition, after the normalisation of :func:`exact_match`. Two empty answers score 1.

    Args:
        predicted: the generated answer.
        expected: the true answer.

    Returns:
        A score in 0..1.

    Example:
        >>> from fvlens.metrics import token_f1
        >>> token_f1("New York City", "York")
        0.5

    References:
        arXiv:1606.05250, section 6.1 (evaluation of SQuAD).
    """
    ours, theirs = _normalised(predicted).split(), _normalised(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


_ARTICLES = frozenset(("a", "an", "the"))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalised(text: str) -> str:
    words = text.lower().split()
    kept = [word for word in " ".join(words).translate(_NO_PUNCTUATION).split() if word not in _ARTICLES]
    return " ".join(kept or words)


def _widen(logits: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _at(logits: Float[Tensor, "*batch d_vocab"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    index = tokens.to(device=logits.device, dtype=torch.int64)
    return logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _ids(logits: Float[Tensor, "*batch d_vocab"]) -> Int[Tensor, " d_vocab"]:
    return torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)


def _first_largest(logits: Float[Tensor, "*batch d_vocab"]) -> Int[Tensor, "*batch"]:
    """Smallest id of the largest logits, ``d_vocab`` where a logit is NaN.

    Not left to ``argmax``, which need not give the first one everywhere, and is slower in half precision.
    """
    n = logits.shape[-1]
    if n == 0:
        raise ValueError("best_token: expected a vocabulary of at least 1 token, got 0.")
    logits = logits.detach()
    return torch.where(logits == logits.amax(-1, keepdim=True), _ids(logits), n).amin(-1).long()


def _check_no_nan_logits(function: str, logits: Float[Tensor, "*batch d_vocab"]) -> None:
    if logits.numel() == 0 or not bool(logits.amax(-1).isnan().any()):  # a NaN makes the maximum NaN
        return
    raise ValueError(
        f"{function}: expected logits without NaN, got {int(logits.isnan().sum())} NaN of {logits.numel()}; check the "
        "model and the vector."
    )


def _average_ranks(values: Real[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 1, ties sharing their average."""
    _, group, counts = values.detach().cpu().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def _percentile_interval(
    values: Real[Tensor, " n"] | Bool[Tensor, " n"], level: float, n_resamples: int, generator: torch.Generator
) -> Interval:
    scores = values.detach().cpu().double()
    n = len(scores)
    means, rows = [], max(1, _CHUNK // n)
    for start in range(0, n_resamples, rows):
        shape = (min(rows, n_resamples - start), n)
        index = torch.randint(n, shape, generator=generator, device=generator.device)
        means.append(scores[index.cpu()].mean(-1))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(ends).tolist()
    return Interval(low, high, level)


def _check_tokens(function: str, tokens: Int[Tensor, "*axes"], d_vocab: int) -> None:
    if tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"{function}: expected token ids in 0..{d_vocab - 1}, got {low if low < 0 else high}; "
            "mask padded answer tokens, and use the model's own tokenizer."
        )


def _check_same_length(function: str, a: Shaped[Tensor, "*axes_a"], b: Shaped[Tensor, "*axes_b"]) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{function}: expected two tensors of one length, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "give the scores of the same things in the same order."
        )


def _check_no_nan(function: str, name: str, values: Real[Tensor, " n"]) -> None:
    n_nan = int(values.isnan().sum())
    if n_nan:
        raise ValueError(
            f"{function}: expected values without NaN, got {n_nan} NaN of {len(values)} in {name}; leave them out."
        )


def _check_resampling(
    function: str, values: Real[Tensor, " n"] | Bool[Tensor, " n"], level: float, n_resamples: int
) -> None:
    if values.numel() == 0:
        raise ValueError(f"{function}: expected at least 1 value, got 0; give at least one prompt.")
    n_bad = int((~values.isfinite()).sum())
    if n_bad:
        raise ValueError(f"{function}: expected finite values, got {n_bad} NaN or infinite of {len(values)}.")
    if not 0 < level < 1:
        raise ValueError(f"{function}: expected a level strictly between 0 and 1, got {level}; 0.95 is usual.")
    if n_resamples < 1:
        raise ValueError(f"{function}: expected n_resamples of at least 1, got {n_resamples}; 2000 is usual.")
