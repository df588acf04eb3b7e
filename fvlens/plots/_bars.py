"""Bars: labels with one number each."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from fvlens.plots._input import Number, Numbers, as_intervals, as_numbers, check_lengths, check_range, some
from fvlens.plots._style import (
    ACCENT,
    CHARACTER,
    GREY,
    INK,
    MUTED,
    REFERENCE_DASHES,
    REFERENCES,
    WIDTH,
    label_margin,
    layout,
    on_two_lines,
    plain,
    reach,
    spread,
)


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
    lengths = as_numbers("bars", "values", values)
    lows, highs = as_intervals("bars", low, high)
    check_lengths("bars", labels=labels, values=lengths, low=lows, high=highs)
    unknown = [label for label in highlighted if label not in labels]
    if unknown:
        raise ValueError(f"bars: expected highlighted labels among {some(labels)}, got {unknown[0]!r}.")
    check_range("bars", "x_range", x_range)
    lines = dict(references or {})
    as_numbers("bars", "references", list(lines.values()), may_be_empty=True)

    figure = go.Figure(_bar_trace(labels, lengths, lows, highs, x_title=x_title, highlighted=highlighted))

    # the axis holds everything drawn, with room for the figures beyond the bars
    margin = max(label_margin(labels, 33), 40)
    inside = WIDTH - margin - 30
    drawn = [*lengths, *(lows or []), *(highs or []), *lines.values()]
    left_end, right_end = x_range or reach(drawn, room=52 / inside)

    # each bar's value in figures, beyond its end or its whisker
    for row, value in enumerate(lengths):
        negative = value < 0
        end = value
        if lows is not None and highs is not None:
            end = min(value, lows[row]) if negative else highs[row]
        figure.add_annotation(
            x=end, y=row, text=f"{value:.3g}", showarrow=False, xanchor="right" if negative else "left",
            xshift=-5 if negative else 5, font={"size": 12, "color": INK}, bgcolor="rgba(255, 255, 255, 0.75)",
        )  # fmt: skip

    # reference lines, their names above the figure and moved apart
    levels = [(value - left_end) / (right_end - left_end) for value in lines.values()]
    widest = max((len(f"{name} {value:.3g}") for name, value in lines.items()), default=0) * CHARACTER
    places = spread(levels, (widest + 10) / inside)
    for i, ((name, value), place) in enumerate(zip(lines.items(), places, strict=True)):
        colour, dash = REFERENCES[i % len(REFERENCES)], REFERENCE_DASHES[i % len(REFERENCE_DASHES)]
        figure.add_shape(
            type="line", yref="paper", y0=0, y1=1, x0=value, x1=value,
            line={"color": colour, "width": 1.5, "dash": dash},
        )  # fmt: skip
        figure.add_annotation(
            xref="paper", yref="paper", x=place, y=1, yanchor="bottom", xanchor="center", showarrow=False,
            text=f"{plain(name)} {value:.3g}", font={"size": 12, "color": colour},
        )  # fmt: skip

    note = None if lows is None else "Whiskers: interval of the mean"
    shared = layout(title, height=round(140 + 32 * len(lengths) + (18 if lines else 0)), note=note)
    shared["margin"] |= {"l": margin, "r": 30}
    shared["margin"]["t"] += 18 if lines else 0
    figure.update_layout(**shared)
    figure.update_xaxes(title=x_title, range=[left_end, right_end], zeroline=True, zerolinecolor=GREY)
    figure.update_yaxes(
        range=[len(lengths) - 0.5, -0.5], tickvals=list(range(len(lengths))),
        ticktext=[on_two_lines(label) for label in labels], ticks="", showgrid=False, ticklabelstandoff=5,
    )  # fmt: skip
    return figure


def _bar_trace(
    labels: Sequence[str],
    lengths: Sequence[float],
    lows: Sequence[float] | None,
    highs: Sequence[float] | None,
    *,
    x_title: str,
    highlighted: Sequence[str],
) -> go.Bar:
    """The bars with their whiskers and hover texts."""
    hover = [f"{plain(label)}<br>{x_title}: {value:.4g}" for label, value in zip(labels, lengths, strict=True)]
    whiskers = None
    if lows is not None and highs is not None:
        hover = [
            f"{line}<br>interval: {bottom:.4g} to {top:.4g}"
            for line, bottom, top in zip(hover, lows, highs, strict=True)
        ]
        # an interval may lie beside its value: a whisker never points back into the bar
        whiskers = {
            "type": "data", "symmetric": False,
            "array": [max(0.0, top - value) for top, value in zip(highs, lengths, strict=True)],
            "arrayminus": [max(0.0, value - bottom) for bottom, value in zip(lows, lengths, strict=True)],
            "color": INK, "thickness": 1.3, "width": 4,
        }  # fmt: skip
    bright = set(highlighted) or set(labels)
    return go.Bar(
        x=lengths, y=list(range(len(lengths))), orientation="h",
        marker={"color": [ACCENT if label in bright else MUTED for label in labels]}, error_x=whiskers, hovertext=hover,
        hoverinfo="text", showlegend=False, width=0.66,
    )  # fmt: skip


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
    values = as_numbers("decoded", "scores", scores)
    check_lengths("decoded", words=words, scores=values)
    unknown = [word for word in highlighted if word not in words]
    if unknown:
        raise ValueError(f"decoded: expected highlighted tokens among {some(words)}, got {unknown[0]!r}.")
    quoted, bright = [repr(word) for word in words], [repr(word) for word in highlighted]
    return bars(quoted, values, title=title, x_title=x_title, highlighted=bright)
