"""What the figures show: data, colours, outlines, hover texts, titles; room for the labels; every error message."""

import math
import re
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from fvlens import plots
from fvlens.plots import (
    bars,
    curves,
    decoded,
    direct_map,
    dots,
    heatmap,
    line_sweep,
    relation_map,
    shares,
    similarity,
    training_curves,
)
from fvlens.plots._style import spread
from fvlens.types import Head

AIE = torch.tensor([[0.01, -0.02, 0.3], [0.0, 0.125, -0.4]])
ERRORS = torch.tensor([[0.001, 0.002, 0.03], [0.0, 0.0125, 0.04]])


def colour_at(scale, share):
    """The colour of a plotly colour scale at a share of its range, as red, green, blue in 0..255."""
    stops = [(float(at), [int(c[i : i + 2], 16) for i in (1, 3, 5)]) for at, c in scale]
    at = [stop for stop, _ in stops]
    return [np.interp(share, at, [rgb[i] for _, rgb in stops]) for i in range(3)]


# Heatmap


def test_heatmap_shows_the_values_with_layer_zero_at_the_bottom():
    figure = heatmap(AIE)
    trace = figure.data[0]
    np.testing.assert_array_equal(np.asarray(trace.z), AIE.numpy())
    assert (list(trace.x), list(trace.y)) == ([0, 1, 2], [0, 1])
    bottom, top = figure.layout.yaxis.range
    assert bottom < 0 < 1 < top
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Head", "Layer")


@pytest.mark.parametrize("values", [AIE, AIE.abs(), -AIE.abs()])
def test_heatmap_scale_is_centred_at_zero_and_reaches_the_largest_value(values):
    trace = heatmap(values).data[0]
    assert trace.zmid == 0
    assert trace.zmin == -trace.zmax == pytest.approx(-0.4)


def test_diverging_colours_are_pale_at_zero_blue_above_and_red_below():
    scale = heatmap(AIE).data[0].colorscale
    assert min(colour_at(scale, 0.5)) > 240
    red, _, blue = colour_at(scale, 1.0)
    assert blue > red + 100
    red, _, blue = colour_at(scale, 0.0)
    assert red > blue + 100
    brightness = [sum(colour_at(scale, share)) for share in np.linspace(0, 1, 41)]
    assert all(a < b for a, b in pairwise(brightness[:21]))  # darker with distance from 0
    assert all(a > b for a, b in pairwise(brightness[20:]))


def test_heatmap_of_zeros_has_a_scale():
    trace = heatmap(torch.zeros(2, 2)).data[0]
    assert (trace.zmin, trace.zmid, trace.zmax) == (-1, 0, 1)


def test_heatmap_outlines_exactly_the_given_cells():
    figure = heatmap(AIE, outlined=[Head(0, 2), (1, 1)])
    boxes = [(shape.type, shape.x0, shape.x1, shape.y0, shape.y1) for shape in figure.layout.shapes]
    assert boxes == [("rect", 1.5, 2.5, -0.5, 0.5), ("rect", 0.5, 1.5, 0.5, 1.5)]
    assert {shape.line.color for shape in figure.layout.shapes} == {"black"}
    assert figure.layout.title.subtitle.text == "Black outline: top heads (2)"
    left, right = figure.layout.xaxis.range
    assert left < -0.5
    assert right > 2.5  # the outline at the edge is whole
    assert not heatmap(AIE).layout.shapes
    assert heatmap(AIE).layout.title.subtitle.text is None


def test_heatmap_hover_has_head_value_error_and_place():
    hover = [["a", "b", "c"], ["d", "e", "<f>"]]
    figure = heatmap(AIE, stderr=ERRORS, outlined=[(0, 2), (1, 1)], colorbar_title="CIE", hover=hover)
    texts = figure.data[0].hovertext
    assert figure.data[0].hoverinfo == "text"
    assert texts[0][2] == "L0H2 (1 of 2 outlined)<br>CIE: +0.3 ± 0.03 (standard error)<br>c"
    assert texts[1][1] == "L1H1 (2 of 2 outlined)<br>CIE: +0.125 ± 0.013 (standard error)<br>e"
    assert texts[1][2] == "L1H2<br>CIE: -0.4 ± 0.04 (standard error)<br>&lt;f&gt;"
    assert figure.data[0].colorbar.title.text == "CIE"


def test_heatmap_leaves_heads_that_were_not_measured_blank():
    values = AIE.clone()
    values[1, 2] = math.nan
    trace = heatmap(values).data[0]
    assert np.isnan(np.asarray(trace.z)[1, 2])
    assert trace.hovertext[1][2] == "L1H2<br>not measured"
    assert trace.zmax == pytest.approx(0.3)


def test_heatmap_takes_low_precision_and_leaves_its_input_alone():
    values = AIE.clone().requires_grad_()
    heatmap(values.bfloat16(), stderr=ERRORS)
    assert torch.equal(values.detach(), AIE)


@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (12, 12), (32, 32), (80, 64)])
def test_heatmap_ticks_are_whole_and_have_room(shape):
    figure = heatmap(torch.ones(shape))
    height = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    for axis, n, pixels in ((figure.layout.yaxis, shape[0], height), (figure.layout.xaxis, shape[1], 520)):
        assert axis.dtick == int(axis.dtick) >= 1
        assert pixels / n * axis.dtick >= 14
        assert axis.dtick <= max(1, n - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heatmap(torch.zeros(0, 4)), "expected at least one finite value, got none in shape (0, 4)"),
        (lambda: heatmap(torch.full((1, 2), math.nan)), "expected at least one finite value, got none in shape (1, 2)"),
        (lambda: heatmap(torch.tensor([[math.inf, 0.0]])), "for heads not measured), got 1 infinite"),
        (lambda: heatmap(AIE, stderr=ERRORS[:, :2]), "expected stderr of the shape of values, (2, 3), got (2, 2)"),
        (lambda: heatmap(AIE, stderr=-ERRORS), "expected finite standard errors of at least 0, got values from -0.04"),
        (lambda: heatmap(AIE, hover=[["a"] * 3, ["b"]]), "expected hover as 2 rows of 3 texts, got rows of [3, 1]"),
        (lambda: heatmap(AIE, outlined=[(2, 0)]), "heads: L2H0 does not exist"),
        (lambda: heatmap(AIE, outlined=[(1, 0), (1, 0)]), "heads: L1H0 is listed twice"),
    ],
)
def test_heatmap_refuses(unchecked, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# Line sweep


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


# Curves


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


# Training curves

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


# Bars


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


# Similarity


def test_similarity_shows_the_matrix_with_the_first_row_on_top():
    matrix = torch.tensor([[1.0, -0.25], [-0.25, 1.0]])
    figure = similarity(matrix, ["antonym", "plural"])
    trace = figure.data[0]
    np.testing.assert_array_equal(np.asarray(trace.z), matrix.numpy())
    assert (trace.zmin, trace.zmid, trace.zmax) == (-1, 0, 1)
    assert trace.hovertext[0][1] == "antonym, plural<br>cosine: -0.25"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext) == ["antonym", "plural"]


def test_similarity_of_two_sets_names_rows_and_columns():
    figure = similarity(torch.ones(1, 3), ["r"], columns=["a", "b", "<c>"], limit=2.0, colorbar_title="r")
    assert list(figure.layout.xaxis.ticktext) == ["a", "b", "&lt;c&gt;"]
    assert figure.data[0].hovertext[0][2] == "r, &lt;c&gt;<br>r: +1"
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-2, 2)


@pytest.mark.parametrize("n", [2, 12, 64])
def test_similarity_labels_have_room(n):
    figure = similarity(torch.eye(n), [f"relation number {i}" for i in range(n)])
    layout = figure.layout
    tall = (layout.height - layout.margin.t - layout.margin.b) / n
    assert tall >= layout.yaxis.tickfont.size
    assert layout.margin.l > 6 * len("relation number 63")
    assert list(layout.yaxis.tickvals) == list(range(n))
    assert (figure.data[0].texttemplate is not None) == (n <= 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: similarity(torch.eye(2), ["a"]), "of the 2 by 2 matrix, got 1 and 1 labels"),
        (lambda: similarity(torch.ones(2, 3), ["a", "b"], columns=["c"]), "of the 2 by 3 matrix, got 2 and 1 labels"),
        (lambda: similarity(torch.ones(0, 0), []), "expected at least one row and one column, got an empty matrix"),
        (lambda: similarity(torch.full((1, 1), math.nan), ["a"]), "expected finite values, got 1 NaN or infinite"),
        (lambda: similarity(torch.eye(1), ["a"], limit=0.0), "expected limit above 0, got 0.0"),
    ],
)
def test_similarity_refuses(call, message):
    with pytest.raises(ValueError, match=re.escape(f"{message}")):
        call()


# Relations by heads


MAP = torch.tensor([[0.1, -0.3, 0.02], [0.0, 0.25, -0.05]])


def test_relation_map_shows_the_values_with_the_first_relation_on_top():
    figure = relation_map(MAP, ["antonym", "plural"], ["L1H2", "L0H0", "L3H1"], colorbar_title="CIE")
    trace = figure.data[0]
    np.testing.assert_array_equal(np.asarray(trace.z), MAP.numpy())
    top, bottom = figure.layout.yaxis.range[::-1]
    assert top < 0 < 1 < bottom
    assert list(figure.layout.yaxis.ticktext) == ["antonym", "plural"]
    assert list(figure.layout.xaxis.ticktext) == ["L1H2", "L0H0", "L3H1"]
    assert list(figure.layout.xaxis.tickvals) == list(trace.x) == [0, 1, 2]
    assert (trace.zmid, -trace.zmin, trace.zmax) == (0, pytest.approx(0.3), pytest.approx(0.3))
    assert trace.colorscale == heatmap(AIE).data[0].colorscale
    assert trace.hovertext[0][1] == "antonym, L0H0<br>CIE: -0.3"
    assert not figure.layout.shapes
    assert figure.layout.title.subtitle.text is None


def test_relation_map_marks_what_is_left_out_and_what_is_chosen():
    figure = relation_map(
        MAP, ["<b>", "plural"], ["L1H2", "L0H0", "L3H1"], stderr=MAP.abs() / 10, excluded=[True, False],
        notes=["top-1 0.1 < 0.2", "fine"], n_chosen=2,
    )  # fmt: skip
    first, second = figure.layout.yaxis.ticktext
    assert first == f'<span style="color:{plots.GREY}">× &lt;b&gt;</span>'
    assert second == "plural"
    texts = figure.data[0].hovertext
    assert texts[0][0] == (
        "&lt;b&gt;, L1H2<br>AIE: +0.1 ± 0.01 (standard error)<br>top-1 0.1 &lt; 0.2<br>left out of the average"
    )
    assert texts[1][2] == "plural, L3H1<br>AIE: -0.05 ± 0.005 (standard error)<br>fine"
    (line,) = figure.layout.shapes
    assert (line.type, line.x0, line.x1, line.y0, line.y1, line.yref) == ("line", 1.5, 1.5, 0, 1, "paper")
    note = "Left of the line: the chosen heads (2); grey ×: left out of the average (1 of 2)"
    assert figure.layout.title.subtitle.text == note
    alone = relation_map(MAP, ["a", "b"], ["x", "y", "z"], excluded=[False, True])
    assert alone.layout.title.subtitle.text == "Grey ×: left out of the average (1 of 2)"
    assert not relation_map(MAP, ["a", "b"], ["x", "y", "z"], n_chosen=3).layout.shapes  # nothing is to its right


@pytest.mark.parametrize("n_rows", [1, 12, 60, 120])
def test_relation_map_gives_every_relation_a_line_that_can_be_read(n_rows):
    figure = relation_map(torch.ones(n_rows, 30), [f"relation-{i}" for i in range(n_rows)], ["L11H11"] * 30)
    inside = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    size = figure.layout.yaxis.tickfont.size
    assert inside / n_rows >= size + 1
    assert size >= 10
    assert len(figure.layout.yaxis.ticktext) == n_rows
    assert figure.layout.width == plots.WIDTH
    assert figure.layout.xaxis.tickangle == -90  # thirty names do not fit side by side


def test_relation_map_of_zeros_has_a_scale():
    trace = relation_map(torch.zeros(1, 2), ["a"], ["x", "y"]).data[0]
    assert (trace.zmin, trace.zmax) == (-1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relation_map(torch.zeros(0, 2), [], ["x", "y"]), "expected at least one row and one column, got an"),
        (lambda: relation_map(MAP / 0, ["a", "b"], ["x", "y", "z"]), "expected finite values, got 6 NaN or infinite."),
        (lambda: relation_map(MAP, ["a"], ["x", "y", "z"]), "expected 2 rows for the 2 by 3 map, got 1."),
        (lambda: relation_map(MAP, ["a", "b"], ["x"]), "expected 3 columns for the 2 by 3 map, got 1."),
        (
            lambda: relation_map(MAP, ["a", "b"], ["x", "y", "z"], excluded=[True]),
            "expected 2 excluded for the 2 by 3 map, got 1.",
        ),
        (
            lambda: relation_map(MAP, ["a", "b"], ["x", "y", "z"], notes=["n"] * 3),
            "expected 2 notes for the 2 by 3 map, got 3.",
        ),
        (
            lambda: relation_map(MAP, ["a", "b"], ["x", "y", "z"], stderr=MAP[:, :1]),
            "expected stderr of the shape of values, (2, 3), got (2, 1).",
        ),
        (
            lambda: relation_map(MAP, ["a", "b"], ["x", "y", "z"], stderr=MAP),
            "expected finite standard errors of at least 0, got values from -0.3 to 0.25.",
        ),
        (
            lambda: relation_map(MAP, ["a", "b"], ["x", "y", "z"], n_chosen=4),
            "expected n_chosen in 0..3, the number of columns, got 4.",
        ),
    ],
)
def test_relation_map_refuses(unchecked, call, message):
    with pytest.raises(ValueError, match=re.escape(f"relation_map: {message}")):
        call()


# Shares


SHARES = torch.tensor([[0.1, 0.3, 0.6], [0.0, 0.25, 0.75]])


def test_shares_grow_darker_from_zero_with_the_first_row_on_top():
    figure = shares(SHARES, ["L0H1", "\n"], ["a", "<b>", "c\n"], stderr=SHARES / 10, hover=[["one", "two", "<3>"]] * 2)
    trace = figure.data[0]
    np.testing.assert_array_equal(np.asarray(trace.z), SHARES.numpy())
    assert (trace.zmin, trace.zmax) == (0, 0.75)
    assert trace.hovertext[0][1] == "L0H1, &lt;b&gt;<br>attention: 0.3 ± 0.03 (standard error)<br>two"
    assert trace.hovertext[1][2] == "↵, c↵<br>attention: 0.75 ± 0.075 (standard error)<br>&lt;3&gt;"
    assert list(figure.layout.yaxis.ticktext) == ["L0H1", "↵"]
    assert list(figure.layout.xaxis.ticktext) == ["a", "&lt;b&gt;", "c↵"]
    light = [sum(colour_at(trace.colorscale, share)) for share in np.linspace(0, 1, 11)]
    assert all(after < before for before, after in pairwise(light))


def test_shares_without_errors_or_of_zeros():
    trace = shares(torch.zeros(1, 2), ["a"], ["x", "y"], stderr=torch.full((1, 2), math.nan)).data[0]
    assert (trace.zmin, trace.zmax) == (0, 1)
    assert trace.hovertext[0][0] == "a, x<br>attention: 0"


def test_shares_name_as_many_columns_as_have_room_the_last_among_them():
    axis = shares(torch.ones(2, 200), ["a", "b"], [f"token {i}" for i in range(200)]).layout.xaxis
    assert axis.tickvals[-1] == 199 and axis.ticktext[-1] == "token 199"
    assert 40 < len(axis.tickvals) <= 60
    assert {after - before for before, after in pairwise(axis.tickvals)} == {4}
    # words go before signs, whatever place they stand at
    names = [":" if i % 5 else f"word{i}" for i in range(100)]
    axis = shares(torch.ones(2, 100), ["a", "b"], names).layout.xaxis
    assert {name for name in names if name != ":"} <= set(axis.ticktext)
    assert min(after - before for before, after in pairwise(axis.tickvals)) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shares(SHARES, ["a"], ["x", "y", "z"]), "of the 2 by 3 matrix, got 1 and 3 labels"),
        (lambda: shares(SHARES - 0.2, ["a", "b"], ["x", "y", "z"]), "expected values of at least 0, got -0.2"),
        (lambda: shares(SHARES / 0, ["a", "b"], ["x", "y", "z"]), "expected finite values, got 6 NaN or infinite"),
        (lambda: shares(torch.ones(0, 0), [], []), "expected at least one row and one column, got an empty matrix"),
        (
            lambda: shares(SHARES, ["a", "b"], ["x", "y", "z"], hover=[["1"]]),
            "expected hover as 2 rows of 3 texts, got rows of [1]",
        ),
        (
            lambda: shares(SHARES, ["a", "b"], ["x", "y", "z"], stderr=-SHARES),
            "expected finite standard errors of at least 0, got values from -0.75 to -0.",
        ),
    ],
)
def test_shares_refuses(unchecked, call, message):
    with pytest.raises(ValueError, match=f"^shares: .*{re.escape(message)}"):
        call()


# Direct effects


def test_direct_map_shows_heads_mlps_and_the_rest_of_the_sum():
    mlps, others = torch.tensor([0.5, -0.25]), {"embedding": 0.2, "positions": -0.1}
    figure = direct_map(AIE, mlps, others, total=0.43, stderr=(ERRORS, mlps.abs() / 10), outlined=[(1, 2)])
    trace = figure.data[0]
    z = np.asarray(trace.z)
    np.testing.assert_array_equal(z[:, :3], AIE.numpy())
    np.testing.assert_array_equal(z[:, 4], mlps.numpy())
    assert np.isnan(z[:, 3]).all() and [row[3] for row in trace.hovertext] == ["", ""]
    assert (trace.zmin, trace.zmid, trace.zmax) == (-0.5, 0, 0.5)
    assert trace.hovertext[1][2] == "L1H2<br>logits: -0.4 ± 0.04 (standard error)"
    assert trace.hovertext[0][4] == "MLP 0<br>logits: +0.5 ± 0.05 (standard error)"
    assert (
        figure.layout.title.subtitle.text
        == "Sum of all parts +0.43: embedding +0.20, positions -0.10; outlined: the largest of heads (1)"
    )
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "MLP"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 4]
    assert figure.layout.yaxis.range[0] < figure.layout.yaxis.range[1]
    (shape,) = figure.layout.shapes
    assert (shape.x0, shape.x1, shape.y0, shape.y1) == (1.5, 2.5, 0.5, 1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: direct_map(AIE, AIE[0], {}, total=0.0), "heads and MLPs of as many layers, got (2, 3) and (3,)"),
        (lambda: direct_map(AIE, AIE[:, 0], {"x": math.nan}, total=0.0), "finite numbers, got NaN or infinity"),
        (
            lambda: direct_map(AIE, AIE[:, 0], {}, total=0.0, stderr=(AIE, AIE[:, 0])),
            "expected finite standard errors of at least 0, got values from -0.4 to 0.3",
        ),
    ],
)
def test_direct_map_refuses(unchecked, call, message):
    with pytest.raises(ValueError, match=f"^direct_map: .*{re.escape(message)}"):
        call()


# Decoded words


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


# What all figures share

FIGURES = {
    "heatmap": lambda title: heatmap(AIE, stderr=ERRORS, outlined=[(0, 2)], title=title),
    "line_sweep": lambda title: sweep(references={"10-shot": 0.9}, marked=1, title=title),
    "bars": lambda title: bars(["a", "b"], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3], x_title="x", title=title),
    "similarity": lambda title: similarity(torch.eye(3), ["a", "b", "c"], title=title),
    "relation_map": lambda title: relation_map(MAP, ["a", "b"], ["x", "y", "z"], title=title),
    "decoded": lambda title: decoded([" a"], [1.0], title=title),
    "curves": lambda title: curves([1, 5, 20], LINES, BANDS, **TITLES, title=title),
    "training_curves": lambda title: training_curves(**TRAINING, title=title),
    "shares": lambda title: shares(SHARES, ["a", "b"], ["x", "y", "z"], title=title),
    "direct_map": lambda title: direct_map(AIE, AIE[:, 0], {"embedding": 0.1}, total=0.2, title=title),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_figures_share_size_and_template_and_are_the_same_each_time(make):
    figure = make("A title")
    assert isinstance(figure, go.Figure)
    assert figure.layout.width == plots.WIDTH
    assert figure.layout.title.text == "A title"
    assert figure.layout.template == heatmap(AIE).layout.template
    assert figure.to_json() == make("A title").to_json()


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_long_titles_are_wrapped_and_get_room(make):
    short, long = make("A title"), make("A long title " * 12)
    lines = long.layout.title.text.split("<br>")
    assert len(lines) > 1
    assert max(len(line) for line in lines) <= 76
    room = long.layout.margin.t - short.layout.margin.t
    assert room == long.layout.height - short.layout.height >= 18 * (len(lines) - 1)


def test_spread_keeps_order_gap_and_distant_places():
    placed = spread([0.9, 0.5, 0.51, 0.1], 0.1)
    assert placed[0] == 0.9
    assert placed[3] == 0.1
    assert placed[2] - placed[1] == pytest.approx(0.1)
    assert (placed[1] + placed[2]) / 2 == pytest.approx(0.505)


# Dots


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
