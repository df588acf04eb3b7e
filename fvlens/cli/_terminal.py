"""What a terminal can show: signs that its encoding lacks are written with others."""

import codecs
import contextlib
import sys
from collections.abc import Iterator

_SIGNS = {
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{PLUS-MINUS SIGN}": "+/-",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{MIDDLE DOT}": ".",
    "\N{NO-BREAK SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
}
"""What stands for a sign where the encoding lacks it."""

READABLE = "fvlens.readable"
"""Name of the way to encode what an encoding lacks; see :mod:`codecs`."""


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Signs by others; letters, which would be other words without their accents, by their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in text), error.end


codecs.register_error(READABLE, _readable)


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Inside this block nothing that is printed is an error for want of a sign."""
    before = []
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            before.append((reconfigure, getattr(stream, "errors", None)))
            reconfigure(errors=READABLE)
    try:
        yield
    finally:
        for reconfigure, errors in reversed(before):  # both may be one stream
            reconfigure(errors=errors)
