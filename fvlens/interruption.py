"""Long loops that are interrupted: what is finished is kept, and says that it is not all.

A loop over prompts, relations, methods ... collects its results inside :class:`keeping`. Ctrl-C then ends the loop, not
the program: the results so far stand, ``complete`` is False, and a warning says how many there are. Tables and figures
made of them say it, too.
"""

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


class keeping:
    """Inside this block, an interruption ends the block alone if something is finished by then.

    Args:
        done: how many results are finished, asked when it matters.
        total: how many there should be.
        what: the function that the user called, for the warning.
        things: what is counted, such as ``"prompts are finished"``.
        stacklevel: as for ``warnings.warn``, seen from the function that holds the block.
        least: with fewer results than this the interruption goes on.

    Attributes:
        complete: False once the loop was interrupted.

    Example:
        >>> squares = []
        >>> with keeping(lambda: len(squares), 3, "example", "squares are finished") as loop:
        ...     for i in range(3):
        ...         squares.append(i * i)
        >>> squares, loop.complete
        ([0, 1, 4], True)
    """

    def __init__(
        self, done: Callable[[], int], total: int, what: str, things: str, *, stacklevel: int = 1, least: int = 1
    ) -> None:
        self._done, self._total, self._what, self._things = done, total, what, things
        self._stacklevel, self._least = stacklevel, least
        self.complete = True

    def __enter__(self) -> "keeping":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            return False
        n_done = self._done()
        if n_done < self._least:
            return False
        self.complete = False
        warnings.warn(
            f"{self._what} was interrupted: {n_done} of {self._total} {self._things}.", stacklevel=self._stacklevel + 1
        )
        return True


def marked(frame: "pd.DataFrame", complete: bool) -> "pd.DataFrame":
    """A table of results; of a part of them it says so in a column ``complete``, which is False in every row."""
    return frame if complete else frame.assign(complete=False)


def titled(title: str, complete: bool) -> str:
    """The title of a figure of results, which says so if they are a part."""
    return title if complete else f"{title} (interrupted: a part of the whole)"
