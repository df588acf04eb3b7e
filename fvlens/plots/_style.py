"""The house style: colours, the shared layout, and how labels find room on a figure that is 700 pixels wide."""

import html
import math
import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go

from fvlens.plots._input import Number, short

WIDTH = 700
"""Width of every figure, in pixels."""

INK, GREY, GRID, PAPER = "#222222", "#6b6b6b", "#e6e6e6", "#ffffff"
ACCENT = "#0072B2"
MUTED = "#9fb4c4"
REFERENCES = ("#D55E00", "#009E73", "#CC79A7", "#B8860B", "#555555", "#56B4E9")
"""Colours of reference lines; each also has its own dash."""

REFERENCE_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot", "5px,2px")

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

LINES = (
    (ACCENT, "solid", "circle"),
    ("#D55E00", "dash", "square"),
    ("#009E73", "dot", "diamond"),
    ("#CC79A7", "dashdot", "triangle-up"),
    ("#B8860B", "longdash", "cross"),
    ("#555555", "longdashdot", "x"),
)
"""Colour, dash and marker of the lines of one figure."""

CHARACTER = 6.6
"""Width of an average character of the 12-pixel font."""

_FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


# --- what all figures share ---


def layout(title: str, *, height: int, note: str | None = None) -> dict:
    """What all figures share: template, size, title with a small note under it."""
    lines = [plain(line) for line in textwrap.wrap(title, 76)]
    # plotly draws the first of several lines 10 pixels higher
    above = 14 if len(lines) < 2 else 24
    heading: dict = {"text": "<br>".join(lines), "x": 20 / WIDTH, "xref": "container", "xanchor": "left", "y": 1}
    heading |= {"yref": "container", "yanchor": "top", "pad": {"t": above}, "font": {"size": 16}}
    if note is not None:
        heading["subtitle"] = {"text": note, "font": {"size": 12, "color": GREY}}
    # each further line of the title pushes the figure down
    extra = 21 * max(0, len(lines) - 1)
    return {
        "template": _template(),
        "width": WIDTH,
        "height": height + extra,
        "margin": {"l": 64, "r": 24, "t": (48 if note is None else 72) + extra, "b": 56},
        "title": heading,
    }


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


# --- labels ---


def plain(text: str) -> str:
    """Text as plotly must get it to show it unchanged."""
    return html.escape(text, quote=False)


def on_two_lines(label: str, width: int = 32) -> str:
    """A label on at most two lines."""
    lines = textwrap.wrap(label, width, max_lines=2, placeholder="…") if len(label) > width else [label]
    return "<br>".join(plain(line) for line in lines)


def cut(label: str, most: int = 24) -> str:
    """A label of at most so many characters."""
    return plain(label if len(label) <= most else f"{label[: most - 1]}…")


def label_margin(labels: Sequence[str], most: int) -> int:
    """Pixels for the longest label, which is wrapped or cut at ``most`` characters."""
    return round(26 + CHARACTER * min(most, max((len(label) for label in labels), default=0)))


def legend_above(names: Sequence[str], inside: Number) -> tuple[dict, int]:
    """A legend above the figure, ``inside`` pixels wide, and its rows; each name has a sample before it."""
    entry = round(CHARACTER * max(map(len, names))) + 8
    n_rows = math.ceil(len(names) / max(1, inside // (entry + 46)))
    return {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "entrywidth": entry}, n_rows


def font_size(cell: Number) -> int:
    """Font size for labels that are one cell apart."""
    return max(8, min(12, int(cell) - 1))


def spread(levels: Sequence[Number], gap: float) -> list[float]:
    """The levels (0..1), moved apart until neighbours keep the gap; order and, where possible, places are kept."""
    order = sorted(range(len(levels)), key=levels.__getitem__)
    # from the lowest level up: one that comes too near joins the group below, which stays centred on its levels
    groups: list[list[Number]] = []  # centre and number of labels that touch
    for i in order:
        groups.append([levels[i], 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            centre, n = groups.pop()
            groups[-1] = [(groups[-1][0] * groups[-1][1] + centre * n) / (groups[-1][1] + n), groups[-1][1] + n]
    # the labels of a group stand one gap apart around its centre
    placed = [centre + gap * (j - (n - 1) / 2) for centre, n in groups for j in range(int(n))]
    in_given_order = [0.0] * len(levels)
    for i, place in zip(order, placed, strict=True):
        in_given_order[i] = place
    return in_given_order


# --- axes ---


def whole_ticks(n: int, most: int) -> dict:
    """Ticks at whole numbers, at most ``most`` of them."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, n + 1) if n / s <= max(most, 2) or s > n)
    return {"tickmode": "linear", "tick0": 0, "dtick": step}


def thinned(x: Sequence[Number], inside: Number) -> list[Number]:
    """Tick positions at the data, without those whose label would touch the one before on ``inside`` pixels."""
    widest = max(len(short(value)) for value in x)
    gap = (6 + CHARACTER * widest) * (x[-1] - x[0]) / inside
    kept: list[Number] = []
    for value in x:
        if not kept or value - kept[-1] >= gap:
            kept.append(value)
    return kept


def around(n: int, inside: Number) -> list[float]:
    """Axis range of n cells on ``inside`` pixels, with a pixel of room so that outlines at the edge are whole."""
    return [-0.5 - n / inside, n - 0.5 + n / inside]


def reach(numbers: Sequence[Number], room: float) -> tuple[float, float]:
    """Ends of an axis that holds 0 and all numbers, with some room (a share of the range) beyond what is not 0."""
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    space = room * (high - low) or 1.0
    return low - (space if low < 0 else 0.0), high + (space if high > 0 or low == high else 0.0)
