"""What figures of effects have in common: their kinds, and heads as bars."""

from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.types import Head

if TYPE_CHECKING:
    from fvlens.plots import Figure

Kind = Literal["map", "top", "prompts"]
"""Figures of effects: a map of all heads, the best as bars, the best on every prompt."""

WIDTH_95 = 1.96
"""Standard errors on either side that hold 95% of a normal distribution."""


def check_kind(kind: str, zmax: float | int | None) -> None:
    """Refuse a kind of figure that there is not, and a scale's end where there is no scale."""
    if kind not in get_args(Kind):
        raise ValueError(f"plot: kind={kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}.")
    if zmax is not None and kind != "map":
        raise ValueError(f"plot: zmax={zmax} ends the scale of a map, and kind={kind!r} has none; leave it out.")


def top_bars(
    heads: list[Head],
    mean: Float[Tensor, "layer head"],
    stderr: Float[Tensor, "layer head"],
    *,
    x_title: str,
    title: str,
) -> "Figure":
    """Heads as bars with 95% intervals, 1.96 standard errors on either side; without any of a single prompt."""
    from fvlens import plots

    values = torch.stack([mean[head] for head in heads])
    half = WIDTH_95 * torch.stack([stderr[head] for head in heads])
    known = bool(half.isfinite().all())
    return plots.bars(
        list(map(str, heads)), values, values - half if known else None, values + half if known else None,
        x_title=x_title, title=title, signed=True,
    )  # fmt: skip
