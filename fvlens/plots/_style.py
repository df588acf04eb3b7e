"""The house style: sizes, colours in light and dark, the shared layout, and how labels find room.

A figure function asks :func:`look` how wide the figure is and which colours it has, and lays itself out for that.
"""

import contextlib
import html
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import plotly.graph_objects as go
import plotly.io

from fvlens.plots._input import Number, short

Width = Literal["page", "column"]
ThemeName = Literal["light", "dark"]
Scale = tuple[tuple[float, str], ...]
"""A colour scale of plotly: places from 0 to 1, and their colours."""


# --- sizes ---


@dataclass(frozen=True, slots=True)
class Size:
    """How large a figure and its type are, in pixels of 1/96 inch.

    Attributes:
        width: of the figure.
        text, axis, heading, least: of labels and notes, titles of axes, the figure's title, and the smallest label.
        tall: factor on the height of what is drawn.
        label: characters of a label in one line.
        left, right, below: margins where nothing asks for more.
        above, above_note: margins above, without and with a note under the title.
        title: characters of the title in one line.
        note: characters of a note in one line.
    """

    width: int
    text: int
    axis: int
    heading: int
    least: int
    tall: float
    label: int
    left: int
    right: int
    below: int
    above: int
    above_note: int
    title: int
    note: int

    @property
    def character(self) -> float:
        """Width of an average character of a label."""
        return 0.55 * self.text

    @property
    def stroke(self) -> float:
        """Width of a line."""
        return 2.5 * self.tall**0.5

    @property
    def mark(self) -> int:
        """Size of a marker on a line."""
        return 7 if self.tall == 1 else 5

    @property
    def line(self) -> int:
        """Height of a line of labels."""
        return round(1.35 * self.text)

    def high(self, pixels: Number) -> int:
        """The height of what takes so many pixels on a page."""
        return round(self.tall * pixels)


SIZES: dict[Width, Size] = {
    "page": Size(
        width=700, text=12, axis=13, heading=16, least=8, tall=1.0, label=33, left=64, right=24, below=56, above=48,
        above_note=72, title=76, note=104,
    ),
    # 3.3 inches: 10 pixels are 7.5 points, 9 are 6.75
    "column": Size(
        width=317, text=10, axis=10, heading=12, least=9, tall=0.6, label=17, left=46, right=12, below=42, above=30,
        above_note=56, title=46, note=57,
    ),
}  # fmt: skip
"""Of a figure across a page, and of one in a column of a paper, 3.3 inches wide."""

WIDTH = SIZES["page"].width
"""Width of a figure across a page, in pixels."""

CHARACTER = SIZES["page"].character
"""Width of an average character of a label there."""


# --- colours ---


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a figure.

    Attributes:
        ink, grey, grid, paper: of text and outlines, of notes and axes, of grid lines, of what is behind.
        outline: name of the ink, for notes.
        accent, muted: of what is shown, and of what stands beside it.
        negative: of numbers below 0 where :attr:`accent` is that of numbers above.
        lines: colour, dash and marker of the lines of one figure.
        references: colours of reference lines; each also has its own dash.
        diverging: from the lowest number to the highest, 0 in the middle.
        sequential: from 0 to the largest.
    """

    ink: str
    grey: str
    grid: str
    paper: str
    outline: str
    accent: str
    muted: str
    negative: str
    lines: tuple[tuple[str, str, str], ...]
    references: tuple[str, ...]
    diverging: Scale
    sequential: Scale

    def veil(self, share: float) -> str:
        """The paper's colour over what is drawn, so that a text on it can be read."""
        return faded(self.paper, share)


def faded(colour: str, share: float) -> str:
    """A colour that lets some of what is behind it through."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {share})"


_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def _lines(*colours: str) -> tuple[tuple[str, str, str], ...]:
    return tuple(zip(colours, _DASHES, _MARKERS, strict=True))


def _even(*colours: str) -> Scale:
    return tuple((i / (len(colours) - 1), colour) for i, colour in enumerate(colours))


THEMES: dict[ThemeName, Theme] = {
    # colours of Okabe and Ito, a wine of Tol's and ink in place of those that are too pale for lines on white; the
    # diverging scale is ColorBrewer's RdBu without its darkest ends, so that a black outline shows on every cell
    "light": Theme(
        ink="#222222", grey="#6b6b6b", grid="#e6e6e6", paper="#ffffff", outline="black", accent="#0072B2",
        muted="#9fb4c4", negative="#D55E00",
        lines=_lines("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#882255", "#222222"),
        references=("#D55E00", "#009E73", "#CC79A7", "#882255", "#222222", "#56B4E9"),
        diverging=_even(
            "#B2182B", "#D6604D", "#F4A582", "#FDDBC7", "#F7F7F7", "#D1E5F0", "#92C5DE", "#4393C3", "#2166AC"
        ),
        sequential=_even("#F7F7F7", "#92C5DE", "#2166AC"),
    ),
    # the same hues, lighter; the scale is darkest at 0, as the paper is
    "dark": Theme(
        ink="#e8e8e8", grey="#a6a6a6", grid="#3a3a3a", paper="#1b1b1b", outline="white", accent="#56B4E9",
        muted="#5b7285", negative="#F0803C",
        lines=_lines("#56B4E9", "#F0803C", "#009E73", "#E3A1C6", "#F0E442", "#ffffff"),
        references=("#F0803C", "#009E73", "#E3A1C6", "#F0E442", "#ffffff", "#2E8FD0"),
        diverging=_even(
            "#FFA58A", "#E0654F", "#A33A35", "#5C2B2B", "#2b2b2b", "#213D55", "#28618F", "#3F92CC", "#8CCBF5"
        ),
        sequential=_even("#2b2b2b", "#28618F", "#8CCBF5"),
    ),
}  # fmt: skip

_LIGHT = THEMES["light"]
INK, GREY, GRID, PAPER, ACCENT, MUTED = (
    _LIGHT.ink, _LIGHT.grey, _LIGHT.grid, _LIGHT.paper, _LIGHT.accent, _LIGHT.muted,
)  # fmt: skip
"""Colours of the light theme."""
REFERENCES, LINES, DIVERGING, SEQUENTIAL = _LIGHT.references, _LIGHT.lines, _LIGHT.diverging, _LIGHT.sequential
"""Colours of the light theme."""

REFERENCE_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot", "5px,2px")

_FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


# --- the look of the figures that are being made ---


@dataclass(frozen=True, slots=True)
class Look:
    """How a figure is to look.

    Attributes:
        width: ``"page"`` (700 pixels) or ``"column"`` (3.3 inches at 96 pixels an inch).
        theme: ``"light"`` or ``"dark"``.
        title: instead of the figure's own, None for none; ``...`` for its own.
    """

    width: Width = "page"
    theme: ThemeName = "light"
    title: str | EllipsisType | None = ...

    def __post_init__(self) -> None:
        for name, value, known in (("width", self.width, SIZES), ("theme", self.theme, THEMES)):
            if value not in known:
                raise ValueError(f"figure: {name}={value!r}; expected one of {', '.join(map(repr, known))}.")

    @property
    def size(self) -> Size:
        return SIZES[self.width]

    @property
    def colours(self) -> Theme:
        return THEMES[self.theme]


_LOOK: ContextVar[Look] = ContextVar("look of figures", default=Look())  # noqa: B039


def look() -> Look:
    """The look of figures that are made now."""
    return _LOOK.get()


@contextlib.contextmanager
def looking(width: Width = "page", theme: ThemeName = "light") -> Iterator[None]:
    """Figures that are made in this block have this look.

    Example:
        >>> from fvlens.plots import bars, looking
        >>> with looking(width="column"):
        ...     figure = bars(["no vector", "vector"], [0.2, 0.9], x_title="Top-1")
        >>> figure.layout.width
        317
    """
    with as_look(Look(width, theme)):
        yield


@contextlib.contextmanager
def as_look(wanted: Look) -> Iterator[None]:
    """Figures that are made in this block have this look."""
    token = _LOOK.set(wanted)
    try:
        yield
    finally:
        _LOOK.reset(token)


# --- what all figures share ---


def layout(title: str | None, *, height: int, note: str | None = None, alt: str = "") -> dict[str, Any]:
    """What all figures share: template, size, title with a small note under it, and a text for who sees no picture.

    Args:
        title: the title; None or an empty one gives its room back.
        height: of the whole figure with a title of one line and, if there is a note, a note of one line.
        note: a small line under the title.
        alt: what the figure shows, in words.
    """
    shown, size = look(), look().size
    said = ". ".join(part.rstrip(".") for part in (title, alt) if part)
    if not isinstance(shown.title, EllipsisType):
        title = shown.title
    lines = [plain(line) for line in textwrap.wrap(title or "", size.title, break_on_hyphens=False)]
    notes = textwrap.wrap(note or "", size.note, break_on_hyphens=False)
    # plotly draws the first of several lines higher
    above = round(size.heading * (0.875 if len(lines) < 2 else 1.5))
    text, font = "<br>".join(lines), {"size": size.heading}
    if notes and not lines:
        text, font, above = "<br>".join(notes), {"size": size.text, "color": shown.colours.grey}, size.text
    heading: dict[str, Any] = {"text": text, "x": size.left / 3.2 / size.width, "xref": "container", "xanchor": "left"}
    heading |= {"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": above}, "font": font}
    if notes and lines:
        heading["subtitle"] = {"text": "<br>".join(notes), "font": {"size": size.text, "color": shown.colours.grey}}
    # each further line pushes the figure down, a title that there is not gives its room
    extra = round(1.3 * size.heading) * (len(lines) - 1 if lines else -1)
    extra += size.line * max(0, len(notes) - 1)
    return {
        "template": template(shown),
        "width": size.width,
        "height": height + extra,
        "margin": {
            "l": size.left, "r": size.right, "t": (size.above_note if notes else size.above) + extra, "b": size.below,
        },
        "title": heading,
        "meta": {"alt": said},
    }  # fmt: skip


def template(shown: Look) -> go.layout.Template:
    """What all figures of a look share, as plotly's templates are."""
    size, colours = shown.size, shown.colours
    axis = {
        "gridcolor": colours.grid, "linecolor": colours.grey, "zeroline": False, "ticks": "outside",
        "tickcolor": colours.grey, "ticklen": 4, "title": {"standoff": 8, "font": {"size": size.axis}},
        "tickfont": {"size": size.text}, "automargin": True,
    }  # fmt: skip
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": size.text, "color": colours.ink},
            "paper_bgcolor": colours.paper,
            "plot_bgcolor": colours.paper,
            "colorway": [colours.accent, *colours.references],
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": colours.paper,
                "bordercolor": colours.grey,
                "align": "left",
                "font": {"family": _FONT, "size": 12, "color": colours.ink},
            },
        }
    )


# registered once, for figures of the user's own: go.Figure(layout={"template": "fvlens"})
for _theme in THEMES:
    plotly.io.templates["fvlens" if _theme == "light" else f"fvlens-{_theme}"] = template(Look(theme=_theme))


# --- labels ---


def plain(text: str) -> str:
    """Text as plotly must get it to show it unchanged."""
    return html.escape(text, quote=False)


def on_lines(label: str, width: int | None = None) -> str:
    """A label on at most two lines, in a column on three."""
    size = look().size
    width = size.label - 1 if width is None else width
    most = 2 if look().width == "page" else 3
    lines = textwrap.wrap(label, width, max_lines=most, placeholder="…") if len(label) > width else [label]
    return "<br>".join(plain(line) for line in lines)


def cut(label: str, most: int = 24) -> str:
    """A label of at most so many characters; what is left out is its middle, since names often differ in their end."""
    if len(label) <= most:
        return plain(label)
    end = (most - 1) // 2
    return plain(f"{label[: most - 1 - end]}…{label[-end:]}")


def names_most(most: int) -> int:
    """Characters of a name beside or below a map: so many on a page, fewer in a column."""
    return most if look().width == "page" else min(most, 16)


def label_margin(labels: Sequence[str], most: int) -> int:
    """Pixels for the longest label, which is wrapped or cut at ``most`` characters."""
    size = look().size
    room = 26 if look().width == "page" else 16
    return round(room + size.character * min(most, max((len(label) for label in labels), default=0)))


def legend_above(names: Sequence[str], inside: Number) -> tuple[dict, int]:
    """A legend above the figure, ``inside`` pixels wide, and its rows; each name has a sample before it."""
    entry = round(look().size.character * max(map(len, names))) + 8
    n_rows = math.ceil(len(names) / max(1, inside // (entry + 46)))
    return {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "entrywidth": entry}, n_rows


def font_size(cell: Number) -> int:
    """Font size for labels that are one cell apart."""
    size = look().size
    return max(size.least, min(size.text, int(cell) - 1))


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
    gap = (6 + look().size.character * widest) * (x[-1] - x[0]) / inside
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
