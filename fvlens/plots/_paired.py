"""Two numbers of each thing, side by side: before and after."""

from collections.abc import Sequence

import plotly.graph_objects as go

from fvlens.plots._figure import drawn
from fvlens.plots._input import Numbers, as_numbers, check_lengths
from fvlens.plots._style import label_margin, layout, legend_above, look, on_lines, plain, reach


@drawn
def paired_bars(
    labels: Sequence[str],
    before: Numbers,
    after: Numbers,
    *,
    names: tuple[str, str] = ("without the vector", "with the vector"),
    x_title: str = "probability",
    title: str | None = "",
    note: str | None = None,
) -> go.Figure:
    """Two horizontal bars for each label, the first label on top: before in grey, after in colour.

    Args:
        labels: of the pairs, such as next tokens.
        before, after: the numbers.
        names: what they are, for the legend.
        x_title: title of the value axis.
        title: figure title; None for none.
        note: a line under it.

    Returns:
        The figure; its first trace is before, its second after.

    Raises:
        ValueError: there are no labels; the data differ in length; a number is not finite.

    Example:
        >>> from fvlens.plots import paired_bars
        >>> figure = paired_bars([" small"], [0.1], [0.75])
        >>> [trace.hovertext[0] for trace in figure.data]
        [' small<br>without the vector: 0.1', ' small<br>with the vector: 0.75']
    """
    both = [as_numbers("paired_bars", name, values) for name, values in (("before", before), ("after", after))]
    check_lengths("paired_bars", labels=labels, before=both[0], after=both[1])
    size, colours = look().size, look().colours
    figure = go.Figure()
    for values, name, colour, shift in zip(both, names, (colours.muted, colours.accent), (-0.2, 0.2), strict=True):
        figure.add_trace(
            go.Bar(
                x=values, y=[i + shift for i in range(len(values))], orientation="h", width=0.36, name=plain(name),
                marker={"color": colour}, hoverinfo="text", text=[f"{value:.3f}" for value in values],
                textposition="outside", cliponaxis=False, textfont={"size": max(size.least, size.text - 1)},
                hovertext=[f"{plain(label)}<br>{name}: {x:.4g}" for label, x in zip(labels, values, strict=True)],
            )
        )  # fmt: skip
    shown = [on_lines(label) for label in labels]
    margin = max(label_margin([line for one in shown for line in one.split("<br>")], size.label), 40)
    right = round(size.right * 1.25)
    inside = size.width - margin - right
    legend, n_rows = legend_above(names, inside)
    above = (size.line + 4) * n_rows + 6
    said = ", ".join(f"{label} {a:.3g} to {b:.3g}" for label, a, b in zip(labels[:12], *both, strict=False))
    shared = layout(
        title, note=note, alt=f"Bars of {x_title}, {names[0]} and {names[1]}: {said}",
        height=(size.above_note if note else size.above) + above + size.below + (2 * size.line + 8) * len(labels),
    )  # fmt: skip
    shared["margin"] |= {"l": margin, "r": right, "t": shared["margin"]["t"] + above}
    figure.update_layout(**shared, barmode="overlay", legend=legend)
    figure.update_xaxes(
        title=x_title, range=list(reach([*both[0], *both[1]], room=4.0 * size.text / inside)), zeroline=True,
        zerolinecolor=colours.grey, nticks=max(3, inside // 60),
    )  # fmt: skip
    return figure.update_yaxes(
        range=[len(labels) - 0.5, -0.5], tickvals=list(range(len(labels))), ticktext=shown, ticks="", showgrid=False,
        ticklabelstandoff=5,
    )  # fmt: skip
