"""Maps of heads: data, colours, outlines, hover texts, room, and what is refused; direct effects beside them."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from fvlens.plots import (
    direct_map,
    heatmap,
)
from fvlens.types import Head
from plots.colours import colour_at

AIE = torch.tensor([[0.01, -0.02, 0.3], [0.0, 0.125, -0.4]])
ERRORS = torch.tensor([[0.001, 0.002, 0.03], [0.0, 0.0125, 0.04]])


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
