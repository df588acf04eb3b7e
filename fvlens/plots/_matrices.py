"""Maps with names on both sides: similarities, and effects by relation and head."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._figure import drawn
from fvlens.plots._input import Number, as_matrix, standard_errors
from fvlens.plots._maps import grid
from fvlens.plots._scale import CLIP, joined, mark_beyond, scale_reach
from fvlens.plots._style import Width, cut, font_size, label_margin, layout, look, names_most, plain

BESIDE: dict[Width, int] = {"page": 90, "column": 60}
"""Pixels on the right of a map, for its scale."""


@drawn
def similarity(
    matrix: Float[Tensor, "row column"],
    labels: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    title: str | None = "Similarity of the vectors",
    colorbar_title: str = "cosine",
    limit: Number = 1.0,
) -> go.Figure:
    """Matrix of similarities with its labels, the first row on top, on a diverging scale centred at 0.

    Args:
        matrix: the similarities.
        labels: names of the rows, and of the columns unless ``columns`` is given.
        columns: names of the columns, for a matrix that compares two different sets.
        title: figure title.
        colorbar_title: name of the quantity, beside the scale and in the hover text.
        limit: the scale runs from ``-limit`` to ``limit``.

    Returns:
        The figure. Values are written in the cells if there are at most 12 columns.

    Raises:
        ValueError: the matrix is empty; the number of labels differs from the number of rows or columns; a value is not
            finite; ``limit`` is not above 0.

    Example:
        >>> import torch
        >>> from fvlens.plots import similarity
        >>> figure = similarity(torch.tensor([[1.0, 0.3], [0.3, 1.0]]), ["antonym", "plural"])
        >>> figure.data[0].hovertext[0][1]
        'antonym, plural<br>cosine: +0.3'
    """
    return labelled(
        "similarity",
        matrix,
        labels,
        labels if columns is None else columns,
        title=title,
        colorbar_title=colorbar_title,
        limit=limit,
    )


def labelled(
    function: str,
    matrix: Float[Tensor, "row column"],
    labels: Sequence[str],
    columns: Sequence[str],
    *,
    title: str | None,
    colorbar_title: str,
    limit: Number,
    note: str | None = None,
) -> go.Figure:
    """A matrix with names of its rows and columns, the first row on top, for figures that messages call ``function``.

    Raises:
        ValueError: as :func:`similarity`.
    """
    z = as_matrix(matrix)
    column_labels = list(columns)
    if (len(labels), len(column_labels)) != tuple(z.shape):
        raise ValueError(
            f"{function}: expected one label a row and a column of the {z.shape[0]} by {z.shape[1]} matrix, "
            f"got {len(labels)} and {len(column_labels)} labels."
        )
    if z.numel() == 0:
        raise ValueError(f"{function}: expected at least one row and one column, got an empty matrix.")
    if not bool(z.isfinite().all()):
        raise ValueError(f"{function}: expected finite values, got {int((~z.isfinite()).sum())} NaN or infinite.")
    if not limit > 0:
        raise ValueError(f"{function}: expected limit above 0, got {limit}; cosines need 1.")

    # cells are square where their number allows it; column names that are wider than a cell stand upright
    n_rows, n_columns = z.shape
    size, most = look().size, names_most(24)
    margin = label_margin(labels, most)
    cell_width = (size.width - margin - BESIDE[look().width]) / n_columns
    cell_height = max(11.0, min(44.0, cell_width))
    if look().width == "column" and n_rows > 20:  # as high as the column is wide; some rows are named
        cell_height = max(cell_width, 3.0)
    upright = _stand_upright(column_labels, cell_width)
    below = label_margin(column_labels, most) if upright else round(40 * size.tall**0.5)
    written = n_columns <= 12 and cell_width >= 4.5 * 0.55 * (size.text - 1)

    hover = [
        [
            f"{plain(row)}, {plain(column)}<br>{colorbar_title}: {z[i, j].item():+.3g}"
            for j, column in enumerate(column_labels)
        ]
        for i, row in enumerate(labels)
    ]
    figure = grid(
        z,
        hover,
        limit=limit,
        gap=1 if n_columns <= 32 else 0,
        colorbar={"title": colorbar_title, "nticks": max(2, min(5, round(cell_height * n_rows / 30)))},
        texttemplate="%{z:.2f}" if written else None,
        textfont={"size": size.text - 1},
    )

    largest = int(z.argmax())
    alt = (
        f"Map of {colorbar_title}, {n_rows} rows by {n_columns} columns, from {float(z.min()):.3g} to "
        f"{float(z.max()):.3g} ({labels[largest // n_columns]}, {column_labels[largest % n_columns]})"
    )
    above = size.above_note if note else size.above
    shared = layout(title, height=round(above + 32 * size.tall + cell_height * n_rows + below), note=note, alt=alt)
    shared["margin"] |= {"l": margin, "b": below}
    figure.update_layout(**shared)
    figure.update_xaxes(
        range=[-0.5, n_columns - 0.5], **_named(column_labels, cell_width, most),
        tickangle=-90 if upright else 0, ticklabelstandoff=3, ticks="", tickfont={"size": font_size(cell_width)},
        showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(
        range=[n_rows - 0.5, -0.5], **_named(labels, cell_height, most), showgrid=False, ticks="",
        ticklabelstandoff=5, tickfont={"size": font_size(cell_height)},
    )  # fmt: skip
    return figure


@drawn
def relation_map(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    stderr: Float[Tensor, "row column"] | None = None,
    excluded: Sequence[bool] | None = None,
    notes: Sequence[str] | None = None,
    n_chosen: int = 0,
    title: str | None = "Effect of each head on each relation",
    colorbar_title: str = "AIE",
    zmax: Number | None = None,
    clip: Number | None = CLIP,
) -> go.Figure:
    """One signed number for each relation and head, the first relation on top, on a diverging scale centred at 0.

    Args:
        values: the numbers.
        rows: names of the relations, in the order in which they are to stand.
        columns: names of the heads, in the order in which they are to stand.
        stderr: standard error of each value, shown in the hover text.
        excluded: for each row, whether it is left out of the average; its name is grey and crossed.
        notes: one more line of hover text for each row.
        n_chosen: a line is drawn behind this many columns, the chosen heads; 0 draws none.
        title: figure title.
        colorbar_title: name of the quantity, beside the scale and in the hover text.
        zmax, clip: where the scale ends, as in :func:`heatmap`.

    Returns:
        The figure. It grows in height with the number of rows, so that every name can be read.

    Raises:
        ValueError: the map is empty; a value is not finite; a standard error is negative or not finite; names, notes,
            exclusions or standard errors do not fit the map; ``n_chosen`` is outside the columns.

    Example:
        >>> import torch
        >>> from fvlens.plots import relation_map
        >>> figure = relation_map(torch.tensor([[0.1, -0.2]]), ["antonym"], ["L1H0", "L0H3"])
        >>> figure.data[0].hovertext[0][1]
        'antonym, L0H3<br>AIE: -0.2'
    """
    z = as_matrix(values)
    n_rows, n_columns = z.shape
    if z.numel() == 0:
        raise ValueError("relation_map: expected at least one row and one column, got an empty map.")
    if not bool(z.isfinite().all()):
        raise ValueError(f"relation_map: expected finite values, got {int((~z.isfinite()).sum())} NaN or infinite.")
    left_out = [False] * n_rows if excluded is None else [bool(flag) for flag in excluded]
    given = {"rows": (rows, n_rows), "columns": (columns, n_columns), "excluded": (left_out, n_rows)}
    given |= {} if notes is None else {"notes": (notes, n_rows)}
    for name, (items, wanted) in given.items():
        if len(items) != wanted:
            raise ValueError(
                f"relation_map: expected {wanted} {name} for the {n_rows} by {n_columns} map, got {len(items)}."
            )
    errors = standard_errors("relation_map", stderr, z)
    if not 0 <= n_chosen <= n_columns:
        raise ValueError(f"relation_map: expected n_chosen in 0..{n_columns}, the number of columns, got {n_chosen}.")

    def text(row: int, column: int) -> str:
        line = f"{plain(rows[row])}, {plain(columns[column])}<br>{colorbar_title}: {z[row, column].item():+.3g}"
        if errors is not None:
            line += f" ± {errors[row, column].item():.2g} (standard error)"
        if notes is not None:
            line += f"<br>{plain(notes[row])}"
        return line + ("<br>left out of the average" if left_out[row] else "")

    # the figure grows with its rows; column names that are wider than a cell stand upright
    size, most = look().size, names_most(28)
    margin = label_margin(rows, most)
    cell_width = (size.width - margin - BESIDE[look().width]) / n_columns
    cell_height = max(size.text + 1.0, min(26.0, 420 / n_rows) * size.tall)
    upright = _stand_upright(columns, cell_width)
    below = 26 + (label_margin(columns, 12) if upright else 30)
    reach = scale_reach("relation_map", z, zmax=zmax, clip=clip)

    # the scale stays at the top, since a map of many rows is taller than the screen
    figure = grid(
        z,
        [[text(row, column) for column in range(n_columns)] for row in range(n_rows)],
        limit=reach.limit,
        colorbar={
            "title": colorbar_title,
            "nticks": 5,
            "lenmode": "pixels",
            "len": max(110, min(300, round(cell_height * n_rows))),
            "y": 1,
            "yanchor": "top",
        },
    )
    mark_beyond(figure, z, reach, (cell_width, cell_height))
    if 0 < n_chosen < n_columns:
        figure.add_shape(
            type="line", yref="paper", x0=n_chosen - 0.5, x1=n_chosen - 0.5, y0=0, y1=1,
            line={"color": look().colours.ink, "width": 2},
        )  # fmt: skip

    explained = [f"Left of the line: the chosen heads ({n_chosen})"] if n_chosen else []
    explained += [f"grey ×: left out of the average ({sum(left_out)} of {n_rows})"] if any(left_out) else []
    note = joined(*explained, reach.note)
    height = round((size.above_note if note else size.above) + max(cell_height * n_rows, 110) + below)
    place = int(z.abs().argmax())
    alt = (
        f"Map of {colorbar_title}, {n_rows} relations by {n_columns} heads; largest {z.flatten()[place]:+.3g} "
        f"({rows[place // n_columns]}, {columns[place % n_columns]})"
    )
    shared = layout(title, height=height, note=note, alt=alt)
    shared["margin"] |= {"l": margin, "b": below}
    figure.update_layout(**shared)
    names = [
        f'<span style="color:{look().colours.grey}">× {cut(name, most - 2)}</span>' if gone else cut(name, most)
        for name, gone in zip(rows, left_out, strict=True)
    ]
    figure.update_xaxes(
        title="Head, by its average", range=[-0.5 - n_columns / 500, n_columns - 0.5 + n_columns / 500],
        tickvals=list(range(n_columns)), ticktext=[cut(name, 12) for name in columns],
        tickangle=-90 if upright else 0, ticklabelstandoff=3, ticks="", tickfont={"size": font_size(cell_width)},
        showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(
        range=[n_rows - 0.5, -0.5], tickvals=list(range(n_rows)), ticktext=names, showgrid=False, ticks="",
        ticklabelstandoff=5, tickfont={"size": font_size(cell_height)},
    )  # fmt: skip
    return figure


def _named(names: Sequence[str], cell: float, most: int) -> dict:
    """Ticks at the cells, in a column at those whose names have room."""
    step = 1 if look().width == "page" else math.ceil((font_size(cell) + 1) / cell)
    shown = range(0, len(names), step)
    return {"tickvals": list(shown), "ticktext": [cut(names[i], most) for i in shown]}


def _stand_upright(labels: Sequence[str], cell: float) -> bool:
    """Whether the longest name is wider than a cell of so many pixels."""
    return max(len(label) for label in labels) * look().size.character + 8 > cell
