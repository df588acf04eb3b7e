"""Dots with names that keep apart."""

import math

import numpy as np
import pytest

from fvlens.plots import (
    dots,
)
from fvlens.plots._style import spread


def test_spread_keeps_order_gap_and_distant_places():
    placed = spread([0.9, 0.5, 0.51, 0.1], 0.1)
    assert placed[0] == 0.9
    assert placed[3] == 0.1
    assert placed[2] - placed[1] == pytest.approx(0.1)
    assert (placed[1] + placed[2]) / 2 == pytest.approx(0.505)


def boxes_of(figure, names):
    """Where each name stands, in pixels of the plotting area, and each marker."""
    low, high = figure.layout.xaxis.range
    margin = figure.layout.margin
    wide, tall = figure.layout.width - margin.l - margin.r, figure.layout.height - margin.t - margin.b
    assert wide == tall and (low, high) == tuple(figure.layout.yaxis.range)

    def pixels(value):
        return (value - low) / (high - low) * wide

    found = []
    for note in figure.layout.annotations:
        if note.text in names:
            length = 5.5 * len(note.text)
            start = pixels(note.x) + note.xshift - length * {"left": 0, "right": 1, "center": 0.5}[note.xanchor]
            middle = pixels(note.y) + note.yshift
            found.append((start, start + length, middle - 5.5, middle + 5.5))
    marks = [(pixels(x), pixels(y)) for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True)]
    return found, marks, wide


def test_dots_show_both_shares_by_group_and_rings_at_the_same_place():
    x, y, third = [0.1, 0.5, 0.1, 0.9], [0.9, 0.4, 0.7, 1.0], [1.0, 0.5, 0.8, 0.95]
    figure = dots(
        x, y, ["a", "b", "c<", "d"], groups=["one", "two", "one", "two"], rings=("10-shot", third), x_title="Untuned",
        y_title="Tuned", title="Dots", note="small", references={"10-shot, mean": 0.8125},
    )  # fmt: skip
    rings, one, two = figure.data
    assert (rings.name, one.name, two.name) == ("10-shot", "one", "two")
    assert (list(rings.x), list(rings.y)) == (x, third)
    assert (list(one.x), list(one.y), list(two.x), list(two.y)) == ([0.1, 0.1], [0.9, 0.7], [0.5, 0.9], [0.4, 1.0])
    assert one.hovertext[1] == "c&lt;<br>Untuned: 0.1<br>Tuned: 0.7" and rings.hovertext[0] == "a<br>10-shot: 1"
    assert one.marker.color != two.marker.color and one.marker.symbol != two.marker.symbol
    diagonal, line = figure.layout.shapes
    assert (diagonal.x0, diagonal.y0, diagonal.x1, diagonal.y1) == (0, 0, 1, 1) and line.y0 == line.y1 == 0.8125
    assert {note.text for note in figure.layout.annotations} == {"10-shot, mean<br>0.81", "a", "b", "c&lt;", "d"}
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Untuned", "Tuned")
    assert figure.layout.showlegend and figure.layout.title.subtitle.text == "small"
    assert not dots([0.5], [0.5], ["a"], x_title="x", y_title="y").layout.showlegend


def test_names_of_dots_touch_neither_each_other_nor_a_mark():
    places = np.random.default_rng(0).integers(0, 20, size=(2, 60)) / 20
    names = [f"relation-{i}" for i in range(60)]
    figure = dots(*places.tolist(), names, rings=("ring", places[0].tolist()), x_title="x", y_title="y")
    boxes, marks, wide = boxes_of(figure, names)
    assert 20 < len(boxes) < 60
    for i, (a, b, c, d) in enumerate(boxes):
        assert a >= 0 and b <= wide
        assert not any(a < f and e < b and c < h and g < d for e, f, g, h in boxes[:i])
        assert not any(a - 4 < x < b + 4 and c - 4 < y < d + 4 for x, y in marks)


def test_dots_refuse_data_that_do_not_fit():
    with pytest.raises(ValueError, match="dots: expected at least one number in x, got none"):
        dots([], [], [], x_title="x", y_title="y")
    with pytest.raises(ValueError, match="dots: expected data of one length, got x 1, y 1, names 2"):
        dots([0.1], [0.2], ["a", "b"], x_title="x", y_title="y")
    with pytest.raises(ValueError, match="dots: expected finite numbers in rings, got nan"):
        dots([0.1], [0.2], ["a"], rings=("ring", [math.nan]), x_title="x", y_title="y")
