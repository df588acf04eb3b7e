"""Lines: quantities over layers, scales, head counts or numbers of pairs."""

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from fvlens.plots._figure import drawn
from fvlens.plots._input import (
    Number,
    Numbers,
    as_intervals,
    as_numbers,
    check_increasing,
    check_lengths,
    check_range,
    short,
    some,
)
from fvlens.plots._style import (
    REFERENCE_DASHES,
    faded,
    label_margin,
    layout,
    legend_above,
    look,
    on_lines,
    plain,
    reach,
    spread,
    thinned,
)


@drawn
def line_sweep(
    x: Numbers,
    y: Numbers,
    low: Numbers | None = None,
    high: Numbers | None = None,
    *,
    x_title: str,
    y_title: str,
    title: str | None = "",
    references: Mapping[str, Number] | None = None,
    marked: Number | None = None,
    marked_label: str = "best",
    level: float = 0.95,
    note: str | None = None,
    y_range: tuple[Number, Number] | None = None,
) -> go.Figure:
    """A quantity over layers, scales or head counts, with its interval as a band and reference lines.

    Args:
        x: where the quantity was measured, in increasing order.
        y: the quantity at each ``x``.
        low: lower end of the interval at each ``x``; give ``low`` and ``high`` together.
        high: upper end of the interval at each ``x``.
        x_title: title of the x axis.
        y_title: title of the y axis; also the name of the quantity in the hover text.
        title: figure title.
        references: name and value of horizontal lines to compare with, such as ``{"10-shot": 0.98}``.
        marked: one of the ``x``, drawn as a large point with its value.
        marked_label: what the marked point is.
        level: of the interval.
        note: what the band is, for the line under the title; by default an interval of the mean of this level.
        y_range: ends of the y axis; by default it holds 0, all points and all references.

    Returns:
        The figure. Trace ``y`` is last; with an interval, the band is the trace before it.

    Raises:
        ValueError: there are no points; the data differ in length; a number is not finite; ``x`` does not increase;
            only one of ``low`` and ``high`` is given; ``low`` is above ``high``; ``marked`` is not one of the ``x``;
            ``y_range`` does not increase.

    Example:
        >>> from fvlens.plots import line_sweep
        >>> figure = line_sweep([0, 1, 2], [0.2, 0.9, 0.4], x_title="Layer", y_title="Top-1", marked=1)
        >>> figure.layout.xaxis.title.text
        'Layer'
    """
    xs, ys = as_numbers("line_sweep", "x", x), as_numbers("line_sweep", "y", y)
    lows, highs = as_intervals("line_sweep", low, high)
    check_lengths("line_sweep", x=xs, y=ys, low=lows, high=highs)
    check_increasing("line_sweep", xs)
    if marked is not None and marked not in xs:
        raise ValueError(f"line_sweep: expected marked to be one of x, {some(xs)}, got {marked}.")
    check_range("line_sweep", "y_range", y_range)
    compared = dict(references or {})
    as_numbers("line_sweep", "references", list(compared.values()), may_be_empty=True)

    size, colours = look().size, look().colours
    # layers and counts are shown as whole numbers
    whole = all(value == int(value) for value in xs)
    shown_x = [int(value) for value in xs] if whole else xs
    figure = go.Figure()
    if lows is not None and highs is not None:
        figure.add_trace(_band(shown_x, lows, highs, fillcolor=faded(colours.accent, 0.16), name="interval"))
    sizes = [2 * size.mark - 1 if value == marked else size.mark for value in xs]
    figure.add_trace(
        go.Scatter(
            x=shown_x, y=ys, mode="lines+markers", name=y_title, line={"color": colours.accent, "width": size.stroke},
            marker={
                "size": sizes, "color": colours.accent, "opacity": 1, "line": {"color": colours.paper, "width": 1.5},
            },
            hovertext=_hover(xs, ys, lows, highs, x_title=x_title, y_title=y_title), hoverinfo="text",
            showlegend=False, cliponaxis=False,
        )
    )  # fmt: skip

    # reference lines, their names at the right edge and moved apart by the height of the tallest
    bottom, top = y_range or reach([*ys, *(lows or []), *(highs or []), *compared.values()], room=0.06)
    height = size.high(420)
    names = [on_lines(name) for name in compared]
    right = label_margin([line for name in names for line in name.split("<br>")], size.label) if names else size.right
    texts = [f"{name}<br>{value:.3g}" for name, value in zip(names, compared.values(), strict=True)]
    tallest = size.line * max((text.count("<br>") + 1 for text in texts), default=0)
    levels = [(value - bottom) / (top - bottom) for value in compared.values()]
    places = spread(levels, tallest / (height - size.high(150)))
    for i, (value, text, place) in enumerate(zip(compared.values(), texts, places, strict=True)):
        colour, dash = colours.references[i % len(colours.references)], REFERENCE_DASHES[i % len(REFERENCE_DASHES)]
        add_reference(figure, value, text, place, colour=colour, dash=dash)

    # the marked point's value stands above it, at the figure's edge beside it
    if marked is not None:
        i = xs.index(marked)
        figure.add_annotation(
            x=shown_x[i], y=ys[i] if highs is None else highs[i], yshift=7, yanchor="bottom",
            xanchor="center" if 0 < i < len(xs) - 1 else "right" if i else "left", showarrow=False,
            text=f"<b>{plain(marked_label)}: {ys[i]:.3g}</b>", font={"size": size.text, "color": colours.accent},
            bgcolor=colours.veil(0.8), borderpad=1,
        )  # fmt: skip

    if note is None and lows is not None:
        note = f"Band: {level:.0%} interval of the mean"
    said = _in_words(xs, ys, lows, highs)
    shared = layout(
        title, height=height, note=None if lows is None else note, alt=f"Line of {y_title} over {x_title}: {said}"
    )
    shared["margin"] |= {"r": right}
    figure.update_layout(**shared)
    pad = 0.03 * (xs[-1] - xs[0]) or 0.5
    figure.update_xaxes(
        title=x_title,
        range=[xs[0] - pad, xs[-1] + pad],
        tickvals=thinned(shown_x, size.width - 1.25 * size.left - right),
        showgrid=False,
    )
    figure.update_yaxes(title=y_title, range=[bottom, top])
    return figure


@drawn
def curves(
    x: Numbers,
    lines: Mapping[str, Numbers],
    intervals: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    *,
    x_title: str,
    y_title: str,
    title: str | None = "",
    note: str | None = None,
    references: Mapping[str, Number] | None = None,
    log_x: bool = False,
    y_range: tuple[Number, Number] | None = None,
) -> go.Figure:
    """Several quantities over one axis, each a line with its interval as a band, named in a legend above.

    Args:
        x: where the quantities were measured, in increasing order.
        lines: the quantities, by name.
        intervals: lower and upper ends of the intervals, by name; a line may have none.
        x_title: title of the x axis.
        y_title: title of the y axis.
        title: figure title.
        note: a line under the title, such as what the bands are.
        references: name and value of horizontal lines to compare with.
        log_x: a logarithmic x axis.
        y_range: ends of the y axis; by default it holds 0 and everything drawn.

    Returns:
        The figure. Each line has its colour, dash and marker; its band, if any, is the trace before it.

    Raises:
        ValueError: there are no lines or no points; the data differ in length; a number is not finite; ``x`` does not
            increase, or is not above 0 on a logarithmic axis; an interval of no line, or one whose low is above its
            high; ``y_range`` does not increase.

    Example:
        >>> from fvlens.plots import curves
        >>> lines = {"train": [0.9, 1.0], "test": [0.4, 0.8]}
        >>> figure = curves([1, 20], lines, x_title="Pairs", y_title="Top-1")
        >>> [trace.name for trace in figure.data]
        ['train', 'test']
    """
    xs = as_numbers("curves", "x", x)
    if not lines:
        raise ValueError("curves: expected at least one line, got none.")
    check_increasing("curves", xs)
    if log_x and xs[0] <= 0:
        raise ValueError(f"curves: a logarithmic axis needs x above 0, got {short(xs[0])}.")
    check_range("curves", "y_range", y_range)
    bands = dict(intervals or {})
    unknown = [name for name in bands if name not in lines]
    if unknown:
        raise ValueError(f"curves: an interval of {unknown[0]!r}, but the lines are {', '.join(lines)}.")
    compared = dict(references or {})
    drawn = as_numbers("curves", "references", list(compared.values()), may_be_empty=True)

    # each line over its band
    size, colours = look().size, look().colours
    figure, said = go.Figure(), []
    for i, (name, values) in enumerate(lines.items()):
        ys = as_numbers("curves", name, values)
        lows, highs = as_intervals("curves", *bands.get(name, (None, None)))
        check_lengths("curves", x=xs, **{name: ys}, low=lows, high=highs)
        drawn += [*ys, *(lows or []), *(highs or [])]
        colour, dash, symbol = colours.lines[i % len(colours.lines)]
        if lows is not None and highs is not None:
            figure.add_trace(_band(xs, lows, highs, fillcolor=colour, opacity=0.16, name=f"interval of {name}"))
        hover = _hover(xs, ys, lows, highs, x_title=x_title, y_title=y_title)
        said.append(f"{name}: {_in_words(xs, ys, lows, highs)}")
        figure.add_trace(
            go.Scatter(
                x=xs, y=ys, mode="lines+markers", name=plain(name),
                line={"color": colour, "width": size.stroke, "dash": dash},
                marker={
                    "size": size.mark, "symbol": symbol, "color": colour, "line": {"color": colours.paper, "width": 1},
                },
                hovertext=[f"{plain(name)}<br>{text}" for text in hover], hoverinfo="text", cliponaxis=False,
            )
        )  # fmt: skip

    # reference lines are grey, since the colours are taken; their names stand at the right edge, moved apart
    bottom, top = y_range or reach(drawn, room=0.06)
    height = size.high(440)
    names = [on_lines(name) for name in compared]
    right = label_margin([line for name in names for line in name.split("<br>")], size.label) if names else size.right
    tallest = size.line * max((name.count("<br>") + 2 for name in names), default=0) + 2
    places = spread(
        [(value - bottom) / (top - bottom) for value in compared.values()], tallest / (height - size.high(180))
    )
    for name, value, place in zip(names, compared.values(), places, strict=True):
        add_reference(figure, value, f"{name}<br>{value:.3g}", place, colour=colours.grey, dash="dot")

    # the legend above takes as many rows as its entries need
    legend, n_rows = legend_above(list(lines), size.width - size.left - right)
    row = size.line + 4
    shared = layout(
        title, height=height + row * (n_rows - 1), note=note,
        alt=f"Lines of {y_title} over {x_title}. {'. '.join(said[:6])}",
    )  # fmt: skip
    shared["margin"] |= {"r": right, "t": shared["margin"]["t"] + 6 + row * n_rows}
    figure.update_layout(**shared, showlegend=True, legend=legend)

    # plotly wants the ends of a logarithmic axis as exponents, its ticks as values
    positions = [math.log10(value) for value in xs] if log_x else xs
    pad = 0.03 * (positions[-1] - positions[0]) or 0.5
    ticks = [xs[positions.index(position)] for position in thinned(positions, size.width - 1.25 * size.left - right)]
    figure.update_xaxes(
        title=x_title, type="log" if log_x else "linear", range=[positions[0] - pad, positions[-1] + pad],
        showgrid=False, tickvals=ticks, ticktext=[short(value) for value in ticks],
    )  # fmt: skip
    figure.update_yaxes(title=y_title, range=[bottom, top])
    return figure


def _in_words(
    xs: Sequence[float], ys: Sequence[float], lows: Sequence[float] | None, highs: Sequence[float] | None
) -> str:
    """A line in words: its first and last value, its lowest and its highest, with their intervals."""

    def said(i: int) -> str:
        ends = "" if lows is None or highs is None else f" ({lows[i]:.3g} to {highs[i]:.3g})"
        return f"{ys[i]:.3g}{ends} at {short(xs[i])}"

    lowest, highest = min(range(len(ys)), key=ys.__getitem__), max(range(len(ys)), key=ys.__getitem__)
    return f"from {said(0)} to {said(len(ys) - 1)}, lowest {said(lowest)}, highest {said(highest)}"


def _band(x: Sequence[Number], lows: Sequence[float], highs: Sequence[float], **look: str | float) -> go.Scatter:
    """An interval as a filled outline: along the upper ends, and back along the lower ones."""
    return go.Scatter(
        x=[*x, *x[::-1]], y=[*highs, *lows[::-1]], mode="lines", line={"width": 0}, fill="toself", hoverinfo="skip",
        showlegend=False, **look,
    )  # fmt: skip


def _hover(
    xs: Sequence[float],
    ys: Sequence[float],
    lows: Sequence[float] | None,
    highs: Sequence[float] | None,
    *,
    x_title: str,
    y_title: str,
) -> list[str]:
    """Hover text of each point of a line."""
    texts = [f"{x_title}: {short(x)}<br>{y_title}: {y:.4g}" for x, y in zip(xs, ys, strict=True)]
    if lows is None or highs is None:
        return texts
    return [f"{text}<br>interval: {low:.4g} to {high:.4g}" for text, low, high in zip(texts, lows, highs, strict=True)]


def add_reference(figure: go.Figure, value: Number, text: str, place: float, *, colour: str, dash: str) -> None:
    """A horizontal line at ``value``, its text at the right edge, at ``place`` of the height (0..1)."""
    figure.add_shape(
        type="line", xref="paper", x0=0, x1=1, y0=value, y1=value, layer="below",
        line={"color": colour, "width": 1.5, "dash": dash},
    )  # fmt: skip
    figure.add_annotation(
        xref="paper", yref="paper", x=1, y=place, xshift=8, xanchor="left", yanchor="middle", align="left",
        showarrow=False, text=text, font={"size": look().size.text, "color": colour},
    )  # fmt: skip
