"""Figures: arrays and labels in, ``go.Figure`` out. Computes nothing, shows nothing.

All figures share one quiet template and the colour-blind-safe colours of Okabe and Ito, and are laid out for a width of
700 pixels. Signed values use a diverging scale centred at 0: blue above, red below, near white at 0. Words and labels
are escaped, so a token such as ``<b>`` is shown as it is.

This module imports plotly, so the rest of the package imports it inside its ``.plot()`` methods only.
"""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from fvlens.types import HeadLike, as_heads

Number = float | int
Numbers = Sequence[Number] | Tensor
"""One-dimensional data: a sequence of numbers, or a tensor of one axis."""

WIDTH = 700
"""Width of every figure, in pixels."""

INK, GREY, GRID, PAPER = "#222222", "#6b6b6b", "#e6e6e6", "#ffffff"
ACCENT = "#0072B2"
MUTED = "#9fb4c4"
REFERENCES = ("#D55E00", "#009E73", "#CC79A7", "#B8860B", "#555555", "#56B4E9")
"""Colours of reference lines; each also has its own dash."""

DIVERGING = (
    (0.0, "#B2182B"),
    (0.125, "#D6604D"),
    (0.25, "#F4A582"),
    (0.375, "#FDDBC7"),
    (0.5, "#F7F7F7"),
    (0.625, "#D1E5F0"),
    (0.75, "#92C5DE"),
    (0.875, "#4393C3"),
    (1.0, "#2166AC"),
)
"""ColorBrewer RdBu without its darkest ends, so that a black outline shows on every cell."""

_LINES = (
    (ACCENT, "solid", "circle"),
    ("#D55E00", "dash", "square"),
    ("#009E73", "dot", "diamond"),
    ("#CC79A7", "dashdot", "triangle-up"),
    ("#B8860B", "longdash", "cross"),
    ("#555555", "longdashdot", "x"),
)
"""Colour, dash and marker of the lines of one figure."""

_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot", "5px,2px")
_FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_CHARACTER = 6.6
"""Width of an average character of the 12-pixel font."""


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
    z = _matrix(values)
    n_layers, n_heads = z.shape
    if z.numel() == 0 or bool(z.isnan().all()):
        raise ValueError(f"heatmap: expected at least one finite value, got none in shape {tuple(z.shape)}.")
    if bool(z.isinf().any()):
        raise ValueError(
            f"heatmap: expected finite values (or NaN for heads not measured), got {int(z.isinf().sum())} infinite."
        )
    errors = None if stderr is None else _matrix(stderr)
    if errors is not None:
        if errors.shape != z.shape:
            raise ValueError(
                f"heatmap: expected stderr of the shape of values, {tuple(z.shape)}, got {tuple(errors.shape)}."
            )
        if bool(((errors < 0) | errors.isinf()).any()):
            raise ValueError(f"heatmap: expected finite standard errors of at least 0, got {_extremes(errors)}.")
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
        more = "" if hover is None else f"<br>{_plain(hover[layer][head])}"
        return f"{name}<br>{line}{more}"

    limit = z.nan_to_num().abs().max().item() or 1.0
    cell = max(9.0, min(44.0, 420 / n_layers))
    n_ticks = max(3, min(7, round(cell * n_layers / 30)))
    figure = go.Figure(
        go.Heatmap(
            z=z.numpy(),
            x=list(range(n_heads)),
            y=list(range(n_layers)),
            hovertext=[[text(layer, head) for head in range(n_heads)] for layer in range(n_layers)],
            hoverinfo="text",
            colorscale=DIVERGING,
            zmin=-limit,
            zmid=0,
            zmax=limit,
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": colorbar_title, "side": "top"},
                "thickness": 14,
                "outlinewidth": 0,
                "nticks": n_ticks,
            },
        )
    )
    for layer, head in heads:
        figure.add_shape(
            type="rect",
            x0=head - 0.5,
            x1=head + 0.5,
            y0=layer - 0.5,
            y1=layer + 0.5,
            line={"color": "black", "width": 2},
        )
    note = f"Black outline: {outlined_label} ({len(heads)})" if heads else None
    figure.update_layout(**_layout(title, height=round(150 + cell * n_layers), note=note))
    figure.update_xaxes(title="Head", range=_around(n_heads, 550), showgrid=False, **_whole_ticks(n_heads, 24))
    figure.update_yaxes(
        title="Layer",
        range=_around(n_layers, cell * n_layers),
        showgrid=False,
        **_whole_ticks(n_layers, round(cell * n_layers / 18)),
    )
    return figure


def line_sweep(
    x: Numbers,
    y: Numbers,
    low: Numbers | None = None,
    high: Numbers | None = None,
    *,
    x_title: str,
    y_title: str,
    title: str = "",
    references: Mapping[str, Number] | None = None,
    marked: Number | None = None,
    marked_label: str = "best",
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
    xs, ys = _numbers("line_sweep", "x", x), _numbers("line_sweep", "y", y)
    lows, highs = _intervals("line_sweep", low, high)
    _check_lengths("line_sweep", x=xs, y=ys, low=lows, high=highs)
    if any(b <= a for a, b in pairwise(xs)):
        raise ValueError(f"line_sweep: expected x in increasing order without repeats, got {_some(xs)}.")
    if marked is not None and marked not in xs:
        raise ValueError(f"line_sweep: expected marked to be one of x, {_some(xs)}, got {marked}.")
    if y_range is not None and not y_range[0] < y_range[1]:
        raise ValueError(f"line_sweep: expected y_range as (low, high) with low below high, got {y_range}.")
    names = dict(references or {})
    _numbers("line_sweep", "references", list(names.values()), may_be_empty=True)

    whole = all(value == int(value) for value in xs)
    shown_x = [int(value) for value in xs] if whole else xs
    figure = go.Figure()
    if lows is not None and highs is not None:
        figure.add_trace(
            go.Scatter(
                x=[*shown_x, *shown_x[::-1]], y=[*highs, *lows[::-1]], mode="lines", line={"width": 0}, fill="toself",
                fillcolor="rgba(0, 114, 178, 0.16)", hoverinfo="skip", showlegend=False, name="interval",
            )
        )  # fmt: skip
    texts = [
        f"{x_title}: {_short(xs[i])}<br>{y_title}: {ys[i]:.4g}"
        + (f"<br>interval: {lows[i]:.4g} to {highs[i]:.4g}" if lows is not None and highs is not None else "")
        for i in range(len(xs))
    ]
    sizes = [13 if value == marked else 7 for value in xs]
    figure.add_trace(
        go.Scatter(
            x=shown_x, y=ys, mode="lines+markers", line={"color": ACCENT, "width": 2.5}, name=y_title,
            marker={"size": sizes, "color": ACCENT, "opacity": 1, "line": {"color": PAPER, "width": 1.5}},
            hovertext=texts, hoverinfo="text", showlegend=False, cliponaxis=False,
        )
    )  # fmt: skip

    bottom, top = y_range or _reach([*ys, *(lows or []), *(highs or []), *names.values()], room=0.06)
    height = 420
    inside = height - 150
    lines = [f"{_lines(name)}<br>{value:.3g}" for name, value in names.items()]
    right = _label_margin(list(names), 33) if names else 24
    tallest = 16 * max((line.count("<br>") + 1 for line in lines), default=0)
    levels = [(value - bottom) / (top - bottom) for value in names.values()]
    spots = _spread(levels, tallest / inside)
    for i, (value, line, spot) in enumerate(zip(names.values(), lines, spots, strict=True)):
        colour, dash = REFERENCES[i % len(REFERENCES)], _DASHES[i % len(_DASHES)]
        figure.add_shape(
            type="line", xref="paper", x0=0, x1=1, y0=value, y1=value, layer="below",
            line={"color": colour, "width": 1.5, "dash": dash},
        )  # fmt: skip
        figure.add_annotation(
            xref="paper", yref="paper", x=1, y=spot, xshift=8, xanchor="left", yanchor="middle", align="left",
            showarrow=False, text=line, font={"size": 12, "color": colour},
        )  # fmt: skip
    if marked is not None:
        i = xs.index(marked)
        figure.add_annotation(
            x=shown_x[i], y=ys[i] if highs is None else highs[i], yshift=7, yanchor="bottom",
            xanchor="center" if 0 < i < len(xs) - 1 else "right" if i else "left", showarrow=False,
            text=f"<b>{_plain(marked_label)}: {ys[i]:.3g}</b>", font={"size": 12, "color": ACCENT},
            bgcolor="rgba(255, 255, 255, 0.8)", borderpad=1,
        )  # fmt: skip
    note = None if lows is None else "Band: interval of the mean"
    layout = _layout(title, height=height, note=note)
    layout["margin"] |= {"r": right}
    figure.update_layout(**layout)
    pad = 0.03 * (xs[-1] - xs[0]) or 0.5
    figure.update_xaxes(
        title=x_title, range=[xs[0] - pad, xs[-1] + pad], tickvals=_thinned(shown_x, WIDTH - 80 - right), showgrid=False
    )
    figure.update_yaxes(title=y_title, range=[bottom, top])
    return figure


def curves(
    x: Numbers,
    lines: Mapping[str, Numbers],
    intervals: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    *,
    x_title: str,
    y_title: str,
    title: str = "",
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
    xs = _numbers("curves", "x", x)
    if not lines:
        raise ValueError("curves: expected at least one line, got none.")
    if any(b <= a for a, b in pairwise(xs)):
        raise ValueError(f"curves: expected x in increasing order without repeats, got {_some(xs)}.")
    if log_x and xs[0] <= 0:
        raise ValueError(f"curves: a logarithmic axis needs x above 0, got {_short(xs[0])}.")
    if y_range is not None and not y_range[0] < y_range[1]:
        raise ValueError(f"curves: expected y_range as (low, high) with low below high, got {y_range}.")
    bands = dict(intervals or {})
    unknown = [name for name in bands if name not in lines]
    if unknown:
        raise ValueError(f"curves: an interval of {unknown[0]!r}, but the lines are {', '.join(lines)}.")
    names = dict(references or {})
    drawn = _numbers("curves", "references", list(names.values()), may_be_empty=True)

    figure = go.Figure()
    for i, (name, values) in enumerate(lines.items()):
        ys = _numbers("curves", name, values)
        lows, highs = _intervals("curves", *bands.get(name, (None, None)))
        _check_lengths("curves", x=xs, **{name: ys}, low=lows, high=highs)
        drawn += [*ys, *(lows or []), *(highs or [])]
        colour, dash, symbol = _LINES[i % len(_LINES)]
        if lows is not None and highs is not None:
            figure.add_trace(
                go.Scatter(
                    x=[*xs, *xs[::-1]], y=[*highs, *lows[::-1]], mode="lines", line={"width": 0}, fill="toself",
                    fillcolor=colour, opacity=0.16, hoverinfo="skip", showlegend=False, name=f"interval of {name}",
                )
            )  # fmt: skip
        texts = [
            f"{_plain(name)}<br>{x_title}: {_short(xs[j])}<br>{y_title}: {ys[j]:.4g}"
            + (f"<br>interval: {lows[j]:.4g} to {highs[j]:.4g}" if lows is not None and highs is not None else "")
            for j in range(len(xs))
        ]
        figure.add_trace(
            go.Scatter(
                x=xs, y=ys, mode="lines+markers", name=_plain(name), line={"color": colour, "width": 2.5, "dash": dash},
                marker={"size": 7, "symbol": symbol, "color": colour, "line": {"color": PAPER, "width": 1}},
                hovertext=texts, hoverinfo="text", cliponaxis=False,
            )
        )  # fmt: skip

    bottom, top = y_range or _reach(drawn, room=0.06)
    height = 440
    right = _label_margin(list(names), 33) if names else 24
    spots = _spread([(value - bottom) / (top - bottom) for value in names.values()], 34 / (height - 180))
    for (name, value), spot in zip(names.items(), spots, strict=True):
        figure.add_shape(
            type="line", xref="paper", x0=0, x1=1, y0=value, y1=value, layer="below",
            line={"color": GREY, "width": 1.5, "dash": "dot"},
        )  # fmt: skip
        figure.add_annotation(
            xref="paper", yref="paper", x=1, y=spot, xshift=8, xanchor="left", yanchor="middle", align="left",
            showarrow=False, text=f"{_lines(name)}<br>{value:.3g}", font={"size": 12, "color": GREY},
        )  # fmt: skip
    entry = round(_CHARACTER * max(len(name) for name in lines)) + 8  # and a sample of the line before it
    n_rows = math.ceil(len(lines) / max(1, (WIDTH - 64 - right) // (entry + 46)))
    layout = _layout(title, height=height + 20 * (n_rows - 1), note=note)
    layout["margin"] |= {"r": right, "t": layout["margin"]["t"] + 6 + 20 * n_rows}
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "entrywidth": entry}
    figure.update_layout(**layout, showlegend=True, legend=legend)
    places = [math.log10(value) for value in xs] if log_x else xs
    pad = 0.03 * (places[-1] - places[0]) or 0.5
    shown = _thinned(places, WIDTH - 80 - right)
    figure.update_xaxes(
        title=x_title, type="log" if log_x else "linear", range=[places[0] - pad, places[-1] + pad], showgrid=False,
        tickvals=[xs[places.index(place)] for place in shown],
        ticktext=[_short(xs[places.index(place)]) for place in shown],
    )  # fmt: skip
    figure.update_yaxes(title=y_title, range=[bottom, top])
    return figure


def training_curves(
    *,
    train_loss: Numbers,
    valid_loss: Numbers,
    valid_top1: Numbers,
    norm: Numbers,
    cosine: Numbers,
    marked: int,
    title: str = "Training",
) -> go.Figure:
    """A training over its epochs: losses, validation top-1, norm and cosine to the start, the chosen epoch marked.

    Args:
        train_loss: loss on the training pairs at each epoch, entry 0 before any step.
        valid_loss: loss on the validation pairs.
        valid_top1: top-1 on the validation pairs.
        norm: Euclidean norm of what is trained.
        cosine: its cosine similarity to the start.
        marked: the epoch that was chosen, a vertical line.
        title: figure title.

    Returns:
        The figure. Values that are NaN are left out, and so is the panel of a quantity that has no others.

    Raises:
        ValueError: there are no epochs; the data differ in length; a number is infinite; ``marked`` is not an epoch.

    Example:
        >>> from fvlens.plots import training_curves
        >>> nan = [float("nan")] * 2
        >>> figure = training_curves(
        ...     train_loss=[2.0, 0.5], valid_loss=nan, valid_top1=nan, norm=[1.0, 1.2], cosine=[1.0, 0.9], marked=1
        ... )
        >>> [trace.name for trace in figure.data]
        ['training pairs', 'norm', 'cosine']
    """
    from plotly.subplots import make_subplots

    panels = {
        "Loss": {"training pairs": train_loss, "validation pairs": valid_loss},
        "Validation top-1": {"validation top-1": valid_top1},
        "Norm": {"norm": norm},
        "Cosine to the start": {"cosine": cosine},
    }
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    lengths: dict[str, list] = {}
    for panel, parts in panels.items():
        for name, values in parts.items():
            flat = values.detach().cpu().double().tolist() if isinstance(values, Tensor) else list(values)
            lengths[name] = flat
            points = [(epoch, value) for epoch, value in enumerate(flat) if not math.isnan(value)]
            if points:
                _numbers("training_curves", name, [value for _, value in points])
                found.setdefault(panel, {})[name] = points
    _check_lengths("training_curves", **lengths)
    n = len(lengths["training pairs"])
    if not found:
        raise ValueError("training_curves: expected at least one number that is not NaN, got none.")
    if not 0 <= marked < n:
        raise ValueError(f"training_curves: expected marked in 0..{n - 1}, got {marked}.")

    n_rows = (len(found) + 1) // 2
    figure = make_subplots(
        rows=n_rows, cols=min(2, len(found)), subplot_titles=list(found), horizontal_spacing=0.11,
        vertical_spacing=0.2 if n_rows > 1 else 0,
    )  # fmt: skip
    figure.update_annotations(font={"size": 13, "color": INK}, yshift=2)
    both = len(found.get("Loss", ())) > 1
    for i, (panel, parts) in enumerate(found.items()):
        row, col = i // 2 + 1, i % 2 + 1
        for name, points in parts.items():
            colour, dash, symbol = _LINES[1 if name.startswith("validation") else 0]
            figure.add_trace(
                go.Scatter(
                    x=[epoch for epoch, _ in points], y=[value for _, value in points], name=name,
                    mode="lines+markers", line={"color": colour, "width": 2, "dash": dash},
                    marker={"size": 5, "symbol": symbol, "color": colour},
                    hovertext=[f"epoch {epoch}<br>{name}: {value:.4g}" for epoch, value in points], hoverinfo="text",
                    showlegend=both and panel == "Loss", cliponaxis=False,
                ),
                row=row, col=col,
            )  # fmt: skip
        values = [value for points in parts.values() for _, value in points]
        bottom, top = _reach(values, room=0.08)
        if panel == "Validation top-1":
            bottom, top = 0.0, 1.04
        figure.update_yaxes(range=[bottom, top], row=row, col=col)
        figure.update_xaxes(
            range=[-0.03 * max(1, n - 1), 1.03 * max(1, n - 1)], showgrid=False, row=row, col=col,
            **(_whole_ticks(n, 12)),
        )  # fmt: skip
        figure.add_shape(
            type="line", x0=marked, x1=marked, y0=bottom, y1=top, layer="below", row=row, col=col,
            line={"color": GREY, "width": 1.5, "dash": "dot"},
        )  # fmt: skip
        if i >= len(found) - 2:
            figure.update_xaxes(title="Epoch", row=row, col=col)
    layout = _layout(title, height=170 + 190 * n_rows, note=f"Dotted line: the epoch chosen, {marked}")
    layout["margin"] |= {"t": layout["margin"]["t"] + 34}
    figure.update_layout(
        **layout,
        legend={
            "orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yref": "container", "yanchor": "top",
            "font": {"size": 12},
        },
    )  # fmt: skip
    return figure


def bars(
    labels: Sequence[str],
    values: Numbers,
    low: Numbers | None = None,
    high: Numbers | None = None,
    *,
    x_title: str,
    title: str = "",
    highlighted: Sequence[str] = (),
    references: Mapping[str, Number] | None = None,
    x_range: tuple[Number, Number] | None = None,
) -> go.Figure:
    """Horizontal bars with intervals and their values in figures, the first label on top.

    Args:
        labels: name of each bar.
        values: length of each bar.
        low: lower end of each interval; give ``low`` and ``high`` together.
        high: upper end of each interval.
        x_title: title of the value axis; also the name of the quantity in the hover text.
        title: figure title.
        highlighted: labels of the bars in the accent colour; the others are muted. None named: all accented.
        references: name and value of vertical lines to compare with.
        x_range: ends of the value axis; by default it holds 0 and everything drawn.

    Returns:
        The figure. Bars sit at y = 0, 1, 2, ..., so equal labels do not merge.

    Raises:
        ValueError: there are no bars; the data differ in length; a number is not finite; only one of ``low`` and
            ``high`` is given; ``low`` is above ``high``; a highlighted label is not one of the labels; ``x_range`` does
            not increase.

    Example:
        >>> from fvlens.plots import bars
        >>> figure = bars(["no vector", "vector"], [0.2, 0.9], x_title="Top-1", highlighted=["vector"])
        >>> list(figure.layout.yaxis.ticktext)
        ['no vector', 'vector']
    """
    xs = _numbers("bars", "values", values)
    lows, highs = _intervals("bars", low, high)
    _check_lengths("bars", labels=labels, values=xs, low=lows, high=highs)
    unknown = [label for label in highlighted if label not in labels]
    if unknown:
        raise ValueError(f"bars: expected highlighted labels among {_some(labels)}, got {unknown[0]!r}.")
    if x_range is not None and not x_range[0] < x_range[1]:
        raise ValueError(f"bars: expected x_range as (low, high) with low below high, got {x_range}.")
    names = dict(references or {})
    _numbers("bars", "references", list(names.values()), may_be_empty=True)

    texts = [
        f"{_plain(label)}<br>{x_title}: {value:.4g}"
        + (f"<br>interval: {lows[i]:.4g} to {highs[i]:.4g}" if lows is not None and highs is not None else "")
        for i, (label, value) in enumerate(zip(labels, xs, strict=True))
    ]
    error = None
    if lows is not None and highs is not None:
        error = {
            "type": "data", "symmetric": False, "array": [max(0.0, h - v) for h, v in zip(highs, xs, strict=True)],
            "arrayminus": [max(0.0, v - n) for n, v in zip(lows, xs, strict=True)],
            "color": INK, "thickness": 1.3, "width": 4,
        }  # fmt: skip
    bright = set(highlighted) or set(labels)
    rows = list(range(len(xs)))
    figure = go.Figure(
        go.Bar(
            x=xs, y=rows, orientation="h", marker={"color": [ACCENT if label in bright else MUTED for label in labels]},
            error_x=error, hovertext=texts, hoverinfo="text", showlegend=False, width=0.66,
        )
    )  # fmt: skip
    margin = max(_label_margin(labels, 33), 40)
    inside = WIDTH - margin - 30
    everything = [*xs, *(lows or []), *(highs or []), *names.values()]
    left_end, right_end = x_range or _reach(everything, room=52 / inside)
    for row, value in enumerate(xs):
        below = value < 0
        end = (value if lows is None else min(value, lows[row])) if below else (value if highs is None else highs[row])
        figure.add_annotation(
            x=end, y=row, text=f"{value:.3g}", showarrow=False, xanchor="right" if below else "left",
            xshift=-5 if below else 5, font={"size": 12, "color": INK}, bgcolor="rgba(255, 255, 255, 0.75)",
        )  # fmt: skip
    levels = [(value - left_end) / (right_end - left_end) for value in names.values()]
    widest = max((len(f"{name} {value:.3g}") for name, value in names.items()), default=0) * _CHARACTER
    spots = _spread(levels, (widest + 10) / inside)
    for i, ((name, value), spot) in enumerate(zip(names.items(), spots, strict=True)):
        colour, dash = REFERENCES[i % len(REFERENCES)], _DASHES[i % len(_DASHES)]
        figure.add_shape(
            type="line", yref="paper", y0=0, y1=1, x0=value, x1=value,
            line={"color": colour, "width": 1.5, "dash": dash},
        )  # fmt: skip
        figure.add_annotation(
            xref="paper", yref="paper", x=spot, y=1, yanchor="bottom", xanchor="center", showarrow=False,
            text=f"{_plain(name)} {value:.3g}", font={"size": 12, "color": colour},
        )  # fmt: skip
    note = None if lows is None else "Whiskers: interval of the mean"
    layout = _layout(title, height=round(140 + 32 * len(xs) + (18 if names else 0)), note=note)
    layout["margin"] |= {"l": margin, "r": 30}
    layout["margin"]["t"] += 18 if names else 0
    figure.update_layout(**layout)
    figure.update_xaxes(title=x_title, range=[left_end, right_end], zeroline=True, zerolinecolor=GREY)
    figure.update_yaxes(
        range=[len(xs) - 0.5, -0.5], tickvals=rows, ticktext=[_lines(label) for label in labels], ticks="",
        showgrid=False, ticklabelstandoff=5,
    )  # fmt: skip
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
    z = _matrix(matrix)
    across = list(labels if columns is None else columns)
    if (len(labels), len(across)) != tuple(z.shape):
        raise ValueError(
            f"similarity: expected one label a row and a column of the {z.shape[0]} by {z.shape[1]} matrix, "
            f"got {len(labels)} and {len(across)} labels."
        )
    if z.numel() == 0:
        raise ValueError("similarity: expected at least one row and one column, got an empty matrix.")
    if not bool(z.isfinite().all()):
        raise ValueError(f"similarity: expected finite values, got {int((~z.isfinite()).sum())} NaN or infinite.")
    if not limit > 0:
        raise ValueError(f"similarity: expected limit above 0, got {limit}; cosines need 1.")
    n_rows, n_columns = z.shape
    margin = _label_margin(labels, 24)
    inside = WIDTH - margin - 90
    wide = inside / n_columns
    tall = max(11.0, min(44.0, wide))
    upright = max(len(name) for name in across) * _CHARACTER + 8 > wide
    below = _label_margin(across, 24) if upright else 40
    figure = go.Figure(
        go.Heatmap(
            z=z.numpy(),
            x=list(range(n_columns)),
            y=list(range(n_rows)),
            hovertext=[
                [
                    f"{_plain(down)}, {_plain(over)}<br>{colorbar_title}: {z[i, j].item():+.3g}"
                    for j, over in enumerate(across)
                ]
                for i, down in enumerate(labels)
            ],
            hoverinfo="text",
            colorscale=DIVERGING,
            zmin=-limit,
            zmid=0,
            zmax=limit,
            xgap=1 if n_columns <= 32 else 0,
            ygap=1 if n_columns <= 32 else 0,
            texttemplate="%{z:.2f}" if n_columns <= 12 else None,
            textfont={"size": 11},
            colorbar={
                "title": {"text": colorbar_title, "side": "top"},
                "thickness": 14,
                "outlinewidth": 0,
                "nticks": 5,
            },
        )
    )
    layout = _layout(title, height=round(80 + tall * n_rows + below))
    layout["margin"] |= {"l": margin, "b": below}
    figure.update_layout(**layout)
    figure.update_xaxes(
        range=[-0.5, n_columns - 0.5], tickvals=list(range(n_columns)), ticktext=[_cut(name) for name in across],
        tickangle=-90 if upright else 0, ticklabelstandoff=3, ticks="", tickfont={"size": _fitting(wide)},
        showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(
        range=[n_rows - 0.5, -0.5], tickvals=list(range(n_rows)), ticktext=[_cut(name) for name in labels],
        showgrid=False, ticks="", ticklabelstandoff=5, tickfont={"size": _fitting(tall)},
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
    z = _matrix(values)
    n_rows, n_columns = z.shape
    if z.numel() == 0:
        raise ValueError("relation_map: expected at least one row and one column, got an empty map.")
    if not bool(z.isfinite().all()):
        raise ValueError(f"relation_map: expected finite values, got {int((~z.isfinite()).sum())} NaN or infinite.")
    out = [False] * n_rows if excluded is None else [bool(flag) for flag in excluded]
    given = {"rows": (rows, n_rows), "columns": (columns, n_columns), "excluded": (out, n_rows)}
    given |= {} if notes is None else {"notes": (notes, n_rows)}
    for name, (items, wanted) in given.items():
        if len(items) != wanted:
            raise ValueError(
                f"relation_map: expected {wanted} {name} for the {n_rows} by {n_columns} map, got {len(items)}."
            )
    errors = None if stderr is None else _matrix(stderr)
    if errors is not None:
        if errors.shape != z.shape:
            raise ValueError(
                f"relation_map: expected stderr of the shape of values, {tuple(z.shape)}, got {tuple(errors.shape)}."
            )
        if not bool(((errors >= 0) & errors.isfinite()).all()):
            raise ValueError(f"relation_map: expected finite standard errors of at least 0, got {_extremes(errors)}.")
    if not 0 <= n_chosen <= n_columns:
        raise ValueError(f"relation_map: expected n_chosen in 0..{n_columns}, the number of columns, got {n_chosen}.")

    def text(row: int, column: int) -> str:
        line = f"{_plain(rows[row])}, {_plain(columns[column])}<br>{colorbar_title}: {z[row, column].item():+.3g}"
        if errors is not None:
            line += f" ± {errors[row, column].item():.2g} (standard error)"
        if notes is not None:
            line += f"<br>{_plain(notes[row])}"
        return line + ("<br>left out of the average" if out[row] else "")

    limit = z.abs().max().item() or 1.0
    margin = _label_margin(rows, 28)
    wide = (WIDTH - margin - 90) / n_columns
    tall = max(13.0, min(26.0, 420 / n_rows))
    upright = max(len(name) for name in columns) * _CHARACTER + 8 > wide
    below = 26 + (_label_margin(columns, 12) if upright else 30)
    figure = go.Figure(
        go.Heatmap(
            z=z.numpy(),
            x=list(range(n_columns)),
            y=list(range(n_rows)),
            hovertext=[[text(row, column) for column in range(n_columns)] for row in range(n_rows)],
            hoverinfo="text",
            colorscale=DIVERGING,
            zmin=-limit,
            zmid=0,
            zmax=limit,
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": colorbar_title, "side": "top"},
                "thickness": 14,
                "outlinewidth": 0,
                "nticks": 5,
                "lenmode": "pixels",
                "len": max(110, min(300, round(tall * n_rows))),
                "y": 1,
                "yanchor": "top",
            },
        )
    )
    said = [f"Left of the line: the chosen heads ({n_chosen})"] if n_chosen else []
    said += [f"grey ×: left out of the average ({sum(out)} of {n_rows})"] if any(out) else []
    if 0 < n_chosen < n_columns:
        figure.add_shape(
            type="line", yref="paper", x0=n_chosen - 0.5, x1=n_chosen - 0.5, y0=0, y1=1,
            line={"color": "black", "width": 2},
        )  # fmt: skip
    note = "; ".join(said)
    layout = _layout(
        title, height=round(72 + max(tall * n_rows, 110) + below), note=note[:1].upper() + note[1:] or None
    )
    layout["margin"] |= {"l": margin, "b": below}
    figure.update_layout(**layout)
    names = [
        f'<span style="color:{GREY}">× {_cut(name, 26)}</span>' if gone else _cut(name, 28)
        for name, gone in zip(rows, out, strict=True)
    ]
    figure.update_xaxes(
        title="Head, by its average", range=[-0.5 - n_columns / 500, n_columns - 0.5 + n_columns / 500],
        tickvals=list(range(n_columns)), ticktext=[_cut(name, 12) for name in columns],
        tickangle=-90 if upright else 0, ticklabelstandoff=3, ticks="", tickfont={"size": _fitting(wide)},
        showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(
        range=[n_rows - 0.5, -0.5], tickvals=list(range(n_rows)), ticktext=names, showgrid=False, ticks="",
        ticklabelstandoff=5, tickfont={"size": _fitting(tall)},
    )  # fmt: skip
    return figure


def decoded(
    words: Sequence[str],
    scores: Numbers,
    *,
    title: str = "Tokens the vector decodes to",
    x_title: str = "logit",
    highlighted: Sequence[str] = (),
) -> go.Figure:
    """Horizontal bars of tokens and their scores, the first on top, tokens quoted so that their spaces show.

    Args:
        words: the tokens as text, with their leading space.
        scores: score of each token, such as its logit.
        title: figure title.
        x_title: name of the score.
        highlighted: tokens in the accent colour, such as true answers; the others are muted. None named: all accented.

    Returns:
        The figure, as :func:`bars` makes it.

    Raises:
        ValueError: there are no words; words and scores differ in number; a score is not finite; a highlighted token is
            not one of the words.

    Example:
        >>> from fvlens.plots import decoded
        >>> list(decoded([" big", " small"], [7.1, 6.4]).layout.yaxis.ticktext)
        ["' big'", "' small'"]
    """
    values = _numbers("decoded", "scores", scores)
    _check_lengths("decoded", words=words, scores=values)
    unknown = [word for word in highlighted if word not in words]
    if unknown:
        raise ValueError(f"decoded: expected highlighted tokens among {_some(words)}, got {unknown[0]!r}.")
    quoted, bright = [repr(word) for word in words], [repr(word) for word in highlighted]
    return bars(quoted, values, title=title, x_title=x_title, highlighted=bright)


# Layout


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": GRID, "linecolor": GREY, "zeroline": False, "ticks": "outside", "tickcolor": GREY, "ticklen": 4,
        "title": {"standoff": 8, "font": {"size": 13}}, "tickfont": {"size": 12}, "automargin": True,
    }  # fmt: skip
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 12, "color": INK},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "colorway": [ACCENT, *REFERENCES],
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": PAPER,
                "bordercolor": GREY,
                "align": "left",
                "font": {"family": _FONT, "size": 12},
            },
        }
    )


def _layout(title: str, *, height: int, note: str | None = None) -> dict:
    """What all figures share: template, size, title with a small note under it."""
    lines = [
        _plain(line) for line in textwrap.wrap(title, 76)
    ]  # plotly draws the first of several lines 10 pixels higher
    heading: dict = {"text": "<br>".join(lines), "x": 20 / WIDTH, "xref": "container", "xanchor": "left", "y": 1}
    heading |= {
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": 14 if len(lines) < 2 else 24},
        "font": {"size": 16},
    }
    if note is not None:
        heading["subtitle"] = {"text": note, "font": {"size": 12, "color": GREY}}
    extra = 21 * max(0, len(lines) - 1)
    return {
        "template": _template(),
        "width": WIDTH,
        "height": height + extra,
        "margin": {"l": 64, "r": 24, "t": (48 if note is None else 72) + extra, "b": 56},
        "title": heading,
    }


def _plain(text: str) -> str:
    """Text as plotly must get it to show it unchanged."""
    return html.escape(text, quote=False)


def _lines(label: str, width: int = 32) -> str:
    """A label on at most two lines."""
    lines = textwrap.wrap(label, width, max_lines=2, placeholder="…") if len(label) > width else [label]
    return "<br>".join(_plain(line) for line in lines)


def _cut(label: str, most: int = 24) -> str:
    return _plain(label if len(label) <= most else f"{label[: most - 1]}…")


def _label_margin(labels: Sequence[str], most: int) -> int:
    """Pixels for the longest label, which is wrapped or cut at ``most`` characters."""
    return round(26 + _CHARACTER * min(most, max((len(label) for label in labels), default=0)))


def _fitting(cell: Number) -> int:
    """Font size for labels that are one cell apart."""
    return max(8, min(12, int(cell) - 1))


def _whole_ticks(n: int, most: int) -> dict:
    """Ticks at whole numbers, at most ``most`` of them."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, n + 1) if n / s <= max(most, 2) or s > n)
    return {"tickmode": "linear", "tick0": 0, "dtick": step}


def _thinned(x: Sequence[Number], inside: Number) -> list[Number]:
    """Tick positions at the data, without those whose label would touch the one before on ``inside`` pixels."""
    widest = max(len(_short(value)) for value in x)
    gap = (6 + _CHARACTER * widest) * (x[-1] - x[0]) / inside
    kept: list[Number] = []
    for value in x:
        if not kept or value - kept[-1] >= gap:
            kept.append(value)
    return kept


def _around(n: int, inside: Number) -> list[float]:
    """Axis range of n cells on ``inside`` pixels, with a pixel of room so that outlines at the edge are whole."""
    return [-0.5 - n / inside, n - 0.5 + n / inside]


def _reach(numbers: Sequence[Number], room: float) -> tuple[float, float]:
    """Ends of an axis that holds 0 and all numbers, with some room (a share of the range) beyond what is not 0."""
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    space = room * (high - low) or 1.0
    return low - (space if low < 0 else 0.0), high + (space if high > 0 or low == high else 0.0)


def _spread(levels: Sequence[Number], gap: float) -> list[float]:
    """The levels (0..1), moved apart until neighbours keep the gap; order and, where possible, places are kept."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    groups: list[list[Number]] = []  # centre and number of labels that touch
    for i in order:
        groups.append([levels[i], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            centre, n = groups.pop()
            groups[-1] = [(groups[-1][0] * groups[-1][1] + centre * n) / (groups[-1][1] + n), groups[-1][1] + n]
    placed = [centre + gap * (j - (n - 1) / 2) for centre, n in groups for j in range(int(n))]
    result = [0.0] * len(levels)
    for i, spot in zip(order, placed, strict=True):
        result[i] = spot
    return result


# Input


def _matrix(values: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    return values.detach().cpu().float()


def _numbers(function: str, name: str, values: Numbers, may_be_empty: bool = False) -> list[float]:
    flat = values.detach().cpu().double().tolist() if isinstance(values, Tensor) else list(values)
    if not may_be_empty and not flat:
        raise ValueError(f"{function}: expected at least one number in {name}, got none.")
    if any(isinstance(value, list) for value in flat):
        raise ValueError(f"{function}: expected {name} with one axis, got several.")
    bad = [value for value in flat if not math.isfinite(value)]
    if bad:
        raise ValueError(f"{function}: expected finite numbers in {name}, got {bad[0]}; leave such points out.")
    return [float(value) for value in flat]


def _intervals(
    function: str, low: Numbers | None, high: Numbers | None
) -> tuple[list[float] | None, list[float] | None]:
    if (low is None) != (high is None):
        raise ValueError(f"{function}: expected low and high together, got only {'low' if high is None else 'high'}.")
    if low is None or high is None:
        return None, None
    lows, highs = _numbers(function, "low", low), _numbers(function, "high", high)
    for i, (bottom, top) in enumerate(zip(lows, highs, strict=False)):
        if bottom > top:
            raise ValueError(f"{function}: expected low at most high, got low {bottom} and high {top} at index {i}.")
    return lows, highs


def _check_lengths(function: str, **data: Sequence | None) -> None:
    lengths = {name: len(values) for name, values in data.items() if values is not None}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{function}: expected data of one length, got {got}.")


def _extremes(values: Float[Tensor, "row column"]) -> str:
    return f"values from {values.nan_to_num(0.0).min().item():.4g} to {values.nan_to_num(0.0).max().item():.4g}"


def _short(value: Number) -> str:
    return f"{value:g}"


def _some(values: Sequence) -> str:
    shown = ", ".join(_short(value) if isinstance(value, float) else repr(value) for value in values[:8])
    return f"{shown}, ..." if len(values) > 8 else shown
