"""Means with bootstrap intervals."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Real
from torch import Tensor

from fvlens.metrics._length import check_same_length

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
    check_same_length("paired_difference", a, b)
    for values in (a, b):
        _check_resampling("paired_difference", values, level, n_resamples)
    differences = a.detach().cpu().double() - b.detach().cpu().double()
    return Difference(differences.mean().item(), _percentile_interval(differences, level, n_resamples, generator))


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
