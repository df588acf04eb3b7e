"""Numbers at the tokens of one prompt: a bar each, or a map over layers."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._figure import drawn
from fvlens.plots._input import Number, Numbers, as_matrix, as_numbers, check_lengths
from fvlens.plots._matrices import BESIDE, labelled
from fvlens.plots._scale import joined, mark_beyond, scale_reach
from fvlens.plots._shares import named_columns, visible
from fvlens.plots._style import cut, label_margin, layout, legend_above, look, names_most, plain


@drawn
def token_bars(
    values: Numbers,
    tokens: Sequence[str],
    kinds: Sequence[str] | None = None,
    *,
    y_title: str = "attention",
    title: str | None = "",
) -> go.Figure:
    """A bar a token of one prompt, in the order of the text, coloured by what the token is for.

    Args:
        values: a number of each token, such as a head's attention from the last one.
        tokens: the tokens; line breaks are made visible. Where there are more than have room, the last one is named,
            then words, then others.
        kinds: what each token is for; by default all are alike.
        y_title: title of the value axis; also the name of the quantity in the hover text.
        title: figure title; None for none.

    Returns:
        The figure, a trace a kind, in the order in which they first occur.

    Raises:
        ValueError: there are no tokens; the data differ in length; a number is not finite.

    Example:
        >>> from fvlens.plots import token_bars
        >>> figure = token_bars([0.25, 0.75], ["big", ":"], ["input", "separator"])
        >>> [trace.name for trace in figure.data], figure.data[1].hovertext[0]
        (['input', 'separator'], ':, separator<br>attention: 0.75')
    """
    heights = as_numbers("token_bars", "values", values)
    check_lengths("token_bars", values=heights, tokens=tokens, kinds=kinds)
    words = [visible(token) for token in tokens]
    groups = list(kinds) if kinds is not None else [""] * len(words)
    size, colours = look().size, look().colours
    palette = [*(colour for colour, _, _ in colours.lines), colours.muted, colours.grey]
    figure = go.Figure()
    named = list(dict.fromkeys(groups))
    for i, kind in enumerate(named):
        own = [k for k, group in enumerate(groups) if group == kind]
        said = f", {plain(kind)}" if kind else ""
        figure.add_trace(
            go.Bar(
                x=own, y=[heights[k] for k in own], width=0.85, name=plain(kind), showlegend=kinds is not None,
                marker={"color": palette[i % len(palette)]}, hoverinfo="text",
                hovertext=[f"{plain(words[k])}{said}<br>{y_title}: {heights[k]:.3g}" for k in own],
            )
        )  # fmt: skip
    inside = size.width - size.left - size.right
    legend, n_rows = legend_above(named, inside)
    above = (size.line + 4) * n_rows + 6 if kinds is not None else 0
    most = names_most(20)
    below = label_margin(words, most) + 4
    order = sorted(range(len(words)), key=lambda k: -abs(heights[k]))[:5]
    largest = ", ".join(f"{words[k]!r} {heights[k]:.3g}" for k in order)
    alt = f"Bars of {y_title} at {len(words)} tokens, largest at {largest}"
    shared = layout(title, height=size.above + above + size.high(240) + below, alt=alt)
    shared["margin"] |= {"b": below, "t": shared["margin"]["t"] + above}
    figure.update_layout(**shared, barmode="overlay", legend=legend, showlegend=kinds is not None)
    shown = named_columns(words, inside / len(words))
    figure.update_xaxes(
        range=[-0.7, len(words) - 0.3], tickvals=shown, ticktext=[cut(words[k], most) for k in shown], tickangle=-90,
        ticks="", ticklabelstandoff=3, showgrid=False, tickfont={"size": max(size.least, size.text - 2)},
    )  # fmt: skip
    return figure.update_yaxes(title=y_title, rangemode="tozero", zeroline=True, zerolinecolor=colours.grey, nticks=6)


@drawn
def token_map(
    values: Float[Tensor, "layer pos"],
    layers: Sequence[str],
    tokens: Sequence[str],
    *,
    title: str | None = "Effect by layer and position",
    colorbar_title: str = "effect",
    hover: Sequence[Sequence[str]] | None = None,
    zmax: Number | None = None,
    clip: Number | None = None,
) -> go.Figure:
    """Map of a signed number at each layer and token of a prompt, the first row on top, centred at 0.

    Args:
        values: the numbers, a row a layer.
        layers: names of the rows.
        tokens: the tokens; line breaks are made visible, and as many are named as have room.
        title: figure title; None for none.
        colorbar_title: name of the quantity, beside the scale and in the hover text.
        hover: one more line of hover text for each cell.
        zmax, clip: where the scale ends, as in :func:`heatmap`; by default at the largest absolute value, since at
            most tokens there is often nothing.

    Returns:
        The figure, on a diverging scale centred at 0; cells beyond it carry a triangle.

    Raises:
        ValueError: the map is empty; a value is not finite; names or hover texts do not fit it; ``zmax`` or ``clip``
            out of range.

    Example:
        >>> import torch
        >>> from fvlens.plots import token_map
        >>> figure = token_map(torch.tensor([[0.25, -0.5]]), ["layer 0"], ["big", ":"])
        >>> figure.data[0].hovertext[0][1]
        'layer 0, :<br>effect: -0.5'
    """
    z = as_matrix(values)
    words = [visible(token) for token in tokens]
    reach = scale_reach("token_map", z, zmax=zmax, clip=clip)
    figure = labelled(
        "token_map", z, layers, words, title=title, colorbar_title=colorbar_title, limit=reach.limit,
        note=joined(reach.note),
    )  # fmt: skip
    if hover is not None:
        if [len(row) for row in hover] != [z.shape[1]] * z.shape[0]:
            raise ValueError(f"token_map: expected hover as {z.shape[0]} rows of {z.shape[1]} texts.")
        cells: Any = figure.data[0]  # plotly's attributes are made at run time
        said = zip(cells.hovertext, hover, strict=True)
        figure.update_traces(hovertext=[[f"{a}<br>{plain(b)}" for a, b in zip(*row, strict=True)] for row in said])
    parts: Any = figure.layout
    wide = (look().size.width - parts.margin.l - BESIDE[look().width]) / len(words)
    mark_beyond(figure, z, reach, (wide, (parts.height - parts.margin.t - parts.margin.b) / z.shape[0]), upright=False)
    shown = named_columns(words, wide)
    return figure.update_xaxes(tickvals=shown, ticktext=[cut(words[k], names_most(24)) for k in shown])
