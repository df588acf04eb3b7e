"""Maps: a signed number in each cell of a grid, on the diverging scale centred at 0."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._input import Number, as_matrix, standard_errors
from fvlens.plots._style import (
    CHARACTER,
    DIVERGING,
    GREY,
    WIDTH,
    around,
    cut,
    font_size,
    label_margin,
    layout,
    plain,
    whole_ticks,
)
from fvlens.types import Head, HeadLike, as_heads


def heatmap(
    values: Float[Tensor, "layer head"],
    *,
    stderr: Float[Tensor, "layer head"] | None = None,
    outlined: Sequence[HeadLike] = (),
    title: str = "Effect of each attention head",
    colorbar_title: str = "AIE",
    outlined_label: str = "top heads",
    hover: Sequence[Sequence[str]] | None = None,
) -> go.Figure:
    """Map of one signed number for each head, layer 0 at the bottom, on a diverging scale centred at 0.

    Args:
        values: the number of each head, such as ``attr.aie``. NaN marks a head that was not measured and stays blank.
        stderr: standard error of each value, shown in the hover text.
        outlined: heads that get a black outline, best first, such as ``attr.top(10)``.
        title: figure title.
        colorbar_title: name of the quantity, beside the scale and in the hover text.
        outlined_label: what the outlined heads are, for the note under the title.
        hover: one more line of hover text for each head, layer by head.

    Returns:
        The figure. The scale runs from minus to plus the largest absolute value.

    Raises:
        ValueError: the map is empty or holds no finite value; a value or standard error is infinite; a standard error
            is negative; ``stderr`` or ``hover`` has another shape; an outlined head does not exist or is listed twice.

    Example:
        >>> import torch
        >>> from fvlens.plots import heatmap
        >>> figure = heatmap(torch.tensor([[0.1, -0.2], [0.0, 0.4]]), outlined=[(1, 1)])
        >>> figure.data[0].hovertext[1][1]
        'L1H1 (1 of 1 outlined)<br>AIE: +0.4'
    """
    z = as_matrix(values)
    n_layers, n_heads = z.shape
    if z.numel() == 0 or bool(z.isnan().all()):
        raise ValueError(f"heatmap: expected at least one finite value, got none in shape {tuple(z.shape)}.")
    if bool(z.isinf().any()):
        raise ValueError(
            f"heatmap: expected finite values (or NaN for heads not measured), got {int(z.isinf().sum())} infinite."
        )
    errors = standard_errors("heatmap", stderr, z, may_be_nan=True)
    if hover is not None and [len(row) for row in hover] != [n_heads] * n_layers:
        raise ValueError(
            f"heatmap: expected hover as {n_layers} rows of {n_heads} texts, got rows of {[len(row) for row in hover]}."
        )
    heads = as_heads(outlined, n_layers, n_heads)
    place: dict[tuple[int, int], int] = {head: i for i, head in enumerate(heads, start=1)}

    def text(layer: int, head: int) -> str:
        value = z[layer, head].item()
        name = f"L{layer}H{head}"
        if (layer, head) in place:
            name += f" ({place[layer, head]} of {len(heads)} outlined)"
        if math.isnan(value):
            line = "not measured"
        else:
            line = f"{colorbar_title}: {value:+.4g}"
            if errors is not None:
                line += f" ± {errors[layer, head].item():.2g} (standard error)"
        more = "" if hover is None else f"<br>{plain(hover[layer][head])}"
        return f"{name}<br>{line}{more}"

    # many layers make a taller figure rather than cells that cannot be told apart
    cell = max(9.0, min(44.0, 420 / n_layers))
    figure = grid(
        z,
        [[text(layer, head) for head in range(n_heads)] for layer in range(n_layers)],
        limit=z.nan_to_num().abs().max().item() or 1.0,
        colorbar={"title": colorbar_title, "nticks": max(3, min(7, round(cell * n_layers / 30)))},
    )
    for head in heads:
        outline(figure, head)

    note = f"Black outline: {outlined_label} ({len(heads)})" if heads else None
    figure.update_layout(**layout(title, height=round(150 + cell * n_layers), note=note))
    figure.update_xaxes(title="Head", range=around(n_heads, 550), showgrid=False, **whole_ticks(n_heads, 24))
    figure.update_yaxes(
        title="Layer",
        range=around(n_layers, cell * n_layers),
        showgrid=False,
        **whole_ticks(n_layers, round(cell * n_layers / 18)),
    )
    return figure


def similarity(
    matrix: Float[Tensor, "row column"],
    labels: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    title: str = "Similarity of the vectors",
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
    title: str,
    colorbar_title: str,
    limit: Number,
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
    margin = label_margin(labels, 24)
    cell_width = (WIDTH - margin - 90) / n_columns
    cell_height = max(11.0, min(44.0, cell_width))
    upright = _stand_upright(column_labels, cell_width)
    below = label_margin(column_labels, 24) if upright else 40

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
        colorbar={"title": colorbar_title, "nticks": 5},
        texttemplate="%{z:.2f}" if n_columns <= 12 else None,
        textfont={"size": 11},
    )

    shared = layout(title, height=round(80 + cell_height * n_rows + below))
    shared["margin"] |= {"l": margin, "b": below}
    figure.update_layout(**shared)
    figure.update_xaxes(
        range=[-0.5, n_columns - 0.5], tickvals=list(range(n_columns)), ticktext=[cut(name) for name in column_labels],
        tickangle=-90 if upright else 0, ticklabelstandoff=3, ticks="", tickfont={"size": font_size(cell_width)},
        showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(
        range=[n_rows - 0.5, -0.5], tickvals=list(range(n_rows)), ticktext=[cut(name) for name in labels],
        showgrid=False, ticks="", ticklabelstandoff=5, tickfont={"size": font_size(cell_height)},
    )  # fmt: skip
    return figure


def relation_map(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    stderr: Float[Tensor, "row column"] | None = None,
    excluded: Sequence[bool] | None = None,
    notes: Sequence[str] | None = None,
    n_chosen: int = 0,
    title: str = "Effect of each head on each relation",
    colorbar_title: str = "AIE",
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
    margin = label_margin(rows, 28)
    cell_width = (WIDTH - margin - 90) / n_columns
    cell_height = max(13.0, min(26.0, 420 / n_rows))
    upright = _stand_upright(columns, cell_width)
    below = 26 + (label_margin(columns, 12) if upright else 30)

    # the scale stays at the top, since a map of many rows is taller than the screen
    figure = grid(
        z,
        [[text(row, column) for column in range(n_columns)] for row in range(n_rows)],
        limit=z.abs().max().item() or 1.0,
        colorbar={
            "title": colorbar_title,
            "nticks": 5,
            "lenmode": "pixels",
            "len": max(110, min(300, round(cell_height * n_rows))),
            "y": 1,
            "yanchor": "top",
        },
    )
    if 0 < n_chosen < n_columns:
        figure.add_shape(
            type="line", yref="paper", x0=n_chosen - 0.5, x1=n_chosen - 0.5, y0=0, y1=1,
            line={"color": "black", "width": 2},
        )  # fmt: skip

    explained = [f"Left of the line: the chosen heads ({n_chosen})"] if n_chosen else []
    explained += [f"grey ×: left out of the average ({sum(left_out)} of {n_rows})"] if any(left_out) else []
    note = "; ".join(explained)
    height = round(72 + max(cell_height * n_rows, 110) + below)
    shared = layout(title, height=height, note=note[:1].upper() + note[1:] or None)
    shared["margin"] |= {"l": margin, "b": below}
    figure.update_layout(**shared)
    names = [
        f'<span style="color:{GREY}">× {cut(name, 26)}</span>' if gone else cut(name, 28)
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


def grid(
    z: Float[Tensor, "row column"],
    hovertext: Sequence[Sequence[str]],
    *,
    limit: Number,
    colorbar: dict[str, Any],
    gap: int = 1,
    **more: Any,
) -> go.Figure:
    """The cells with their scale from ``-limit`` to ``limit``; cell (row, column) is centred at whole numbers."""
    n_rows, n_columns = z.shape
    shown = {"title": {"text": colorbar["title"], "side": "top"}, "thickness": 14, "outlinewidth": 0}
    return go.Figure(
        go.Heatmap(
            z=z.numpy(),
            x=list(range(n_columns)),
            y=list(range(n_rows)),
            hovertext=hovertext,
            hoverinfo="text",
            colorscale=DIVERGING,
            zmin=-limit,
            zmid=0,
            zmax=limit,
            xgap=gap,
            ygap=gap,
            colorbar=shown | {name: value for name, value in colorbar.items() if name != "title"},
            **more,
        )
    )


def outline(figure: go.Figure, head: Head) -> None:
    """A black outline around the cell of a head, on a map of layers by heads."""
    layer, column = head
    figure.add_shape(
        type="rect", x0=column - 0.5, x1=column + 0.5, y0=layer - 0.5, y1=layer + 0.5,
        line={"color": "black", "width": 2},
    )  # fmt: skip


def _stand_upright(labels: Sequence[str], cell: float) -> bool:
    """Whether the longest name is wider than a cell of so many pixels."""
    return max(len(label) for label in labels) * CHARACTER + 8 > cell
