"""Colours as plotly draws them."""

import numpy as np


def colour_at(scale, share):
    """The colour of a plotly colour scale at a share of its range, as red, green, blue in 0..255."""
    stops = [(float(at), [int(c[i : i + 2], 16) for i in (1, 3, 5)]) for at, c in scale]
    at = [stop for stop, _ in stops]
    return [np.interp(share, at, [rgb[i] for _, rgb in stops]) for i in range(3)]
