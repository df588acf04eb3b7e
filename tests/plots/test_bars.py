"""Bars and decoded words: values, intervals, labels, and what is refused."""

import math
import re

import pytest
import torch

from fvlens import plots
from fvlens.plots import (
    bars,
    decoded,
)


def test_bars_show_values_intervals_and_the_highlight():
    ends = [0.125, 0.5], [0.5, 1.0]
    figure = bars(["no vector", "vector"], torch.tensor([0.25, 0.75]), *ends, x_title="Top-1", highlighted=["vector"])
    (trace,) = figure.data
    assert (list(trace.x), list(trace.y), trace.orientation) == ([0.25, 0.75], [0, 1], "h")
    assert list(trace.error_x.array) == [0.25, 0.25]
    assert list(trace.error_x.arrayminus) == [0.125, 0.25]
    assert list(trace.marker.color) == [plots.MUTED, plots.ACCENT]
    assert trace.hovertext[1] == "vector<br>Top-1: 0.75<br>interval: 0.5 to 1"
    assert list(figure.layout.yaxis.ticktext) == ["no vector", "vector"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first on top
    assert figure.layout.xaxis.title.text == "Top-1"
    assert [(note.text, note.x, note.y) for note in figure.layout.annotations] == [("0.25", 0.5, 0), ("0.75", 1.0, 1)]


def test_bars_with_equal_labels_stay_apart_and_all_are_bright_if_none_is_named():
    trace = bars(["a", "a"], [1, 2], x_title="x").data[0]
    assert list(trace.y) == [0, 1]
    assert set(trace.marker.color) == {plots.ACCENT}
    assert trace.error_x.array is None


def test_bars_leave_room_for_negative_values_and_long_labels():
    long = "a random vector of the same norm, the mean over ten of them"
    figure = bars([long, "b"], [-2.0, 1.0], x_title="x", references={"zero-shot": 0.5})
    left, right = figure.layout.xaxis.range
    inside = figure.layout.width - figure.layout.margin.l - figure.layout.margin.r
    assert (-2 - left) / (right - left) * inside > 40  # pixels for the number at the end of the bar
    assert (right - 1) / (right - left) * inside > 40
    shown = figure.layout.yaxis.ticktext[0]
    assert shown.replace("<br>", " ") == long
    assert figure.layout.margin.l > 6 * max(len(line) for line in shown.split("<br>"))
    numbers = [note for note in figure.layout.annotations if note.xref == "x" or note.xref is None]
    assert [note.xanchor for note in numbers] == ["right", "left"]
    (shape,) = figure.layout.shapes
    assert shape.x0 == shape.x1 == 0.5
    assert figure.layout.annotations[-1].text == "zero-shot 0.5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [], "values": []}, "bars: expected at least one number in values, got none"),
        ({"labels": ["a"]}, "bars: expected data of one length, got labels 1, values 2"),
        ({"values": [1.0, math.nan]}, "bars: expected finite numbers in values, got nan"),
        ({"low": [0.0, 0.0]}, "bars: expected low and high together, got only low"),
        ({"low": [2, 2], "high": [1, 1]}, "bars: expected low at most high, got low 2.0 and high 1.0 at index 0"),
        ({"highlighted": ["c"]}, "bars: expected highlighted labels among 'a', 'b', got 'c'"),
        ({"x_range": (1.0, 1.0)}, "bars: expected x_range as (low, high) with low below high, got (1.0, 1.0)"),
        ({"references": {"r": math.nan}}, "bars: expected finite numbers in references, got nan"),
    ],
)
def test_bars_refuse(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bars(**{"labels": ["a", "b"], "values": [1.0, 2.0], "x_title": "x", **options})


def test_decoded_quotes_and_escapes_tokens():
    words = [" big", "\n", "<|endoftext|>", " big"]
    figure = decoded(words, torch.tensor([3.0, 2.0, 1.0, 0.5]), highlighted=[" big"])
    assert list(figure.layout.yaxis.ticktext) == ["' big'", "'\\n'", "'&lt;|endoftext|&gt;'", "' big'"]
    assert list(figure.data[0].x) == [3.0, 2.0, 1.0, 0.5]
    assert [colour == plots.ACCENT for colour in figure.data[0].marker.color] == [True, False, False, True]
    assert figure.data[0].hovertext[0] == "' big'<br>logit: 3"


@pytest.mark.parametrize(
    ("words", "scores", "highlighted", "message"),
    [
        ([], [], [], "decoded: expected at least one number in scores, got none"),
        (["a"], [1.0, 2.0], [], "decoded: expected data of one length, got words 1, scores 2"),
        (["a"], [math.nan], [], "decoded: expected finite numbers in scores, got nan"),
        (["a"], [1.0], ["b"], "decoded: expected highlighted tokens among 'a', got 'b'"),
    ],
)
def test_decoded_refuses(words, scores, highlighted, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decoded(words, scores, highlighted=highlighted)
