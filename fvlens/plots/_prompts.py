"""How a quantity is spread over prompts: a dot a prompt, a row a head."""

from collections.abc import Sequence

import plotly.graph_objects as go

from fvlens.plots._figure import drawn
from fvlens.plots._input import Numbers, as_numbers, check_lengths
from fvlens.plots._style import faded, label_margin, layout, look, on_lines, plain, reach

_WIDTH = 1.96
"""Standard errors on either side of a mean that hold 95% of a normal distribution."""

_GOLDEN = 0.6180339887
"""Its multiples, their whole parts taken away, spread evenly: dots of equal value do not hide each other."""


@drawn
def distribution(
    labels: Sequence[str],
    samples: Sequence[Numbers],
    *,
    x_title: str,
    title: str | None = "",
    point: str = "prompt",
) -> go.Figure:
    """Rows of dots, a dot a prompt, with the row's mean and its 95% interval; the first label on top.

    Args:
        labels: name of each row, such as a head.
        samples: the numbers of each row.
        x_title: title of the value axis; also the name of the quantity in the hover text.
        title: figure title; None for none.
        point: what a dot is.

    Returns:
        The figure. Dots are the first trace, means the second. Intervals are 1.96 standard errors on either side, and
        there is none of a single number.

    Raises:
        ValueError: there are no rows; a row is empty; labels and rows differ in number; a number is not finite.

    Example:
        >>> from fvlens.plots import distribution
        >>> figure = distribution(["L1H0"], [[0.1, 0.3]], x_title="effect")
        >>> figure.data[1].hovertext[0]
        'L1H0, mean of 2<br>effect: +0.2<br>95% interval: +0.004 to +0.396'
    """
    if not labels:
        raise ValueError("distribution: expected at least one row, got none.")
    check_lengths("distribution", labels=labels, samples=samples)
    rows = [as_numbers("distribution", f"the row of {label}", row) for label, row in zip(labels, samples, strict=True)]
    size, colours = look().size, look().colours
    means = [sum(row) / len(row) for row in rows]
    halves = [_half(row, mean) for row, mean in zip(rows, means, strict=True)]

    figure = go.Figure(
        go.Scatter(
            x=[value for row in rows for value in row],
            y=[i + 0.56 * (k * _GOLDEN % 1 - 0.5) for i, row in enumerate(rows) for k in range(len(row))],
            mode="markers",
            marker={"size": size.mark - 1, "color": faded(colours.accent, 0.45)},
            hovertext=[
                f"{plain(label)}, {point} {k}<br>{x_title}: {value:+.4g}"
                for label, row in zip(labels, rows, strict=True)
                for k, value in enumerate(row)
            ],
            hoverinfo="text",
            showlegend=False,
            cliponaxis=False,
        )
    )
    figure.add_trace(
        go.Scatter(
            x=means,
            y=list(range(len(rows))),
            mode="markers",
            marker={
                "size": size.mark + 2, "symbol": "diamond", "color": colours.ink,
                "line": {"color": colours.paper, "width": 1},
            },
            error_x={
                "type": "data", "array": [half or 0.0 for half in halves], "color": colours.ink, "thickness": 1.6,
                "width": 4,
            },
            hovertext=[
                f"{plain(label)}, mean of {len(row)}<br>{x_title}: {mean:+.4g}"
                + ("" if half is None else f"<br>95% interval: {mean - half:+.4g} to {mean + half:+.4g}")
                for label, row, mean, half in zip(labels, rows, means, halves, strict=True)
            ],
            hoverinfo="text",
            showlegend=False,
        )
    )  # fmt: skip
    names = [on_lines(label) for label in labels]
    margin = max(label_margin([line for name in names for line in name.split("<br>")], size.label), 40)
    said = ", ".join(f"{label} {mean:+.3g}" for label, mean in zip(labels[:12], means, strict=False))
    several = any(half is not None for half in halves)
    shared = layout(
        title,
        height=size.above_note + size.below + round((34 * size.tall + 4) * len(rows) + 14 * size.tall),
        note=f"A dot a {point}; diamond: mean{', with its 95% interval' if several else ''}",
        alt=f"Dots of {x_title}, a row each with its mean: {said}",
    )
    shared["margin"] |= {"l": margin}
    figure.update_layout(**shared)
    low, high = reach([value for row in rows for value in row], room=0.03)
    figure.update_xaxes(
        title=x_title, range=[low, high], zeroline=True, zerolinecolor=colours.grey,
        nticks=max(3, (size.width - margin) // 60),
    )  # fmt: skip
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5], tickvals=list(range(len(rows))), ticktext=names, ticks="", showgrid=False,
        ticklabelstandoff=5,
    )  # fmt: skip
    return figure


def _half(row: Sequence[float], mean: float) -> float | None:
    """Half the width of a mean's 95% interval; None of a single number."""
    if len(row) < 2:
        return None
    spread = sum((value - mean) ** 2 for value in row) / (len(row) - 1)
    return _WIDTH * (spread / len(row)) ** 0.5
