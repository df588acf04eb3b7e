"""What figures accept: numbers in several forms, checked before anything is drawn; messages name the figure."""

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

Number = float | int
Numbers = Sequence[Number] | Tensor
"""One-dimensional data: a sequence of numbers, or a tensor of one axis."""


def as_matrix(values: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """The values in float32 on the CPU."""
    return values.detach().cpu().float()


def standard_errors(
    function: str,
    stderr: Float[Tensor, "row column"] | None,
    values: Float[Tensor, "row column"],
    *,
    may_be_nan: bool = False,
) -> Float[Tensor, "row column"] | None:
    """Standard errors of a matrix of values, one each, at least 0."""
    if stderr is None:
        return None
    errors = as_matrix(stderr)
    if errors.shape != values.shape:
        raise ValueError(
            f"{function}: expected stderr of the shape of values, {tuple(values.shape)}, got {tuple(errors.shape)}."
        )
    checked = errors[~errors.isnan()] if may_be_nan else errors
    if not bool(((checked >= 0) & checked.isfinite()).all()):
        shown = errors.nan_to_num(0.0)
        raise ValueError(
            f"{function}: expected finite standard errors of at least 0, got values from {shown.min().item():.4g} to "
            f"{shown.max().item():.4g}."
        )
    return errors


def as_numbers(function: str, name: str, values: Numbers, may_be_empty: bool = False) -> list[float]:
    """Finite numbers of one axis, as a list."""
    flat = as_list(values)
    if not may_be_empty and not flat:
        raise ValueError(f"{function}: expected at least one number in {name}, got none.")
    if any(isinstance(value, list) for value in flat):
        raise ValueError(f"{function}: expected {name} with one axis, got several.")
    bad = [value for value in flat if not math.isfinite(value)]
    if bad:
        raise ValueError(f"{function}: expected finite numbers in {name}, got {bad[0]}; leave such points out.")
    return [float(value) for value in flat]


def as_list(values: Numbers) -> list:
    """A tensor or a sequence as a list, unchecked."""
    return values.detach().cpu().double().tolist() if isinstance(values, Tensor) else list(values)


def as_intervals(
    function: str, low: Numbers | None, high: Numbers | None
) -> tuple[list[float] | None, list[float] | None]:
    """Lower and upper ends, both or neither."""
    if (low is None) != (high is None):
        raise ValueError(f"{function}: expected low and high together, got only {'low' if high is None else 'high'}.")
    if low is None or high is None:
        return None, None
    lows, highs = as_numbers(function, "low", low), as_numbers(function, "high", high)
    for i, (bottom, top) in enumerate(zip(lows, highs, strict=False)):
        if bottom > top:
            raise ValueError(f"{function}: expected low at most high, got low {bottom} and high {top} at index {i}.")
    return lows, highs


def check_lengths(function: str, **data: Sequence | None) -> None:
    """All data that are given have one length."""
    lengths = {name: len(values) for name, values in data.items() if values is not None}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{function}: expected data of one length, got {got}.")


def check_increasing(function: str, xs: Sequence[Number]) -> None:
    """The x of a line increase."""
    if any(following <= value for value, following in pairwise(xs)):
        raise ValueError(f"{function}: expected x in increasing order without repeats, got {some(xs)}.")


def check_range(function: str, name: str, ends: tuple[Number, Number] | None) -> None:
    """Ends of an axis, if they are given, are a low and a high one."""
    if ends is not None and not ends[0] < ends[1]:
        raise ValueError(f"{function}: expected {name} as (low, high) with low below high, got {ends}.")


def short(value: Number) -> str:
    """A number as axes and messages show it."""
    return f"{value:g}"


def some(values: Sequence) -> str:
    """The first values, for messages."""
    shown = ", ".join(short(value) if isinstance(value, float) else repr(value) for value in values[:8])
    return f"{shown}, ..." if len(values) > 8 else shown
