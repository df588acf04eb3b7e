"""How values show themselves: one line of text anywhere, and a small table in a notebook.

A class says what it is in :meth:`Shown._line`, and what belongs into its table in :meth:`Shown._cells`. Both are cheap:
they run whenever somebody looks at a value, so nothing is computed for them that is not there, and no figure is made.
"""

import html
import math
from collections.abc import Sequence

MOST_ROWS = 12
"""Rows of a table in a notebook; the rest is counted."""

MOST_CELLS = 400
"""Cells of a map in a notebook; a larger one is shown as its strongest cells."""

_STYLE = "border-collapse:collapse;font-size:0.9em"


class Shown:
    """A value that says in one line what it is, and shows a small table in a notebook."""

    __slots__ = ()

    def _line(self) -> str:
        """What stands in the brackets of the one line."""
        raise NotImplementedError

    def _cells(self) -> Sequence[Sequence[object]]:
        """The table: a row of headings, then its rows. Nothing for a value that one line says all of."""
        return ()

    def __repr__(self) -> str:
        """One line: what it is, its sizes, and its main number."""
        return f"{type(self).__name__}({' '.join(self._line().split())})"

    def _repr_html_(self) -> str:
        """A small table for notebooks, under the one line."""
        return table_html(repr(self), self._cells())


def named(relation: str) -> str:
    """A relation's name, for titles and lines."""
    return relation or "custom pairs"


def as_said(name: str) -> str:
    """A setting's name as people say it, for titles and tables.

    Example:
        >>> as_said("zero_shot"), as_said("icl")
        ('zero-shot', 'demonstrations')
    """
    said = {"icl": "demonstrations", "shuffled": "shuffled demonstrations"}
    return said.get(name, name.replace("_", "-"))


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for a table or a line; a dash for one that is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def span(low: float, high: float) -> str:
    """An interval for a table or a line."""
    return f"[{low:.3f}, {high:.3f}]"


def shortened(text: str, most: int = 40) -> str:
    """A text that may be long, cut for a line."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def table_html(caption: str, cells: Sequence[Sequence[object]]) -> str:
    """A caption and a table, escaped; of many rows the first ones, and how many are left."""
    said = f"<div><code>{html.escape(caption)}</code></div>"
    if not cells:
        return said
    heading, *rows = cells
    lines = [_row(heading, "th"), *(_row(row, "td") for row in rows[:MOST_ROWS])]
    if len(rows) > MOST_ROWS:
        lines.append(f'<tr><td colspan="{len(heading)}">and {len(rows) - MOST_ROWS} more</td></tr>')
    return f'{said}<table style="{_STYLE}">{"".join(lines)}</table>'


def map_html(caption: str, rows: Sequence[Sequence[float]], *, row: str, column: str) -> str:
    """A caption and a map: a cell a number, its colour from blue (negative) to red (positive); hover for the number.

    Args:
        caption: what stands over it.
        rows: the numbers.
        row, column: what a row and a column are, such as ``"layer"`` and ``"head"``.
    """
    largest = max((abs(value) for line in rows for value in line if math.isfinite(value)), default=0.0) or 1.0
    body = []
    for i, line in enumerate(rows):
        inner = "".join(
            _coloured(value, largest, f"{row} {i}, {column} {j}: {value:+.4g}") for j, value in enumerate(line)
        )
        body.append(f"<tr><th>{i}</th>{inner}</tr>")
    heading = "".join(f"<th>{j}</th>" for j in range(len(rows[0]) if rows else 0))
    return (
        f"<div><code>{html.escape(caption)}</code></div>"
        f'<table style="{_STYLE}"><tr><th>{html.escape(row)} \\ {html.escape(column)}</th>{heading}</tr>'
        f"{''.join(body)}</table>"
    )


def _coloured(value: float, largest: float, title: str) -> str:
    share = min(1.0, abs(value) / largest) if math.isfinite(value) else 0.0
    red, green, blue = (178, 24, 43) if value > 0 else (33, 102, 172)
    return f'<td title="{html.escape(title)}" style="background:rgba({red},{green},{blue},{share:.2f})">&nbsp;</td>'


def _row(cells: Sequence[object], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
