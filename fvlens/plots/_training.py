"""A training over its epochs, in panels."""

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fvlens.plots._figure import drawn
from fvlens.plots._input import Numbers, as_list, as_numbers, check_lengths
from fvlens.plots._style import layout, look, reach, whole_ticks


@drawn
def training_curves(
    *,
    train_loss: Numbers,
    valid_loss: Numbers,
    valid_top1: Numbers,
    norm: Numbers,
    cosine: Numbers,
    marked: int,
    title: str | None = "Training",
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
    quantities = {
        "Loss": {"training pairs": train_loss, "validation pairs": valid_loss},
        "Validation top-1": {"validation top-1": valid_top1},
        "Norm": {"norm": norm},
        "Cosine to the start": {"cosine": cosine},
    }
    # a panel needs a line, and a line a number that is not NaN
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    by_name: dict[str, list] = {}
    for panel, lines in quantities.items():
        for name, values in lines.items():
            by_name[name] = as_list(values)
            points = [(epoch, value) for epoch, value in enumerate(by_name[name]) if not math.isnan(value)]
            if points:
                as_numbers("training_curves", name, [value for _, value in points])
                panels.setdefault(panel, {})[name] = points
    check_lengths("training_curves", **by_name)
    n_epochs = len(by_name["training pairs"])
    if not panels:
        raise ValueError("training_curves: expected at least one number that is not NaN, got none.")
    if not 0 <= marked < n_epochs:
        raise ValueError(f"training_curves: expected marked in 0..{n_epochs - 1}, got {marked}.")

    size, colours = look().size, look().colours
    n_columns = min(2 if look().width == "page" else 1, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = make_subplots(
        rows=n_rows, cols=n_columns, subplot_titles=list(panels), horizontal_spacing=0.11,
        vertical_spacing=(0.4 if n_columns > 1 else 0.36) / n_rows if n_rows > 1 else 0,
    )  # fmt: skip
    figure.update_annotations(font={"size": size.axis, "color": colours.ink}, yshift=2)
    # two lines in one panel need a legend; elsewhere the panel's title names the line
    in_legend = len(panels.get("Loss", ())) > 1
    for i, (panel, lines) in enumerate(panels.items()):
        row, col = i // n_columns + 1, i % n_columns + 1
        for name, points in lines.items():
            colour, dash, symbol = colours.lines[1 if name.startswith("validation") else 0]
            figure.add_trace(
                go.Scatter(
                    x=[epoch for epoch, _ in points], y=[value for _, value in points], name=name,
                    mode="lines+markers", line={"color": colour, "width": 2, "dash": dash},
                    marker={"size": 5, "symbol": symbol, "color": colour},
                    hovertext=[f"epoch {epoch}<br>{name}: {value:.4g}" for epoch, value in points], hoverinfo="text",
                    showlegend=in_legend and panel == "Loss", cliponaxis=False,
                ),
                row=row, col=col,
            )  # fmt: skip

        # all panels have the same epochs; top-1 is drawn on its whole range
        bottom, top = reach([value for points in lines.values() for _, value in points], room=0.08)
        if panel == "Validation top-1":
            bottom, top = 0.0, 1.04
        last = max(1, n_epochs - 1)
        figure.update_yaxes(range=[bottom, top], row=row, col=col)
        figure.update_xaxes(
            range=[-0.03 * last, 1.03 * last], showgrid=False, row=row, col=col, **whole_ticks(n_epochs, 12)
        )
        figure.add_shape(
            type="line", x0=marked, x1=marked, y0=bottom, y1=top, layer="below", row=row, col=col,
            line={"color": colours.grey, "width": 1.5, "dash": "dot"},
        )  # fmt: skip
        if i >= len(panels) - n_columns:
            figure.update_xaxes(title="Epoch", row=row, col=col)

    high = 190 if look().width == "page" else 150
    said = [
        f"{name}: from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for lines in panels.values()
        for name, points in lines.items()
    ]
    shared = layout(
        title, height=round(170 * size.tall) + high * n_rows, note=f"Dotted line: the epoch chosen, {marked}",
        alt=f"A training over {n_epochs - 1} epochs. {'; '.join(said)}",
    )  # fmt: skip
    # between the note and the panels' titles: a row for the legend
    above, row = shared["margin"]["t"], size.line + 6
    shared["margin"] |= {"t": above + row + size.line}
    shared["height"] += row
    figure.update_layout(
        **shared,
        legend={
            "orientation": "h", "x": 0, "xanchor": "left", "y": 1 - (above - 4) / shared["height"],
            "yref": "container", "yanchor": "top", "font": {"size": size.text},
        },
    )  # fmt: skip
    return figure
