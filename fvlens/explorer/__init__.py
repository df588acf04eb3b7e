"""The explorer: heads in and out of a vector by a click, and what the model says then, in a notebook or as a page.

Two layers. :class:`Session` knows the model, pairs, heads, layer, scale and prompt, and computes everything through the
same functions that a notebook calls; it has no widgets and is tested without them. Views over it are thin: each event
is one call of the session, and figures and texts are made of what it answers.

A prompt is run once and kept (:mod:`fvlens.explorer._kept`): a move of a slider costs the prompt's last token from the
vector's layer on, and not the prompt.
"""

from fvlens.explorer._explore import explore
from fvlens.explorer._session import KINDS, MOST_SCALE, Kind, Session, Settings

__all__ = [
    "KINDS",
    "MOST_SCALE",
    "Kind",
    "Session",
    "Settings",
    "explore",
]
