"""Figures: arrays and labels in, a :class:`Figure` out. Computes nothing, shows nothing.

All figures share one quiet style, registered with plotly as ``"fvlens"`` and ``"fvlens-dark"``, and the
colour-blind-safe colours of Okabe and Ito. Signed values use a diverging scale centred at 0: blue above, red below,
near the paper's colour at 0. A figure is laid out for a page (700 pixels) or for a column of a paper (3.3 inches), and
``figure.save`` writes it as a page or a picture. Words and labels are escaped, so a token such as ``<b>`` is shown as
it is. `README.md` beside this file has more.

This room imports plotly, so the rest of the package imports it inside its ``.plot()`` methods only.
"""

from fvlens.plots._bars import bars, decoded
from fvlens.plots._direct import direct_map
from fvlens.plots._dots import dots
from fvlens.plots._figure import Figure
from fvlens.plots._input import Number, Numbers
from fvlens.plots._lines import curves, line_sweep
from fvlens.plots._maps import heatmap
from fvlens.plots._matrices import relation_map, similarity
from fvlens.plots._paired import paired_bars
from fvlens.plots._places import place_map
from fvlens.plots._prompts import distribution
from fvlens.plots._save import (
    FORMATS,
    NoPicture,
    alt_text,
    check_figure_file,
    looks,
    missing_for_pictures,
    one_browser,
    save,
)
from fvlens.plots._script import script_for
from fvlens.plots._shares import shares
from fvlens.plots._style import (
    ACCENT,
    DIVERGING,
    GREY,
    GRID,
    INK,
    MUTED,
    PAPER,
    REFERENCES,
    SEQUENTIAL,
    THEMES,
    WIDTH,
    Theme,
    ThemeName,
    Width,
    looking,
)
from fvlens.plots._tokens import token_bars, token_map
from fvlens.plots._training import training_curves

__all__ = [
    "ACCENT",
    "DIVERGING",
    "FORMATS",
    "GREY",
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "REFERENCES",
    "SEQUENTIAL",
    "THEMES",
    "WIDTH",
    "Figure",
    "NoPicture",
    "Number",
    "Numbers",
    "Theme",
    "ThemeName",
    "Width",
    "alt_text",
    "bars",
    "check_figure_file",
    "curves",
    "decoded",
    "direct_map",
    "distribution",
    "dots",
    "heatmap",
    "line_sweep",
    "looking",
    "looks",
    "missing_for_pictures",
    "one_browser",
    "paired_bars",
    "place_map",
    "relation_map",
    "save",
    "script_for",
    "shares",
    "similarity",
    "token_bars",
    "token_map",
    "training_curves",
]
