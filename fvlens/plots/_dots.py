"""Dots: two scores of many things, one against the other."""

import textwrap
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from fvlens.plots._figure import drawn
from fvlens.plots._input import Number, Numbers, as_numbers, check_lengths
from fvlens.plots._labels import with_room
from fvlens.plots._lines import add_reference
from fvlens.plots._style import faded, label_margin, layout, legend_above, look, on_lines, plain, spread

_WRAP = 16
"""Characters of a reference's name in a line."""

_SPAN = (-0.04, 1.04)
"""Both axes: shares, with room for whole dots at their ends."""


@drawn
def dots(
    x: Numbers,
    y: Numbers,
    names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    rings: tuple[str, Numbers] | None = None,
    x_title: str,
    y_title: str,
    title: str | None = "",
    note: str | None = None,
    references: Mapping[str, Number] | None = None,
) -> go.Figure:
    """Two shares of many things, a dot each, over the diagonal where both are equal.

    Dots are named where there is room for the name; hover texts name all.

    Args:
        x: the share that is compared with.
        y: the share that is compared.
        names: of the things.
        groups: of each thing, for its colour and marker; by default all are alike.
        rings: name and values of a third share, a grey ring at the thing's ``x``, such as the best that could be had.
        x_title, y_title: of the axes.
        title: figure title.
        note: a line under it.
        references: name and value of horizontal lines to compare with.

    Returns:
        The figure. Rings, if any, are the first trace, then comes a trace a group, in the order of their first thing.

    Raises:
        ValueError: there are no dots; the data differ in length; a number is not finite.

    Example:
        >>> from fvlens.plots import dots
        >>> figure = dots([0.1, 0.5], [0.9, 0.6], ["antonym", "plural"], x_title="Untuned", y_title="Fine-tuned")
        >>> [note.text for note in figure.layout.annotations]
        ['antonym', 'plural']
    """
    xs, ys = as_numbers("dots", "x", x), as_numbers("dots", "y", y)
    kinds = list(groups) if groups is not None else [""] * len(xs)
    above = None if rings is None else as_numbers("dots", "rings", rings[1])
    check_lengths("dots", x=xs, y=ys, names=names, groups=kinds, rings=above)
    compared = dict(references or {})
    as_numbers("dots", "references", list(compared.values()), may_be_empty=True)

    size, colours = look().size, look().colours
    figure = go.Figure()
    figure.add_shape(
        type="line", x0=0, y0=0, x1=1, y1=1, layer="below", line={"color": colours.grey, "width": 1.2},
    )  # fmt: skip
    if rings is not None and above is not None:
        figure.add_trace(
            go.Scatter(
                x=xs, y=above, mode="markers", name=plain(rings[0]),
                marker={
                    "size": size.mark + 1, "symbol": "circle-open", "color": faded(colours.grey, 0.5),
                    "line": {"width": 1.2},
                },
                hovertext=[
                    f"{plain(name)}<br>{plain(rings[0])}: {z:.4g}" for name, z in zip(names, above, strict=True)
                ],
                hoverinfo="text", cliponaxis=False,
            )
        )  # fmt: skip
    for i, kind in enumerate(dict.fromkeys(kinds)):
        own = [k for k, of in enumerate(kinds) if of == kind]
        colour, _, symbol = colours.lines[i % len(colours.lines)]
        figure.add_trace(
            go.Scatter(
                x=[xs[k] for k in own], y=[ys[k] for k in own], mode="markers", name=plain(kind),
                showlegend=groups is not None,
                marker={"size": size.mark + 2, "symbol": symbol, "color": colour, "opacity": 0.85,
                        "line": {"color": colours.paper, "width": 1}},
                hovertext=[f"{plain(names[k])}<br>{x_title}: {xs[k]:.4g}<br>{y_title}: {ys[k]:.4g}" for k in own],
                hoverinfo="text", cliponaxis=False,
            )
        )  # fmt: skip

    # as wide as high, below a legend of as many rows as its entries need
    right = (
        label_margin([line for name in compared for line in textwrap.wrap(name, _WRAP)], _WRAP)
        if compared
        else size.right
    )
    wide = size.width - size.left - right
    legend, n_rows = legend_above([*([] if rings is None else rings[:1]), *dict.fromkeys(kinds)], wide)
    rows = n_rows if groups is not None or rings is not None else 0
    shared = layout(title, height=0, note=note, alt=f"{len(xs)} dots of {y_title} over {x_title}")
    shared["margin"] |= {"r": right, "t": shared["margin"]["t"] + 6 + (size.line + 4) * rows}
    shared["height"] = wide + shared["margin"]["t"] + shared["margin"]["b"]
    length = _SPAN[1] - _SPAN[0]
    texts = [f"{on_lines(name, _WRAP)}<br>{value:.2f}" for name, value in compared.items()]
    tallest = size.line * max((text.count("<br>") + 1 for text in texts), default=0)
    levels = [(value - _SPAN[0]) / length for value in compared.values()]
    for value, text, place in zip(compared.values(), texts, spread(levels, tallest / wide), strict=True):
        add_reference(figure, value, text, place, colour=colours.grey, dash="dot")
    small = max(10 if look().width == "page" else 0, size.least)
    unit = wide / length
    marks = [(x * unit, y * unit) for x, y in zip(xs, ys, strict=True)]
    order = sorted(range(len(xs)), key=lambda i: -abs(ys[i] - xs[i]))  # furthest from the diagonal first
    for k, dx, dy, side in with_room(
        marks, names, order, letter=0.56 * small, ends=(_SPAN[0] * unit, _SPAN[1] * unit),
        others=[(x * unit, y * unit) for x, y in zip(xs, above or [], strict=False)],
    ):  # fmt: skip
        figure.add_annotation(
            x=xs[k], y=ys[k], xshift=dx, yshift=dy, xanchor=side, yanchor="middle", showarrow=False,
            text=plain(names[k]), font={"size": small, "color": colours.ink}, bgcolor=colours.veil(0.7), borderpad=0,
        )  # fmt: skip
    figure.update_layout(**shared, showlegend=rows > 0, legend=legend)
    figure.update_xaxes(title=x_title, range=list(_SPAN), dtick=0.2)
    figure.update_yaxes(title=y_title, range=list(_SPAN), dtick=0.2)
    return figure
