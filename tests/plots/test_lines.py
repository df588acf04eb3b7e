"""Lines: points, bands, references, room for labels, and what is refused."""

import math
import re
from itertools import pairwise

import pytest
import torch

from fvlens import plots
from fvlens.plots import (
    curves,
    line_sweep,
    training_curves,
)


def sweep(**options):
    y = torch.tensor([0.5, 0.9, 0.7])
    settings = {"x_title": "Layer", "y_title": "Top-1", **options}
    return line_sweep([0, 1, 2], y, y - 0.1, y + 0.05, **settings)


def test_line_sweep_draws_the_points_and_the_band():
    figure = sweep(title="Sweep")
    band, line = figure.data
    assert list(line.x) == [0, 1, 2]
    assert list(line.y) == pytest.approx([0.5, 0.9, 0.7])
    # The band goes out along the upper ends and back along the lower ones.
    assert list(band.x) == [0, 1, 2, 2, 1, 0]
    assert list(band.y) == pytest.approx([0.55, 0.95, 0.75, 0.6, 0.8, 0.4])
    assert band.fill == "toself"
    assert line.hovertext[1] == "Layer: 1<br>Top-1: 0.9<br>interval: 0.8 to 0.95"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Layer", "Top-1")
    assert figure.layout.title.text == "Sweep"
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]


def test_line_sweep_without_intervals_has_no_band():
    figure = line_sweep([1, 2], [3, 4], x_title="x", y_title="y")
    assert len(figure.data) == 1
    assert figure.data[0].hovertext[0] == "x: 1<br>y: 3"
    assert figure.layout.title.subtitle.text is None


def test_line_sweep_marks_the_point_with_its_value():
    figure = sweep(marked=1, marked_label="chosen")
    sizes = figure.data[-1].marker.size
    assert sizes[1] > sizes[0] == sizes[2]
    (label,) = figure.layout.annotations
    assert (label.x, label.text) == (1, "<b>chosen: 0.9</b>")
    assert label.y == pytest.approx(0.95)  # above the band
    assert label.yanchor == "bottom"


def test_line_sweep_references_are_lines_at_their_values_with_names():
    figure = sweep(references={"10-shot": 0.98, "no vector": 0.25})
    lines = [(shape.y0, shape.y1, shape.x0, shape.x1) for shape in figure.layout.shapes]
    assert lines == [(0.98, 0.98, 0, 1), (0.25, 0.25, 0, 1)]
    assert [note.text for note in figure.layout.annotations] == ["10-shot<br>0.98", "no vector<br>0.25"]
    for shape, note in zip(figure.layout.shapes, figure.layout.annotations, strict=True):
        assert shape.line.color == note.font.color
    assert len({(shape.line.color, shape.line.dash) for shape in figure.layout.shapes}) == 2


def test_line_sweep_labels_of_close_references_do_not_overlap():
    figure = sweep(references={"a": 0.25, "b": 0.26, "c": 0.24, "d": 0.98})
    height = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    spots = {note.text[0]: note.y * height for note in figure.layout.annotations}
    assert [name for name, _ in sorted(spots.items(), key=lambda item: item[1])] == ["c", "a", "b", "d"]
    ordered = sorted(spots.values())
    assert all(b - a >= 29 for a, b in pairwise(ordered))  # two lines of 12 pixels
    assert figure.layout.margin.r > len("10-shot") * 3


def test_line_sweep_axis_holds_everything():
    figure = sweep(references={"far": -0.5, "high": 1.5})
    bottom, top = figure.layout.yaxis.range
    assert bottom < -0.5
    assert top > 1.5
    assert sweep().layout.yaxis.range[0] == 0
    assert tuple(sweep(y_range=(0.2, 1.0)).layout.yaxis.range) == (0.2, 1.0)


def test_line_sweep_drops_ticks_that_would_touch_but_keeps_the_points():
    x = [1, 2, 3, 5, 8, 10, 500]
    figure = line_sweep(x, x, x_title="heads", y_title="y")
    ticks = list(figure.layout.xaxis.tickvals)
    assert set(ticks) < set(x)
    assert 1 in ticks
    assert all((b - a) * 590 / 499 >= 12 for a, b in pairwise(ticks))
    assert list(figure.data[-1].x) == x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": [], "y": []}, "line_sweep: expected at least one number in x, got none"),
        ({"y": [1.0]}, "line_sweep: expected data of one length, got x 2, y 1"),
        ({"low": [0.0], "high": [1.0]}, "line_sweep: expected data of one length, got x 2, y 2, low 1, high 1"),
        ({"y": [1.0, math.nan]}, "line_sweep: expected finite numbers in y, got nan"),
        ({"y": torch.zeros(2, 2)}, "line_sweep: expected y with one axis, got several"),
        ({"x": [2, 1]}, "line_sweep: expected x in increasing order without repeats, got 2, 1"),
        ({"low": [0.0, 0.0]}, "line_sweep: expected low and high together, got only low"),
        ({"high": [0.0, 0.0]}, "line_sweep: expected low and high together, got only high"),
        ({"low": [0, 2], "high": [1, 1]}, "line_sweep: expected low at most high, got low 2.0 and high 1.0 at index 1"),
        ({"marked": 7}, "line_sweep: expected marked to be one of x, 0, 1, got 7"),
        ({"y_range": (1.0, 0.0)}, "line_sweep: expected y_range as (low, high) with low below high, got (1.0, 0.0)"),
        ({"references": {"a": math.inf}}, "line_sweep: expected finite numbers in references, got inf"),
    ],
)
def test_line_sweep_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        line_sweep(**{"x": [0, 1], "y": [0.5, 0.6], "x_title": "x", "y_title": "y", **options})


LINES = {"train": [0.9, 1.0, 1.0], "test": [0.2, 0.5, 0.9]}
BANDS = {"test": ([0.1, 0.4, 0.8], [0.3, 0.6, 1.0])}
TITLES = dict(x_title="Pairs", y_title="Top-1")


def test_curves_draw_every_line_with_its_own_look_and_its_band():
    figure = curves([1, 5, 20], LINES, BANDS, **TITLES, title="Curves", note="Bands: words")
    train, band, test = figure.data
    assert (train.name, list(train.x), list(train.y)) == ("train", [1, 5, 20], LINES["train"])
    assert (test.name, list(test.y)) == ("test", LINES["test"])
    assert list(band.x) == [1, 5, 20, 20, 5, 1] and list(band.y) == [0.3, 0.6, 1.0, 0.8, 0.4, 0.1]
    assert band.fillcolor == test.line.color != train.line.color and band.showlegend is False
    assert (train.line.dash, train.marker.symbol) != (test.line.dash, test.marker.symbol)
    assert test.hovertext[1] == "test<br>Pairs: 5<br>Top-1: 0.5<br>interval: 0.4 to 0.6"
    assert train.hovertext[1] == "train<br>Pairs: 5<br>Top-1: 1"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Pairs", "Top-1")
    assert figure.layout.title.subtitle.text == "Bands: words"


def test_curves_axes_hold_everything_and_tick_the_points():
    figure = curves([1, 5, 20], LINES, BANDS, **TITLES, references={"above": 1.4}, log_x=True)
    assert figure.layout.xaxis.type == "log"
    low, high = figure.layout.xaxis.range
    assert low < 0 < math.log10(20) < high
    assert list(figure.layout.xaxis.tickvals) == [1, 5, 20] and list(figure.layout.xaxis.ticktext) == ["1", "5", "20"]
    bottom, top = figure.layout.yaxis.range
    assert bottom <= 0 and top > 1.4
    assert list(curves([1, 5], {"a": [0, 1]}, **TITLES, y_range=(0, 2)).layout.yaxis.range) == [0, 2]
    crowded = curves([1, 1.001, 20], LINES, **TITLES, log_x=True)
    assert list(crowded.layout.xaxis.tickvals) == [1, 20] and len(crowded.data[0].x) == 3
    single = curves([3], {"a": [0.5]}, **TITLES)
    assert single.layout.xaxis.range[0] < 3 < single.layout.xaxis.range[1]


def test_curves_references_are_lines_at_their_values_with_names():
    figure = curves([1, 5, 20], LINES, **TITLES, references={"no <b>vector": 0.1, "10-shot": 0.98})
    assert [shape.y0 for shape in figure.layout.shapes] == [0.1, 0.98]
    assert [note.text for note in figure.layout.annotations] == ["no &lt;b&gt;vector<br>0.1", "10-shot<br>0.98"]
    assert figure.layout.margin.r > 8 * len("no <b>vector") * 0.8


def test_curves_legend_has_room_for_its_rows():
    names = ["one", "the second of the lines", "the third of the lines", "the fourth of the lines", "five", "six"]
    few = curves([1, 2], {"one": [0, 1], "two": [1, 0]}, **TITLES)
    many = curves([1, 2], {name: [0, 1] for name in names}, **TITLES)
    entry = many.layout.legend.entrywidth
    n_rows = math.ceil(6 / ((plots.WIDTH - 64 - 24) // (entry + 46)))
    assert n_rows > 1
    assert many.layout.margin.t - few.layout.margin.t == 20 * (n_rows - 1) == many.layout.height - few.layout.height
    assert [trace.showlegend for trace in many.data] == [None] * 6 and many.layout.showlegend
    assert len({(trace.line.color, trace.line.dash) for trace in many.data}) == 6


@pytest.mark.parametrize(
    ("x", "lines", "options", "message"),
    [
        ([1, 2], {}, {}, "curves: expected at least one line, got none."),
        ([], {"a": []}, {}, "curves: expected at least one number in x, got none."),
        ([2, 1], {"a": [0, 1]}, {}, "curves: expected x in increasing order without repeats, got 2, 1."),
        ([0, 1], {"a": [0, 1]}, dict(log_x=True), "curves: a logarithmic axis needs x above 0, got 0."),
        ([1, 2], {"a": [0]}, {}, "curves: expected data of one length, got x 2, a 1."),
        ([1, 2], {"a": [0, math.nan]}, {}, "curves: expected finite numbers in a, got nan; leave such points out."),
        ([1, 2], {"a": [0, 1]}, dict(intervals={"b": ([0, 0], [1, 1])}), "curves: an interval of 'b', but the lines"),
        ([1], {"a": [0]}, dict(intervals={"a": ([1], [0])}), "curves: expected low at most high, got low 1.0 and high"),
        ([1, 2], {"a": [0, 1]}, dict(y_range=(1, 1)), "curves: expected y_range as (low, high) with low below high"),
        ([1], {"a": [0]}, dict(references={"r": math.inf}), "curves: expected finite numbers in references, got inf"),
    ],
)
def test_curves_refuse(unchecked, x, lines, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        curves(x, lines, **TITLES, **options)


NAN = float("nan")
TRAINING = dict(
    train_loss=[3.0, 1.0, 0.5], valid_loss=[3.0, 1.5, 1.25], valid_top1=[0.1, 0.5, 0.4], norm=[1.0, 2.0, 3.0],
    cosine=[1.0, 0.9, -0.8], marked=1,
)  # fmt: skip


def test_training_curves_show_every_quantity_in_its_panel():
    figure = training_curves(**TRAINING, title="Training of x")
    traces = {trace.name: trace for trace in figure.data}
    assert {name: list(trace.y) for name, trace in traces.items()} == {
        "training pairs": TRAINING["train_loss"], "validation pairs": TRAINING["valid_loss"],
        "validation top-1": TRAINING["valid_top1"], "norm": TRAINING["norm"], "cosine": TRAINING["cosine"],
    }  # fmt: skip
    assert all(list(trace.x) == [0, 1, 2] for trace in figure.data)
    panels = [note.text for note in figure.layout.annotations]
    assert panels == ["Loss", "Validation top-1", "Norm", "Cosine to the start"]
    assert traces["training pairs"].yaxis == traces["validation pairs"].yaxis
    assert len({trace.yaxis for trace in figure.data}) == 4
    assert [trace.name for trace in figure.data if trace.showlegend] == ["training pairs", "validation pairs"]
    assert list(figure.layout.yaxis2.range) == [0, 1.04]
    bottom, top = figure.layout.yaxis4.range
    assert bottom < -0.8 and top > 1
    assert traces["norm"].hovertext[2] == "epoch 2<br>norm: 3"
    assert figure.layout.title.text == "Training of x"


def test_training_curves_mark_the_chosen_epoch_in_every_panel():
    figure = training_curves(**TRAINING)
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(1, 1)] * 4
    assert [shape.xref for shape in figure.layout.shapes] == ["x", "x2", "x3", "x4"]
    assert figure.layout.title.subtitle.text == "Dotted line: the epoch chosen, 1"
    assert [axis.title.text for axis in (figure.layout.xaxis, figure.layout.xaxis3, figure.layout.xaxis4)] == [
        None, "Epoch", "Epoch",
    ]  # fmt: skip


def test_training_curves_leave_out_what_there_is_not():
    nothing = [NAN] * 3
    figure = training_curves(**(TRAINING | dict(valid_loss=nothing, valid_top1=nothing, cosine=torch.tensor(nothing))))
    assert [trace.name for trace in figure.data] == ["training pairs", "norm"]
    assert not any(trace.showlegend for trace in figure.data)
    part = training_curves(**(TRAINING | dict(cosine=[NAN, 0.5, 0.25])))
    assert list(part.data[-1].x) == [1, 2] and list(part.data[-1].y) == [0.5, 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm=[1.0]), "training_curves: expected data of one length, got training pairs 3, validation pairs 3,"),
        (dict(norm=[1.0, math.inf, 2.0]), "training_curves: expected finite numbers in norm, got inf"),
        (dict(marked=3), "training_curves: expected marked in 0..2, got 3."),
        (dict(marked=-1), "training_curves: expected marked in 0..2, got -1."),
        (
            {name: [NAN] for name in ("train_loss", "valid_loss", "valid_top1", "norm", "cosine")},
            "training_curves: expected at least one number that is not NaN, got none.",
        ),
    ],
)
def test_training_curves_refuse(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        training_curves(**(TRAINING | change))
