"""How far two scores of the same things agree."""

from jaxtyping import Float, Real
from torch import Tensor

from fvlens.metrics._length import check_same_length


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
    check_same_length("spearman", a, b)
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
    check_same_length("top_k_overlap", a, b)
    if not 1 <= k <= len(a):
        raise ValueError(f"top_k_overlap: expected k in 1..{len(a)} (the number of values), got {k}.")
    tops = []
    for name, values in (("a", a), ("b", b)):
        _check_no_nan("top_k_overlap", name, values)
        tops.append(set(values.detach().cpu().sort(descending=True, stable=True).indices[:k].tolist()))
    return len(tops[0] & tops[1]) / k


def _average_ranks(values: Real[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 1, ties sharing their average."""
    _, group, counts = values.detach().cpu().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def _check_no_nan(function: str, name: str, values: Real[Tensor, " n"]) -> None:
    n_nan = int(values.isnan().sum())
    if n_nan:
        raise ValueError(
            f"{function}: expected values without NaN, got {n_nan} NaN of {len(values)} in {name}; leave them out."
        )
