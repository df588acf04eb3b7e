"""Bars: labels with one number each."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from fvlens.plots._figure import drawn
from fvlens.plots._input import Number, Numbers, as_intervals, as_numbers, check_lengths, check_range, some
from fvlens.plots._style import REFERENCE_DASHES, label_margin, layout, look, on_lines, plain, reach, spread


@drawn
def bars(
    labels: Sequence[str],
    values: Numbers,
    low: Numbers | None = None,
    high: Numbers | None = None,
    *,
    x_title: str,
    title: str | None = "",
    highlighted: Sequence[str] = (),
    references: Mapping[str, Number] | None = None,
    x_range: tuple[Number, Number] | None = None,
    level: float = 0.95,
    signed: bool = False,
    note: str | None = None,
) -> go.Figure:
    """Horizontal bars with intervals and their values in figures, the first label on top.

    Args:
        labels: name of each bar.
        values: length of each bar.
        low: lower end of each interval; give ``low`` and ``high`` together.
        high: upper end of each interval.
        x_title: title of the value axis; also the name of the quantity in the hover text.
        title: figure title; None for none.
        highlighted: labels of the bars in the accent colour; the others are muted. None named: all accented.
        references: name and value of vertical lines to compare with.
        x_range: ends of the value axis; by default it holds 0 and everything drawn.
        level: of the intervals, said under the title.
        signed: numbers below 0 have a colour of their own, said under the title; for weights and effects.
        note: more to say under the title.

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

    size, colours = look().size, look().colours
    figure = go.Figure(
        _bar_trace(labels, lengths, lows, highs, x_title=x_title, highlighted=highlighted, signed=signed)
    )

    # the axis holds everything drawn, with room for the figures beyond the bars
    names = [on_lines(label) for label in labels]
    margin = max(label_margin([line for name in names for line in name.split("<br>")], size.label), 40)
    right = round(size.right * 1.25)
    inside = size.width - margin - right
    reached = [*lengths, *(lows or []), *(highs or []), *lines.values()]
    left_end, right_end = x_range or reach(reached, room=4.4 * size.text / inside)

    # each bar's value in figures, beyond its end or its whisker
    for row, value in enumerate(lengths):
        negative = value < 0
        end = value
        if lows is not None and highs is not None:
            end = min(value, lows[row]) if negative else highs[row]
        figure.add_annotation(
            x=end, y=row, text=f"{value:.3g}", showarrow=False, xanchor="right" if negative else "left",
            xshift=-5 if negative else 5, font={"size": size.text, "color": colours.ink}, bgcolor=colours.veil(0.75),
        )  # fmt: skip

    # reference lines, their names above the figure and moved apart; where they do not fit, one above the other
    levels = [(value - left_end) / (right_end - left_end) for value in lines.values()]
    texts = [f"{name} {value:.3g}" for name, value in lines.items()]
    widest = max(map(len, texts), default=0) * size.character
    stacked = (widest + 10) * len(lines) > inside + widest
    places = levels if stacked else spread(levels, (widest + 10) / inside)
    for i, (text, value, place) in enumerate(zip(texts, lines.values(), places, strict=True)):
        colour, dash = colours.references[i % len(colours.references)], REFERENCE_DASHES[i % len(REFERENCE_DASHES)]
        figure.add_shape(
            type="line", yref="paper", y0=0, y1=1, x0=value, x1=value,
            line={"color": colour, "width": 1.5, "dash": dash},
        )  # fmt: skip
        half = widest / 2 / inside
        figure.add_annotation(
            xref="paper", yref="paper", x=min(max(place, half), 1 - half) if stacked else place, y=1, yanchor="bottom",
            yshift=(size.line + 2) * i if stacked else 0, xanchor="center", showarrow=False, text=plain(text),
            font={"size": size.text, "color": colour},
        )  # fmt: skip
    above = (size.line + 2) * (len(lines) if stacked else min(1, len(lines)))

    row_height = max(32 * size.tall, max(name.count("<br>") + 1 for name in names) * size.line + 5, size.line + 8)
    said = [] if lows is None else [f"Whiskers: {level:.0%} interval of the mean"]
    said += ["blue: above 0, orange: below"] if signed and min(lengths) < 0 else []
    said += [note] if note else []
    shown = "; ".join(said)
    above_all = (size.above_note if said else size.above) + above
    shared = layout(
        title, height=round(above_all + size.below + 24 * size.tall + row_height * len(lengths)),
        note=shown[:1].upper() + shown[1:] or None, alt=_in_words(labels, lengths, lows, highs, x_title),
    )  # fmt: skip
    shared["margin"] |= {"l": margin, "r": right}
    shared["margin"]["t"] += above
    figure.update_layout(**shared)
    figure.update_xaxes(
        title=x_title, range=[left_end, right_end], zeroline=True, zerolinecolor=colours.grey,
        nticks=max(3, inside // 60),
    )  # fmt: skip
    figure.update_yaxes(
        range=[len(lengths) - 0.5, -0.5], tickvals=list(range(len(lengths))), ticktext=names, ticks="", showgrid=False,
        ticklabelstandoff=5,
    )  # fmt: skip
    return figure


def _in_words(
    labels: Sequence[str],
    lengths: Sequence[float],
    lows: Sequence[float] | None,
    highs: Sequence[float] | None,
    x_title: str,
) -> str:
    """What the bars show: the first of them with their intervals."""
    most = 12
    said = []
    for i, (label, value) in enumerate(zip(labels[:most], lengths, strict=False)):
        ends = "" if lows is None or highs is None else f" ({lows[i]:.3g} to {highs[i]:.3g})"
        said.append(f"{label} {value:.3g}{ends}")
    more = f", and {len(labels) - most} more" if len(labels) > most else ""
    return f"Bars of {x_title}: {', '.join(said)}{more}"


def _bar_trace(
    labels: Sequence[str],
    lengths: Sequence[float],
    lows: Sequence[float] | None,
    highs: Sequence[float] | None,
    *,
    x_title: str,
    highlighted: Sequence[str],
    signed: bool,
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
            "color": look().colours.ink, "thickness": 1.3, "width": 4,
        }  # fmt: skip
    bright, colours = set(highlighted) or set(labels), look().colours
    filled = [
        colours.negative if signed and value < 0 else colours.accent if label in bright else colours.muted
        for label, value in zip(labels, lengths, strict=True)
    ]
    return go.Bar(
        x=lengths, y=list(range(len(lengths))), orientation="h", marker={"color": filled}, error_x=whiskers,
        hovertext=hover, hoverinfo="text", showlegend=False, width=0.66,
    )  # fmt: skip


@drawn
def decoded(
    words: Sequence[str],
    scores: Numbers,
    *,
    title: str | None = "Tokens the vector decodes to",
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
