"""plotly's script for pages: the smaller one that draws what the house draws, or the whole one."""

import functools
from importlib import resources

import plotly.graph_objects as go

BUNDLE = "script/plotly-cartesian.min.js"
"""plotly.js with the traces of flat axes alone, from npm (``plotly.js-cartesian-dist-min``); its licence beside it."""

DRAWN = frozenset({"bar", "box", "contour", "heatmap", "histogram", "image", "pie", "scatter", "violin"})
"""Kinds of traces that it draws."""


@functools.cache
def bundle() -> str:
    """The smaller script."""
    return resources.files("fvlens.plots").joinpath(BUNDLE).read_text(encoding="utf-8")


def bundle_version() -> str:
    """The version that its first lines name."""
    return bundle()[:200].partition("minified) v")[2].split()[0]


def script_for(*figures: go.Figure) -> str:
    """The script that draws these figures: the smaller one, unless a figure has a trace that it lacks or the installed
    plotly writes for another major version."""
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    same = bundle_version().partition(".")[0] == get_plotlyjs_version().partition(".")[0]
    traces = {str(trace["type"]) for figure in figures for trace in figure.to_dict()["data"]}
    return bundle() if same and traces <= DRAWN else get_plotlyjs()
