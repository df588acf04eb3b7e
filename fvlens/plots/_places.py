"""Things in the plane, near where they are alike: a map of many vectors."""

from collections.abc import Sequence

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from fvlens.plots._figure import drawn
from fvlens.plots._input import as_matrix
from fvlens.plots._labels import with_room
from fvlens.plots._style import layout, legend_above, look, plain


@drawn
def place_map(
    places: Float[Tensor, "thing 2"],
    names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    title: str | None = "",
    note: str | None = None,
) -> go.Figure:
    """Things at their places, both axes on one scale and without numbers, since only distances mean something.

    Args:
        places: coordinates, such as :func:`fvlens.metrics.mds` gives.
        names: of the things; those are shown that have room, and hover texts name all.
        groups: of each thing, for its colour and marker; by default all are alike.
        title: figure title; None for none.
        note: a line under it, such as how the places were found.

    Returns:
        The figure, a trace a group, in the order of their first thing.

    Raises:
        ValueError: there are no things; names or groups differ from them in number; a coordinate is not finite.

    Example:
        >>> import torch
        >>> from fvlens.plots import place_map
        >>> figure = place_map(torch.tensor([[0.0, 1.0], [2.0, 0.5]]), ["antonym", "plural"])
        >>> [note.text for note in figure.layout.annotations]
        ['antonym', 'plural']
    """
    at = as_matrix(places)
    kinds = list(groups) if groups is not None else [""] * len(at)
    if not len(at) or {len(names), len(kinds)} != {len(at)}:
        raise ValueError(
            f"place_map: expected a name and a group for each of at least one place, got {len(at)} places, "
            f"{len(names)} names and {len(kinds)} groups."
        )
    if not bool(at.isfinite().all()):
        raise ValueError("place_map: expected finite places, got NaN or infinity among them.")
    size, colours = look().size, look().colours
    xs, ys = at[:, 0].tolist(), at[:, 1].tolist()
    figure = go.Figure()
    named = list(dict.fromkeys(kinds))
    for i, kind in enumerate(named):
        own = [k for k, group in enumerate(kinds) if group == kind]
        colour, _, symbol = colours.lines[i % len(colours.lines)]
        said = f"<br>{plain(kind)}" if kind else ""
        # where there are more groups than colours, they come again as rings
        figure.add_trace(
            go.Scatter(
                x=[xs[k] for k in own], y=[ys[k] for k in own], mode="markers", name=plain(kind) or "others",
                marker={
                    "size": size.mark + 2, "color": colour,
                    "line": {"width": 1, "color": colours.paper if i < len(colours.lines) else colour},
                    "symbol": symbol + ("-open" if i >= len(colours.lines) else ""),
                },
                hovertext=[f"{plain(names[k])}{said}" for k in own], hoverinfo="text", cliponaxis=False,
                showlegend=groups is not None,
            )
        )  # fmt: skip

    # a frame that holds all, as wide as high as the data are; names may reach into its margin
    inside = size.width - 2 * size.right
    span_x, span_y = max(xs) - min(xs), max(ys) - min(ys)
    room = 0.1 * (max(span_x, span_y) or 1.0)
    unit = inside / (span_x + 2 * room)
    high = min(max((span_y + 2 * room) * unit, 0.4 * inside), 1.1 * inside)
    unit = min(unit, high / (span_y + 2 * room))
    half_x, half_y = inside / unit / 2, high / unit / 2
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    small = max(size.least, size.text - 1)
    marks = [(x * unit, y * unit) for x, y in zip(xs, ys, strict=True)]
    # the outermost first: what lies alone at the rim is what one looks for
    order = sorted(range(len(xs)), key=lambda k: -((xs[k] - middle_x) ** 2) - (ys[k] - middle_y) ** 2)
    for k, dx, dy, side in with_room(
        marks, names, order, letter=0.57 * small, high=small + 2,
        ends=((middle_x - half_x) * unit, (middle_x + half_x) * unit),
        levels=((middle_y - half_y) * unit, (middle_y + half_y) * unit),
    ):  # fmt: skip
        figure.add_annotation(
            x=xs[k], y=ys[k], xshift=dx, yshift=dy, xanchor=side, yanchor="middle", showarrow=False,
            text=plain(names[k]), font={"size": small, "color": colours.ink}, borderpad=0,
        )  # fmt: skip
    legend, n_rows = legend_above([name or "others" for name in named], inside)
    legend["y"] = 1 + 5 / high  # clear of the frame
    above = (size.line + 4) * n_rows + 10 if groups is not None else 0
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    shared = layout(
        title, height=(size.above_note if note else size.above) + above + round(high) + size.right, note=note,
        alt=f"Map of {len(names)} things by their distances: {shown}",
    )  # fmt: skip
    shared["margin"] |= {"l": size.right, "r": size.right, "b": size.right, "t": shared["margin"]["t"] + above}
    figure.update_layout(**shared, legend=legend, showlegend=groups is not None)
    bare = {
        "showgrid": False,
        "showticklabels": False,
        "ticks": "",
        "zeroline": False,
        "mirror": True,
        "showline": True,
    }
    figure.update_xaxes(range=[middle_x - half_x, middle_x + half_x], linecolor=colours.grid, **bare)
    return figure.update_yaxes(range=[middle_y - half_y, middle_y + half_y], linecolor=colours.grid, **bare)
