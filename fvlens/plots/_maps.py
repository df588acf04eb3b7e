"""Maps: a signed number in each cell of a grid, on the diverging scale centred at 0."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._figure import drawn
from fvlens.plots._input import Number, as_matrix, standard_errors
from fvlens.plots._labels import with_room
from fvlens.plots._scale import CLIP, Reach, joined, mark_beyond, scale_reach
from fvlens.plots._style import (
    around,
    layout,
    look,
    plain,
    whole_ticks,
)
from fvlens.types import Head, HeadLike, as_heads


@drawn
def heatmap(
    values: Float[Tensor, "layer head"],
    *,
    stderr: Float[Tensor, "layer head"] | None = None,
    outlined: Sequence[HeadLike] = (),
    title: str | None = "Effect of each attention head",
    colorbar_title: str = "AIE",
    outlined_label: str = "top heads",
    hover: Sequence[Sequence[str]] | None = None,
    zmax: Number | None = None,
    clip: Number | None = CLIP,
) -> go.Figure:
    """Map of one signed number for each head, layer 0 at the bottom, on a diverging scale centred at 0.

    Args:
        values: the number of each head, such as ``attr.aie``. NaN marks a head that was not measured and stays blank.
        stderr: standard error of each value, shown in the hover text.
        outlined: heads that get a black outline, best first, such as ``attr.top(10)``.
        title: figure title; None for none.
        colorbar_title: name of the quantity, beside the scale and in the hover text.
        outlined_label: what the outlined heads are, for the note under the title.
        hover: one more line of hover text for each head, layer by head.
        zmax: where the scale ends, at ``-zmax`` and ``zmax``.
        clip: without ``zmax``, the scale ends at the largest absolute value; but if that is at least twice what this
            share of the heads stays within, it ends there. None for the largest in any case.

    Returns:
        The figure. Heads beyond the scale carry a triangle, and the note says where it ends. Outlined heads are named
        where there is room.

    Raises:
        ValueError: the map is empty or holds no finite value; a value or standard error is infinite; a standard error
            is negative; ``stderr`` or ``hover`` has another shape; an outlined head does not exist or is listed twice;
            ``zmax`` or ``clip`` out of range.

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

    reach = scale_reach("heatmap", z, zmax=zmax, clip=clip)
    outline_note = f"{look().colours.outline} outline: {outlined_label} ({len(heads)})" if heads else ""
    return head_map(
        z,
        [[text(layer, head) for head in range(n_heads)] for layer in range(n_layers)],
        reach,
        heads,
        title=title,
        note=joined(outline_note, reach.note),
        colorbar_title=colorbar_title,
        alt=heads_in_words(z, heads, colorbar_title),
    )


def head_map(
    z: Float[Tensor, "layer column"],
    hovertext: Sequence[Sequence[str]],
    reach: Reach,
    outlined: Sequence[Head],
    *,
    title: str | None,
    note: str | None,
    colorbar_title: str,
    alt: str,
) -> go.Figure:
    """A map of layers by heads, layer 0 at the bottom: cells, outlines, names of the outlined heads, marks."""
    size = look().size
    n_layers, n_columns = z.shape
    # many layers make a taller figure rather than cells that cannot be told apart
    high = max(9.0 * size.tall**0.5, min(44.0, 420 / n_layers) * size.tall)
    inside = size.width - size.left - (86 if look().width == "page" else 62)
    figure = grid(
        z,
        hovertext,
        limit=reach.limit,
        colorbar={"title": colorbar_title, "nticks": max(3, min(7, round(high * n_layers / 30)))},
    )
    cell = inside / n_columns, high
    mark_beyond(figure, z, reach, cell)
    for head in outlined:
        outline(figure, head)
    _name(figure, outlined, z.shape, cell)
    height = (size.above_note if note else size.above) + size.below + high * n_layers
    figure.update_layout(**layout(title, height=round(max(height, height + 22 * size.tall)), note=note, alt=alt))
    figure.update_xaxes(
        title="Head", range=around(n_columns, inside), showgrid=False,
        **whole_ticks(n_columns, round(inside / (1.9 * size.text))),
    )  # fmt: skip
    figure.update_yaxes(
        title="Layer", range=around(n_layers, high * n_layers), showgrid=False,
        **whole_ticks(n_layers, round(high * n_layers / (1.5 * size.text))),
    )  # fmt: skip
    return figure


def heads_in_words(z: Float[Tensor, "layer column"], outlined: Sequence[Head], what: str) -> str:
    """A map of heads in words: its size, its largest and its smallest, and the outlined heads."""
    n_columns = z.shape[1]
    flat = z.flatten()
    top, bottom = int(flat.nan_to_num(-math.inf).argmax()), int(flat.nan_to_num(math.inf).argmin())
    ends = [f"{flat[i]:+.3g} (L{i // n_columns}H{i % n_columns})" for i in (bottom, top)]
    named = f". Outlined: {', '.join(map(str, outlined[:10]))}" if outlined else ""
    return f"Map of {what}, {z.shape[0]} layers by {n_columns} heads, from {ends[0]} to {ends[1]}{named}"


def _name(figure: go.Figure, heads: Sequence[Head], shape: tuple[int, ...], cell: tuple[float, float]) -> None:
    """Names of the outlined heads: in their cells, or beside them where there is room."""
    size, colours = look().size, look().colours
    small = max(size.least, size.text - 2)
    letter = 0.6 * small
    wide, high = cell
    names = [str(head) for head in heads]
    if not names:
        return
    if max(map(len, names)) * letter + 2 <= wide and high >= small + 4:
        found = [(k, 0, round(0.12 * high) if high >= 24 else 0, "center") for k in range(len(heads))]
    else:
        found = with_room(
            [(head.head * wide, head.layer * high) for head in heads], names, range(len(heads)), letter=letter,
            ends=(-wide / 2, (shape[1] - 0.5) * wide), levels=(-high / 2 - 2, (shape[0] - 0.5) * high + 2),
            half=(wide / 2 + 1, high / 2 + 1), high=small + 2,
        )  # fmt: skip
    for k, dx, dy, side in found:
        figure.add_annotation(
            x=heads[k].head, y=heads[k].layer, xshift=dx, yshift=dy, xanchor=side, yanchor="middle", showarrow=False,
            text=names[k], font={"size": small, "color": colours.ink}, bgcolor=colours.veil(0.78), borderpad=0,
        )  # fmt: skip


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
    shown = {
        "title": {"text": colorbar["title"], "side": "top", "font": {"size": look().size.axis}},
        "thickness": 14 if look().width == "page" else 9,
        "outlinewidth": 0,
    }
    return go.Figure(
        go.Heatmap(
            z=z.numpy(),
            x=list(range(n_columns)),
            y=list(range(n_rows)),
            hovertext=hovertext,
            hoverinfo="text",
            colorscale=look().colours.diverging,
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
        line={"color": look().colours.outline, "width": 2 if look().width == "page" else 1.5},
    )  # fmt: skip
