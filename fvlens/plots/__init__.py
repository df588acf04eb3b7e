"""Figures: arrays and labels in, ``go.Figure`` out. Computes nothing, shows nothing.

All figures share one quiet template and the colour-blind-safe colours of Okabe and Ito, and are laid out for a width of
700 pixels. Signed values use a diverging scale centred at 0: blue above, red below, near white at 0. Words and labels
are escaped, so a token such as ``<b>`` is shown as it is.

This room imports plotly, so the rest of the package imports it inside its ``.plot()`` methods only.
"""

from fvlens.plots._bars import bars, decoded
from fvlens.plots._direct import direct_map
from fvlens.plots._dots import dots
from fvlens.plots._input import Number, Numbers
from fvlens.plots._lines import curves, line_sweep
from fvlens.plots._maps import heatmap, relation_map, similarity
from fvlens.plots._shares import SEQUENTIAL, shares
from fvlens.plots._style import ACCENT, DIVERGING, GREY, GRID, INK, MUTED, PAPER, REFERENCES, WIDTH
from fvlens.plots._training import training_curves

__all__ = [
    "ACCENT",
    "DIVERGING",
    "GREY",
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "REFERENCES",
    "SEQUENTIAL",
    "WIDTH",
    "Number",
    "Numbers",
    "bars",
    "curves",
    "decoded",
    "direct_map",
    "dots",
    "heatmap",
    "line_sweep",
    "relation_map",
    "shares",
    "similarity",
    "training_curves",
]
