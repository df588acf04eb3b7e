"""Scores of next-token logits, a number a prompt, and the one order of tokens that all of them read."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    values, tokens = logits.topk(k, dim=-1)
    n_as_good = (logits >= values[..., -1:]).sum(-1, dtype=torch.int32)
    if bool((n_as_good > k).any()):  # ties at the end, of which the smaller ids are in
        return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    tokens = tokens.sort(dim=-1).values
    order = logits.gather(-1, tokens).sort(dim=-1, descending=True, stable=True).indices
    return tokens.gather(-1, order)


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


def _check_tokens(function: str, tokens: Int[Tensor, "*axes"], d_vocab: int) -> None:
    if tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"{function}: expected token ids in 0..{d_vocab - 1}, got {low if low < 0 else high}; "
            "mask padded answer tokens, and use the model's own tokenizer."
        )
