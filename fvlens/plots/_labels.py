"""Names beside marks, where they have room."""

import math
from collections.abc import Sequence

from fvlens.plots._input import Number

Box = tuple[float, float, float, float]
"""Left, right, lower and upper end."""


def with_room(
    marks: Sequence[tuple[float, float]],
    names: Sequence[str],
    order: Sequence[int],
    *,
    letter: float,
    ends: tuple[float, float],
    levels: tuple[float, float] = (float("-inf"), float("inf")),
    others: Sequence[tuple[float, float]] = (),
    half: tuple[float, float] = (5.0, 5.0),
    high: Number = 12,
) -> list[tuple[int, int, int, str]]:
    """Which marks are named, and where: on the right, left, above or below, touching no mark and no other name.

    Args:
        marks: centres, in pixels.
        names: of the marks.
        order: the marks, the first to be named first.
        letter: width of an average letter.
        ends: left and right end of what is drawn; no name leaves it.
        levels: lower and upper end of it.
        others: centres of further marks that names keep clear of.
        half: half the width and the height of a mark.
        high: height of a name.

    Returns:
        Of each mark that finds room: its index, the shift of its name in pixels, and the side it is anchored at.
    """
    across, up = half
    taken: list[Box] = [(x - across, x + across, y - up, y + up) for x, y in [*marks, *others]]
    right, above = round(across) + 2, math.ceil(up + high / 2)
    found: list[tuple[int, int, int, str]] = []
    for k in order:
        x, y = marks[k]
        length = letter * len(names[k])
        for dx, dy, side in ((right, 0, "left"), (-right, 0, "right"), (0, above, "center"), (0, -above, "center")):
            start = x + dx - length * {"left": 0, "right": 1, "center": 0.5}[side]
            box = (start, start + length, y + dy - high / 2, y + dy + high / 2)
            inside = ends[0] <= box[0] and box[1] <= ends[1] and levels[0] <= box[2] and box[3] <= levels[1]
            if not inside or any(_touch(box, other) for other in taken):
                continue
            taken.append(box)
            found.append((k, dx, dy, side))
            break
    return found


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
