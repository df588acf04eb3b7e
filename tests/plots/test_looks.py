"""Figures in every look: widths, light and dark, titles, what they say in words, colours that all eyes tell apart."""

import copy
import itertools

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from fvlens.plots import THEMES, WIDTH, Figure, bars, curves, dots, heatmap, looking, similarity
from fvlens.plots._style import SIZES, layout
from plots.every_figure import FIGURES

EVERY = pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)


def type_sizes(plain):
    """Sizes under a key ``font`` or ``tickfont`` anywhere in a figure."""
    found = []
    if isinstance(plain, dict):
        for key, value in plain.items():
            if key.endswith("font") and isinstance(value, dict) and "size" in value:
                found.append(value["size"])
            found += type_sizes(value)
    elif isinstance(plain, list | tuple):
        for value in plain:
            found += type_sizes(value)
    return found


@EVERY
def test_figures_share_size_and_template_and_are_the_same_each_time(make):
    figure = make("A title")
    assert isinstance(figure, go.Figure)
    assert figure.layout.width == WIDTH
    assert figure.layout.title.text == "A title"
    assert figure.layout.template == heatmap(torch.eye(2)).layout.template
    assert figure.to_json() == make("A title").to_json()


@EVERY
def test_long_titles_are_wrapped_and_get_room(make):
    short, long = make("A title"), make("A long title " * 12)
    lines = long.layout.title.text.split("<br>")
    assert len(lines) > 1
    assert max(len(line) for line in lines) <= 76
    room = long.layout.margin.t - short.layout.margin.t
    assert room == long.layout.height - short.layout.height >= 18 * (len(lines) - 1)


@EVERY
def test_a_figure_in_a_column_is_as_wide_as_one_and_its_type_survives(make):
    page = make("A title that says what is to be seen, of how many prompts, and of which")
    column = page.styled(width="column")
    assert (page.layout.width, column.layout.width) == (700, 317)
    assert round(column.layout.width / 96, 1) == 3.3  # inches
    assert 0.75 * min(type_sizes(column.to_plotly_json())) >= 6.75  # points
    assert 0.75 * min(type_sizes(page.to_plotly_json())) >= 6
    margin = column.layout.margin
    assert column.layout.width - margin.l - margin.r >= 120 and column.layout.height - margin.t - margin.b >= 20
    # titles are wrapped to the width: 0.55 of its size is an average character's width
    lines = column.layout.title.text.split("<br>")
    assert len(lines) == 2 and max(map(len, lines)) * 0.55 * 12 < 317
    # the same data, in the same order of traces
    assert [trace.type for trace in page.data] == [trace.type for trace in column.data]
    assert page.to_json() == column.styled(width="page").to_json()


@EVERY
def test_a_title_goes_and_gives_its_room(make):
    figure = make("A title")
    without = figure.styled(title=None)
    assert "A title" not in (without.layout.title.text or "")
    assert without.layout.title.text == (figure.layout.title.subtitle.text or "")  # the note stays
    assert figure.layout.height - without.layout.height == figure.layout.margin.t - without.layout.margin.t > 15
    assert make(None).to_plotly_json()["layout"]["margin"] == without.to_plotly_json()["layout"]["margin"]
    assert figure.styled(title="Another").layout.title.text == "Another"
    dark = without.styled(theme="dark")  # what is not changed stays
    assert (dark.layout.title.text or "").lower().replace("white", "black") == (without.layout.title.text or "").lower()


@EVERY
def test_a_figure_says_in_words_what_it_shows(make):
    figure = make("A title")
    assert isinstance(figure, Figure)
    assert figure.alt.startswith("A title. ") and len(figure.alt) > 30
    assert figure.styled(title=None).alt == figure.alt
    assert not make(None).alt.startswith(("A title", "."))


@EVERY
def test_nothing_light_is_left_in_the_dark(make):
    dark = make("A title").styled(theme="dark")
    assert dark.layout.template.layout.paper_bgcolor == THEMES["dark"].paper
    text = dark.to_json()
    light = THEMES["light"]
    left = [name for name in ("ink", "grey", "grid", "paper", "muted") if getattr(light, name) in text.lower()]
    if "ffffff" in THEMES["dark"].lines[-1][0]:  # white is the colour of a line there
        left = [name for name in left if name != "paper"]
    assert not left
    assert '"color":"black"' not in text and "rgba(255, 255, 255" not in text


def test_words_of_bars_and_maps_hold_their_numbers():
    figure = bars(["no vector", "vector"], [0.2, 0.9], [0.1, 0.8], [0.3, 1.0], x_title="Top-1")
    assert figure.alt == "Bars of Top-1: no vector 0.2 (0.1 to 0.3), vector 0.9 (0.8 to 1)"
    figure = heatmap(torch.tensor([[0.1, -0.2], [0.0, 0.4]]), outlined=[(1, 1)], title="Effects.")
    assert figure.alt == ("Effects. Map of AIE, 2 layers by 2 heads, from -0.2 (L0H1) to +0.4 (L1H1). Outlined: L1H1")
    figure = curves([1, 5], {"a": [0.0, 0.5]}, {"a": ([0, 0.25], [0, 0.75])}, x_title="Pairs", y_title="Top-1")
    assert figure.alt.endswith(
        "a: from 0 (0 to 0) at 1 to 0.5 (0.25 to 0.75) at 5, lowest 0 (0 to 0) at 1, highest 0.5 (0.25 to 0.75) at 5"
    )


def test_a_block_of_figures_has_one_look():
    with looking(width="column", theme="dark"):
        figure = bars(["a"], [1.0], x_title="x")
    assert (figure.layout.width, figure.layout.template.layout.paper_bgcolor) == (317, THEMES["dark"].paper)
    assert bars(["a"], [1.0], x_title="x").layout.width == 700
    with pytest.raises(RuntimeError, match="stop"), looking(width="column"):
        raise RuntimeError("stop")
    assert bars(["a"], [1.0], x_title="x").layout.width == 700


def test_the_style_is_registered_with_plotly():
    for name, theme in (("fvlens", "light"), ("fvlens-dark", "dark")):
        own = go.Figure(layout={"template": name})
        assert own.layout.template.layout.paper_bgcolor == THEMES[theme].paper
        assert own.layout.template == bars(["a"], [1.0], x_title="x").styled(theme=theme).layout.template
    assert plotly.io.templates.default == "plotly"  # and stays an offer


def test_a_look_that_there_is_not_is_refused(unchecked):
    figure = bars(["a"], [1.0], x_title="x")
    with pytest.raises(ValueError, match="figure: width='narrow'; expected one of 'page', 'column'"):
        figure.styled(width="narrow")
    with pytest.raises(ValueError, match="figure: theme='grey'; expected one of 'light', 'dark'"):
        figure.styled(theme="grey")
    with pytest.raises(ValueError, match="styled: this figure is a copy, which has a look and no data; make it anew"):
        copy.deepcopy(figure).styled(width="column")


def test_notes_are_wrapped_and_get_room():
    short, long = layout("T", height=300, note="a note"), layout("T", height=300, note="many words " * 15)
    lines = long["title"]["subtitle"]["text"].split("<br>")
    assert len(lines) == 2 and max(map(len, lines)) <= SIZES["page"].note
    assert long["margin"]["t"] - short["margin"]["t"] == long["height"] - short["height"] >= 14


def test_long_names_keep_their_ends_in_a_column():
    names = ["adjective-comparative", "adjective-superlative"]
    figure = similarity(torch.eye(2), names).styled(width="column")
    shown = list(figure.layout.yaxis.ticktext)
    assert len(set(shown)) == 2 and all(len(name) <= 16 and name.endswith("ative") for name in shown)
    assert list(similarity(torch.eye(2), names).layout.yaxis.ticktext) == names
    many = similarity(torch.eye(40), [f"relation {i}" for i in range(40)]).styled(width="column")
    inside = many.layout.height - many.layout.margin.t - many.layout.margin.b
    step = many.layout.yaxis.tickvals[1] - many.layout.yaxis.tickvals[0]
    assert inside / 40 * step >= many.layout.yaxis.tickfont.size
    wide = 317 - many.layout.margin.l - many.layout.margin.r
    step = many.layout.xaxis.tickvals[1] - many.layout.xaxis.tickvals[0]
    assert wide / 40 * step >= many.layout.xaxis.tickfont.size - 2


# Colours, as eyes with one kind of cone missing see them: Machado et al. 2009, table 1, severity 1.0

EYES = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip


def linear(colour):
    share = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(colour, eyes):
    """CIE L*a*b* of a colour (D65), as these eyes see it."""
    seen = np.clip(np.asarray(EYES[eyes]) @ linear(colour), 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = (
        np.cbrt(v) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116
        for v in np.asarray(to_xyz) @ seen / [0.95047, 1, 1.08883]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(a, b, eyes):
    return np.linalg.norm(lab(a, eyes) - lab(b, eyes))


def contrast(a, b):
    low, high = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def test_the_simulation_knows_what_is_seen():
    white, green, red = lab("#ffffff", "all cones"), lab("#00ff00", "all cones"), lab("#ff0000", "all cones")
    np.testing.assert_allclose(white, [100, 0, 0], atol=0.02)
    np.testing.assert_allclose(green, [87.73, -86.18, 83.18], atol=0.02)
    np.testing.assert_allclose(red, [53.24, 80.09, 67.20], atol=0.02)
    assert apart("#D55E00", "#B8860B", "deuteranopia") < 5 < apart("#D55E00", "#B8860B", "all cones")


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colours_are_told_apart(theme, eyes):
    # 2.3 is what is just noticed side by side
    lines = [colour for colour, _, _ in theme.lines]
    assert min(apart(a, b, eyes) for a, b in itertools.combinations(lines, 2)) > 15
    assert min(apart(a, b, eyes) for a, b in itertools.combinations(theme.references, 2)) > 10
    assert apart(theme.accent, theme.negative, eyes) > 60
    assert apart(theme.accent, theme.muted, eyes) > 20
    # equally far from 0 on either side; and further from 0 is further from the paper's lightness
    scale = [colour for _, colour in theme.diverging]
    assert min(apart(scale[i], scale[-1 - i], eyes) for i in range(3)) > 40
    for half in (scale[4:], scale[4::-1], [colour for _, colour in theme.sequential]):
        lightness = [lab(colour, eyes)[0] for colour in half]
        steps = np.diff(lightness) * (1 if theme.paper < "#8" else -1)
        assert (steps > 0).all()


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_and_lines_stand_out_from_the_paper(theme):
    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.grey, theme.paper) > 4.5
    assert min(contrast(colour, theme.paper) for colour, _, _ in theme.lines) > 3


def test_lines_and_dots_differ_in_more_than_colour():
    for theme in THEMES.values():
        assert len({dash for _, dash, _ in theme.lines}) == len({marker for *_, marker in theme.lines}) == 6
    figure = dots([0.1, 0.5], [0.9, 0.6], ["a", "b"], groups=["x", "y"], x_title="x", y_title="y")
    assert len({trace.marker.symbol for trace in figure.data}) == 2


def test_signed_bars_have_two_colours_and_say_so():
    figure = bars(["a", "b", "c"], [0.5, -0.25, 0.1], x_title="Weight", signed=True)
    light = THEMES["light"]
    assert list(figure.data[0].marker.color) == [light.accent, light.negative, light.accent]
    assert figure.layout.title.text == "Blue: above 0, orange: below"
    assert bars(["a"], [0.5], x_title="Weight", signed=True).layout.title.text == ""
    assert set(bars(["a", "b"], [1, -1], x_title="x").data[0].marker.color) == {light.accent}


def test_intervals_say_their_level():
    def note(**how):
        return bars(["a"], [0.5], [0.4], [0.6], x_title="x", **how).layout.title.text

    assert note() == "Whiskers: 95% interval of the mean"
    assert note(level=0.9, note="3 seeds") == "Whiskers: 90% interval of the mean; 3 seeds"


def test_references_that_do_not_fit_side_by_side_stand_one_above_the_other():
    names = {"ten demonstrations": 0.9, "the bare query": 0.1, "untuned vector": 0.5}
    figure = bars(["a", "b"], [0.3, 0.6], x_title="Top-1", references=names)
    small = figure.styled(width="column")
    assert {note.yshift for note in figure.layout.annotations[-3:]} == {0}
    shifts = [note.yshift for note in small.layout.annotations[-3:]]
    assert shifts[0] == 0 and min(np.diff(shifts)) >= SIZES["column"].line
    inside = 317 - small.layout.margin.l - small.layout.margin.r
    for note in small.layout.annotations[-3:]:
        half = 5.5 * len(note.text) / 2
        assert note.x * inside - half >= -1 and note.x * inside + half <= inside + 1
