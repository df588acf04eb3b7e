"""Progress bars of long loops: on a terminal and in a notebook, and never into a file.

A bar is drawn over itself by carriage returns; a file or a pipe would keep them all, one picture behind the other.
"""

import sys
from typing import Any

from tqdm.auto import tqdm as _tqdm


class tqdm(_tqdm):
    """That of ``tqdm.auto``; without a terminal or a notebook to draw on it does nothing."""

    def __init__(self, *args: Any, disable: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, disable=disable or not is_drawn(), **kwargs)


def is_drawn() -> bool:
    """Whether there is something that a bar can be drawn on."""
    return "ipykernel.zmqshell" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())
