"""Maps of shares: attention or probabilities, from 0 to 1, on one colour that grows darker."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._figure import drawn
from fvlens.plots._input import as_matrix, standard_errors
from fvlens.plots._matrices import BESIDE, labelled
from fvlens.plots._style import cut, look, names_most, plain

_LABEL = 10
"""Pixels that the name of a column takes where it stands upright."""


@drawn
def shares(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str | None = "Attention",
    colorbar_title: str = "attention",
    stderr: Float[Tensor, "row column"] | None = None,
    hover: Sequence[Sequence[str]] | None = None,
) -> go.Figure:
    """Map of shares between 0 and 1 with its labels, the first row on top.

    Args:
        values: the shares.
        rows: names of the rows, such as heads or layers.
        columns: names of the columns, such as the tokens of a prompt; line breaks are made visible. Where there are
            more than have room, the last one is named, then words, then others.
        title: figure title.
        colorbar_title: name of the quantity, beside the scale and in the hover text.
        stderr: standard error of each share, shown in the hover text; NaN where there is none.
        hover: one more line of hover text for each cell.

    Returns:
        The figure. The scale runs from 0 to the largest value. Values are written in the cells if there are at most 12
        columns.

    Raises:
        ValueError: the map is empty; a value is not finite, or below 0; labels, standard errors or hover texts do not
            fit it.

    Example:
        >>> import torch
        >>> from fvlens.plots import shares
        >>> figure = shares(torch.tensor([[0.25, 0.75]]), ["L1H0"], ["input", "label"])
        >>> figure.data[0].hovertext[0][1]
        'L1H0, label<br>attention: 0.75'
    """
    z = as_matrix(values)
    names = [visible(column) for column in columns]
    kinds = [visible(row) for row in rows]
    if bool((z < 0).any()):
        raise ValueError(f"shares: expected values of at least 0, got {float(z.min()):.4g}.")
    errors = standard_errors("shares", stderr, z, may_be_nan=True)
    largest = float(z.max()) if z.numel() and bool(z.isfinite().all()) else 0.0
    figure = labelled("shares", z, kinds, names, title=title, colorbar_title=colorbar_title, limit=largest or 1.0)
    if hover is not None and [len(row) for row in hover] != [z.shape[1]] * z.shape[0]:
        raise ValueError(
            f"shares: expected hover as {z.shape[0]} rows of {z.shape[1]} texts, got rows of "
            f"{[len(row) for row in hover]}."
        )

    def text(row: int, column: int) -> str:
        line = f"{plain(kinds[row])}, {plain(names[column])}<br>{colorbar_title}: {float(z[row, column]):.3g}"
        if errors is not None and not math.isnan(float(errors[row, column])):
            line += f" ± {float(errors[row, column]):.2g} (standard error)"
        return line if hover is None else f"{line}<br>{plain(hover[row][column])}"

    said = [[text(row, column) for column in range(len(names))] for row in range(len(kinds))]
    figure.update_traces(zmin=0, zmid=None, colorscale=look().colours.sequential, hovertext=said)

    layout: Any = figure.layout  # plotly's attributes are made at run time
    shown = named_columns(names, (look().size.width - layout.margin.l - BESIDE[look().width]) / len(names))
    return figure.update_xaxes(tickvals=shown, ticktext=[cut(names[column], names_most(24)) for column in shown])


def visible(token: str) -> str:
    """A token with its line breaks made visible."""
    return token.replace("\n", "↵")


def named_columns(names: Sequence[str], wide: float) -> list[int]:
    """Which tokens are named below columns of so many pixels: the last, then words, then what else has room."""
    gap = math.ceil(_LABEL / wide)
    from_the_right = range(len(names) - 1, -1, -1)
    words = [column for column in from_the_right if sum(map(str.isalnum, names[column])) > 1]
    shown: list[int] = []
    for column in [len(names) - 1, *words, *from_the_right]:
        if all(abs(column - other) >= gap for other in shown):
            shown.append(column)
    return sorted(shown)
