"""Matrices: similarity, relations by heads, shares; room for names, and what is refused."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from fvlens import plots
from fvlens.plots import (
    heatmap,
    relation_map,
    shares,
    similarity,
)
from plots.colours import colour_at


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
    assert trace.colorscale == heatmap(torch.eye(3)).data[0].colorscale
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
