"""Maps of signed numbers that stand one extreme head: where the scale ends, what is marked, which heads are named."""

import math
import re

import pytest
import torch

from fvlens.plots import THEMES, direct_map, heatmap, relation_map, token_map

SMALL = torch.linspace(-0.05, 0.05, 100).reshape(10, 10)


def extreme(value=1.0):
    z = SMALL.clone()
    z[3, 4] = value
    return z


def triangles(figure):
    """Layer, head and direction of each triangle."""
    marks = [trace for trace in figure.data if trace.type == "scatter"]
    return [
        (round(y), x, symbol)
        for trace in marks
        for x, y, symbol in zip(trace.x, trace.y, trace.marker.symbol, strict=True)
    ]


@pytest.mark.parametrize("sign", [1, -1])
def test_one_extreme_head_does_not_make_the_others_pale(sign):
    figure = heatmap(extreme(sign * 1.0))
    trace = figure.data[0]
    # of 100 cells the largest is left out: the scale ends at the second largest
    assert trace.zmax == -trace.zmin == pytest.approx(0.05)
    assert triangles(figure) == [(3, 4, "triangle-up" if sign > 0 else "triangle-down")]
    assert figure.data[1].hoverinfo == "skip" and trace.hovertext[3][4] == f"L3H4<br>AIE: {sign:+}"
    assert figure.styled(title="T").layout.title.subtitle.text == (
        "Scale holds 99% of the cells, to 0.05; triangles: beyond it (1)"
    )
    assert not triangles(heatmap(SMALL)) and heatmap(SMALL).data[0].zmax == pytest.approx(0.05)


def test_the_largest_is_shown_where_it_is_not_extreme_or_the_map_is_small():
    assert heatmap(extreme(0.099)).data[0].zmax == pytest.approx(0.099)
    assert heatmap(extreme(0.101)).data[0].zmax == pytest.approx(0.05)
    few = torch.full((3, 5), 0.01)
    few[0, 0] = 1.0
    assert heatmap(few).data[0].zmax == 1.0
    # all others 0: nothing to hold, so the scale is of the one
    alone = torch.zeros(10, 10)
    alone[0, 0] = 1.0
    assert heatmap(alone).data[0].zmax == 1.0


def test_the_end_of_the_scale_is_given_or_lifted():
    figure = heatmap(SMALL, zmax=0.04, title="T")
    beyond = (SMALL.abs() > 0.04).nonzero().tolist()
    assert [list(place[:2]) for place in triangles(figure)] == beyond and len(beyond) == 20
    assert figure.data[0].zmax == 0.04
    assert figure.layout.title.subtitle.text == "Scale ends at 0.04; triangles: beyond it (20)"
    assert heatmap(SMALL, zmax=2, title="T").layout.title.subtitle.text is None
    assert heatmap(extreme(), clip=None).data[0].zmax == 1.0
    assert heatmap(extreme(), clip=0.5).data[0].zmax == pytest.approx(float(extreme().abs().flatten().sort()[0][49]))


def test_every_map_of_heads_has_the_same_scale():
    z = extreme()
    names = [f"L0H{i}" for i in range(10)]
    for figure in (
        relation_map(z, list("abcdefghij"), names),
        token_map(z, list("abcdefghij"), names, clip=0.99),
        direct_map(z, SMALL[:, 0], {}, total=0.0),
    ):
        assert figure.data[0].zmax == pytest.approx(0.05) and triangles(figure) == [(3, 4, "triangle-up")]
    assert relation_map(z, list("abcdefghij"), names, zmax=0.5).data[0].zmax == 0.5
    assert direct_map(z, SMALL[:, 0], {}, total=0.0, clip=None).data[0].zmax == 1.0
    missing = z.clone()
    missing[0, 0] = math.nan
    assert triangles(heatmap(missing)) == [(3, 4, "triangle-up")]


def test_outlined_heads_are_named_in_their_cells_where_they_fit():
    figure = heatmap(SMALL[:, :6], outlined=[(9, 5), (0, 0)])
    assert [(note.text, note.x, note.y, note.xshift) for note in figure.layout.annotations] == [
        ("L9H5", 5, 9, 0), ("L0H0", 0, 0, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("width", ["page", "column"])
def test_names_beside_cells_touch_neither_each_other_nor_an_outlined_cell(width):
    z = torch.zeros(32, 32)
    heads = [(12, 3), (12, 4), (13, 3), (12, 5), (31, 31), (0, 0), (31, 0), (0, 31), (20, 16), (20, 17)]
    figure = heatmap(z, outlined=heads).styled(width=width)
    margin, x, y = figure.layout.margin, figure.layout.xaxis.range, figure.layout.yaxis.range
    # the scale stands on the right
    inside = figure.layout.width - margin.l - (86 if width == "page" else 62)
    wide, high = inside / (x[1] - x[0]), (figure.layout.height - margin.t - margin.b) / (y[1] - y[0])
    boxes = []
    for note in figure.layout.annotations:
        length, middle = 0.55 * note.font.size * len(note.text), note.y * high + note.yshift
        start = note.x * wide + note.xshift - length * {"left": 0, "right": 1, "center": 0.5}[note.xanchor]
        boxes.append((start, start + length, middle - 4, middle + 4))
    assert len(boxes) >= 7
    cells = [((h - 0.5) * wide, (h + 0.5) * wide, (n - 0.5) * high, (n + 0.5) * high) for n, h in heads]
    for i, (a, b, c, d) in enumerate(boxes):
        assert a >= -0.5 * wide - 1 and b <= 31.5 * wide + 1
        assert not any(a < f - 0.5 and e < b - 0.5 and c < h and g < d for e, f, g, h in [*boxes[:i], *cells])


def test_outlines_and_their_name_follow_the_paper():
    dark = heatmap(SMALL, outlined=[(1, 1)], title="T").styled(theme="dark")
    assert dark.layout.title.subtitle.text == "White outline: top heads (1)"
    assert [shape.line.color for shape in dark.layout.shapes] == ["white"]
    assert dark.data[0].colorscale[4][1] == THEMES["dark"].diverging[4][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(zmax=0), "heatmap: expected zmax above 0, where the scale ends, got 0."),
        (dict(zmax=math.inf), "heatmap: expected zmax above 0, where the scale ends, got inf."),
        (dict(clip=0), "heatmap: expected clip above 0 and at most 1, a share of the cells, got 0."),
        (dict(clip=1.5), "heatmap: expected clip above 0 and at most 1, a share of the cells, got 1.5."),
    ],
)
def test_scales_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        heatmap(SMALL, **options)
