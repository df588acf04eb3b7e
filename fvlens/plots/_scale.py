"""How far a scale of signed numbers reaches, so that one extreme cell does not make all others pale."""

import math
from dataclasses import dataclass

import plotly.graph_objects as go
from jaxtyping import Bool, Float
from torch import Tensor

from fvlens.plots._input import Number
from fvlens.plots._style import look

CLIP = 0.99
"""Share of the cells that a scale holds where it does not hold all."""

_EXTREME = 2.0
"""A scale leaves cells out only if the largest is at least so many times what it then reaches."""

_FEW = 16
"""A map of fewer cells is shown whole."""


@dataclass(frozen=True, slots=True)
class Reach:
    """A scale from ``-limit`` to ``limit``.

    Attributes:
        limit: its end.
        beyond: cells that it does not hold.
        note: what is to be said of them; empty if there are none.
    """

    limit: float
    beyond: Bool[Tensor, "row column"]
    note: str


def scale_reach(
    function: str, z: Float[Tensor, "row column"], *, zmax: Number | None = None, clip: Number | None = CLIP
) -> Reach:
    """Where the scale of a map ends.

    Args:
        function: name of the figure, for messages.
        z: the map; NaN is no cell.
        zmax: the end, as given.
        clip: without ``zmax``, the share of cells whose absolute value the scale holds, if the largest is at least
            twice as large as that; None to hold all.

    Raises:
        ValueError: ``zmax`` is not above 0 or not finite; ``clip`` is not above 0 and at most 1.
    """
    if zmax is not None and not (zmax > 0 and math.isfinite(zmax)):
        raise ValueError(f"{function}: expected zmax above 0, where the scale ends, got {zmax}.")
    if clip is not None and not 0 < clip <= 1:
        raise ValueError(f"{function}: expected clip above 0 and at most 1, a share of the cells, got {clip}.")
    sizes = z[~z.isnan()].abs().sort().values
    largest = float(sizes[-1]) if len(sizes) else 0.0
    limit, why = largest, ""
    if zmax is not None:
        limit, why = float(zmax), f"scale ends at {zmax:.3g}"
    elif clip is not None and len(sizes) >= _FEW:
        # a value that there is, not one between two: of 32 cells, 0.99 leaves the largest out
        held = float(sizes[math.floor(clip * (len(sizes) - 1))])
        if 0 < held * _EXTREME <= largest:
            limit, why = held, f"scale holds {clip:.0%} of the cells, to {held:.3g}"
    beyond = z.abs() > limit
    n = int(beyond.sum())
    note = f"{why}; triangles: beyond it ({n})" if n else ""
    return Reach(limit or 1.0, beyond, note)


def mark_beyond(
    figure: go.Figure,
    z: Float[Tensor, "row column"],
    reach: Reach,
    cell: tuple[float, float],
    *,
    upright: bool = True,
) -> None:
    """Triangles on the cells that the scale does not hold: up above it, down below.

    Args:
        figure: the map.
        z: its numbers.
        reach: its scale.
        cell: width and height of a cell, in pixels.
        upright: whether the first row is at the bottom.
    """
    rows, columns = reach.beyond.nonzero(as_tuple=True)
    if not len(rows):
        return
    up = (z[rows, columns] > 0).tolist()
    below = 0.24 if cell[1] >= 24 and upright else 0.0  # the head's name stands in the upper part of a large cell
    figure.add_trace(
        go.Scatter(
            x=columns.tolist(),
            y=[row - below for row in rows.tolist()],
            mode="markers",
            hoverinfo="skip",
            showlegend=False,
            name="beyond",
            marker={
                "symbol": ["triangle-up" if above else "triangle-down" for above in up],
                "size": max(4.0, min(9.0, 0.45 * min(cell))),
                "color": look().colours.paper,
            },
        )
    )


def joined(*parts: str) -> str | None:
    """Notes on one line, the first letter large; None without any."""
    text = "; ".join(part for part in parts if part)
    return text[:1].upper() + text[1:] or None
