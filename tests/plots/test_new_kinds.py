"""Figures of prompts, tokens, places and pairs: their numbers against plain ones, and what they refuse."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from fvlens.metrics import mds
from fvlens.plots import THEMES, distribution, paired_bars, place_map, token_bars, token_map

ROWS = [[0.1, 0.3, 0.2, 0.6], [-0.2, 0.0, 0.1]]


def test_distribution_shows_every_prompt_and_the_mean_with_its_interval():
    figure = distribution(["L1H2", "<b>"], ROWS, x_title="CIE", title="T")
    dots, means = figure.data
    assert list(dots.x) == [*ROWS[0], *ROWS[1]]
    assert [round(y) for y in dots.y] == [0] * 4 + [1] * 3 and len({round(y, 6) for y in dots.y[:4]}) == 4
    np.testing.assert_allclose(means.x, [np.mean(row) for row in ROWS])
    halves = [stats.norm.ppf(0.975) * stats.sem(row) for row in ROWS]
    np.testing.assert_allclose(means.error_x.array, halves, rtol=1e-4)
    assert dots.hovertext[5] == "&lt;b&gt;, prompt 1<br>CIE: +0"
    assert means.hovertext[0].startswith("L1H2, mean of 4<br>CIE: +0.3<br>95% interval: ")
    assert figure.layout.title.subtitle.text == "A dot a prompt; diamond: mean, with its 95% interval"
    assert list(figure.layout.yaxis.ticktext) == ["L1H2", "&lt;b&gt;"]
    low, high = figure.layout.xaxis.range
    assert low < -0.2 and high > 0.6
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first on top


def test_a_single_prompt_has_no_interval():
    figure = distribution(["a"], [[0.5]], x_title="x", title="T")
    assert figure.data[1].hovertext[0] == "a, mean of 1<br>x: +0.5"
    assert figure.layout.title.subtitle.text == "A dot a prompt; diamond: mean"


def test_token_bars_stand_in_the_order_of_the_text_coloured_by_kind():
    figure = token_bars([0.1, 0.2, 0.3, 0.4], ["<big>", ":", "small", "\n"], ["input", "mark", "label", "mark"])
    inputs, marks, labels = figure.data
    assert (list(marks.x), list(marks.y), marks.name) == ([1, 3], [0.2, 0.4], "mark")
    assert (list(inputs.x), list(labels.x)) == ([0], [2])
    assert marks.hovertext[1] == "↵, mark<br>attention: 0.4" and inputs.hovertext[0].startswith("&lt;big&gt;, input")
    assert len({trace.marker.color for trace in figure.data}) == 3 and figure.layout.showlegend
    assert list(figure.layout.xaxis.ticktext) == ["&lt;big&gt;", ":", "small", "↵"]
    plain = token_bars([0.1, 0.2], ["a", "b"])
    assert not plain.layout.showlegend and plain.data[0].hovertext[0] == "a<br>attention: 0.1"
    crowded = token_bars([0.1] * 200, [f"token {i}" for i in range(200)])
    assert crowded.layout.xaxis.tickvals[-1] == 199 and 30 < len(crowded.layout.xaxis.tickvals) < 80


def test_eight_kinds_of_tokens_have_eight_colours():
    for theme in THEMES:
        figure = token_bars([0.1] * 8, list("abcdefgh"), list("abcdefgh")).styled(theme=theme)
        assert len({trace.marker.color for trace in figure.data}) == 8


def test_token_map_has_the_first_layer_that_is_given_on_top():
    z = torch.tensor([[0.25, -0.5, 0.0], [0.1, 0.2, 0.3]])
    figure = token_map(z, ["layer 1", "layer 0"], ["a", "\n", "<"], hover=[["one", "two", "three"]] * 2, title="T")
    np.testing.assert_array_equal(np.asarray(figure.data[0].z), z.numpy())
    assert (figure.data[0].zmin, figure.data[0].zmid, figure.data[0].zmax) == (-0.5, 0, 0.5)
    assert figure.data[0].hovertext[0][1] == "layer 1, ↵<br>effect: -0.5<br>two"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert list(figure.layout.xaxis.ticktext) == ["a", "↵", "&lt;"]
    assert figure.data[0].colorscale[0][1] == THEMES["light"].diverging[0][1]


def test_places_keep_their_distances_on_the_paper():
    places = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 3.0], [1.0, 1.0]])
    for width in ("page", "column"):
        figure = place_map(places, list("abcd"), groups=["x", "y", "x", "y"], note="n", title="T").styled(width=width)
        margin = figure.layout.margin
        (x0, x1), (y0, y1) = figure.layout.xaxis.range, figure.layout.yaxis.range
        across = (figure.layout.width - margin.l - margin.r) / (x1 - x0)
        up = (figure.layout.height - margin.t - margin.b) / (y1 - y0)
        assert across == pytest.approx(up, rel=0.01)
        assert x0 < 0 and x1 > 4 and y0 < 0 and y1 > 3
        assert {note.text for note in figure.layout.annotations} == set("abcd")
    x, y = figure.data
    assert (list(x.x), list(x.y), list(y.x), list(y.y)) == ([0, 4], [0, 3], [4, 1], [0, 1])
    assert x.marker.symbol != y.marker.symbol and x.hovertext[1] == "c<br>x"
    one = place_map(torch.zeros(1, 2), ["alone"])
    assert not one.layout.showlegend and one.layout.xaxis.range[0] < 0 < one.layout.xaxis.range[1]


def test_pairs_stand_side_by_side():
    figure = paired_bars([" a", "<b>"], [0.1, 0.6], torch.tensor([0.75, 0.25]), title="T")
    before, after = figure.data
    assert (list(before.x), list(after.x)) == ([0.1, 0.6], [0.75, 0.25])
    assert before.marker.color == THEMES["light"].muted and after.marker.color == THEMES["light"].accent
    assert all(a < round(b) < c for a, b, c in zip(before.y, [0, 1], after.y, strict=True))
    assert after.hovertext[1] == "&lt;b&gt;<br>with the vector: 0.25" and list(after.text) == ["0.750", "0.250"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distribution([], [], x_title="x"), "distribution: expected at least one row, got none."),
        (
            lambda: distribution(["a"], ROWS, x_title="x"),
            "distribution: expected data of one length, got labels 1, sam",
        ),
        (lambda: distribution(["a"], [[]], x_title="x"), "distribution: expected at least one number in the row of a"),
        (lambda: distribution(["a"], [[math.nan]], x_title="x"), "distribution: expected finite numbers in the row of"),
        (lambda: token_bars([], []), "token_bars: expected at least one number in values, got none"),
        (
            lambda: token_bars([1.0], ["a"], []),
            "token_bars: expected data of one length, got values 1, tokens 1, kinds",
        ),
        (lambda: token_bars([math.inf], ["a"]), "token_bars: expected finite numbers in values, got inf"),
        (
            lambda: token_map(torch.ones(1, 2), ["a"], ["b"]),
            "token_map: expected one label a row and a column of the 1",
        ),
        (
            lambda: token_map(torch.ones(1, 1) / 0, ["a"], ["b"]),
            "token_map: expected finite values, got 1 NaN or infin",
        ),
        (
            lambda: token_map(torch.ones(1, 1), ["a"], ["b"], hover=[[]]),
            "token_map: expected hover as 1 rows of 1 texts",
        ),
        (
            lambda: token_map(torch.ones(0, 0), [], []),
            "token_map: expected at least one row and one column, got an emp",
        ),
        (lambda: place_map(torch.ones(0, 2), []), "place_map: expected a name and a group for each of at least one pl"),
        (lambda: place_map(torch.ones(2, 2), ["a"]), "got 2 places, 1 names and 2 groups."),
        (lambda: place_map(torch.ones(1, 2) / 0, ["a"]), "place_map: expected finite places, got NaN or infinity"),
        (lambda: paired_bars([], [], []), "paired_bars: expected at least one number in before, got none"),
        (
            lambda: paired_bars(["a"], [1.0], [1.0, 2.0]),
            "paired_bars: expected data of one length, got labels 1, before",
        ),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# The scaling behind a map of vectors


def stress_of(places, wanted):
    return math.sqrt(float(((torch.cdist(places, places) - wanted) ** 2).sum() / (wanted**2).sum()))


def test_distances_that_the_plane_holds_are_found_again():
    places = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0])
    wanted = torch.cdist(places, places)
    found, stress = mds(wanted)
    torch.testing.assert_close(torch.cdist(found, found), wanted, atol=1e-3, rtol=0)
    assert stress < 1e-4
    assert float(found[:, 0].var()) > float(found[:, 1].var())  # the longer axis first
    assert all(float(axis[axis.abs().argmax()]) > 0 for axis in found.T)
    assert float(found.mean(dim=0).abs().max()) < 1e-5


def test_the_stress_is_a_minimum_and_the_same_each_time():
    points = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
    wanted = torch.cdist(points, points)
    found, stress = mds(wanted)
    assert stress == pytest.approx(stress_of(found, wanted), abs=1e-5)
    # no small move of any coordinate lowers it by more than the steps that were left out
    at = found.double().requires_grad_()
    distances = (at[:, None] - at[None]).pow(2).sum(-1).add(1e-12).sqrt()
    loss = ((distances - wanted.double()) ** 2).sum() / (wanted.double() ** 2).sum()
    loss.backward()
    assert float(at.grad.abs().max()) < 2e-3
    # lower than that of the first two axes of the points themselves
    assert stress < stress_of(torch.linalg.svd(points - points.mean(0))[0][:, :2], wanted)
    again, other = mds(wanted)
    assert torch.equal(found, again) and stress == other


def test_few_and_equal_points():
    places, stress = mds(torch.zeros(1, 1))
    assert torch.equal(places, torch.zeros(1, 2)) and stress == 0
    places, stress = mds(torch.zeros(3, 3))
    assert torch.equal(places, torch.zeros(3, 2)) and stress == 0
    places, stress = mds(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    assert float((places[0] - places[1]).norm()) == pytest.approx(2) and stress < 1e-6


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (torch.tensor([[0.0, -1.0], [-1.0, 0.0]]), "mds: expected finite distances of at least 0."),
        (torch.tensor([[0.0, math.nan], [math.nan, 0.0]]), "mds: expected finite distances of at least 0."),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "mds: expected symmetric distances that are 0 on the diagonal."),
        (torch.tensor([[1.0, 1.0], [1.0, 1.0]]), "mds: expected symmetric distances that are 0 on the diagonal."),
    ],
)
def test_what_are_no_distances_is_refused(distances, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mds(distances)
