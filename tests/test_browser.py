"""The report page in a real browser without a network: it draws, answers to the mouse, and asks for nothing."""

import csv
import dataclasses
import time

import numpy as np
import pytest
from chromium import cut_off, opened_browser
from runs import small_run

from fvlens.plots import DIVERGING, THEMES
from fvlens.report import write_report

pytestmark = pytest.mark.browser

N_FIGURES = 7


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as opened:
        yield opened


@dataclasses.dataclass
class Visit:
    """A page that was opened from a file, and what it asked for and complained of."""

    page: object
    requests: list
    complaints: list


def until(page, said, seconds=60):
    """Wait until a script says yes; playwright's own way evaluates text in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(said):
        assert time.monotonic() < end, said
        page.wait_for_timeout(50)


@pytest.fixture
def visit(browser, tmp_path):
    """Open the report of a run in a window of its own, with the network off."""
    contexts = []

    def open_report(result, width=1000, **how):
        path = write_report(tmp_path / "report.html", result)
        context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        contexts.append(context)
        requests, complaints = [], []
        context.route(lambda url: url.startswith(("http", "ws")), lambda route: route.abort())
        context.set_offline(True)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on(
            "console", lambda line: complaints.append(f"{line.type}: {line.text}") if line.type == "error" else None
        )
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri(), wait_until="load")
        until(page, f"[...document.querySelectorAll('.drawn')].filter(p => p._fullLayout).length == {N_FIGURES}")
        return Visit(page, requests, complaints)

    yield open_report
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def result(model):
    return small_run(model)


COLOURS = """async () => {
    const plot = document.querySelector('.js-plotly-plot');
    const {xaxis, yaxis} = plot._fullLayout;
    const element = plot.querySelector('.heatmaplayer image');
    const picture = new Image();
    picture.src = element.href.baseVal;
    await picture.decode();
    const canvas = document.createElement('canvas');
    canvas.width = picture.width;
    canvas.height = picture.height;
    const context = canvas.getContext('2d');
    context.drawImage(picture, 0, 0);
    const box = Object.fromEntries(['x', 'y', 'width', 'height'].map(k => [k, element[k].baseVal.value]));
    const [nLayers, nHeads] = [plot.data[0].y.length, plot.data[0].x.length];
    return Array.from({length: nLayers}, (_, layer) => Array.from({length: nHeads}, (_, head) => {
        const x = (xaxis.l2p(head) - box.x) * picture.width / box.width;
        const y = (yaxis.l2p(layer) - box.y) * picture.height / box.height;
        return Array.from(context.getImageData(x, y, 1, 1).data);
    }));
}"""
"""Colour that the first figure shows at the middle of each cell, layer by head."""

CELL = """([layer, head]) => {
    const plot = document.querySelector('.js-plotly-plot');
    plot.scrollIntoView({block: 'center', behavior: 'instant'});
    const box = plot.getBoundingClientRect();
    const {xaxis, yaxis} = plot._fullLayout;
    return [box.left + xaxis._offset + xaxis.l2p(head), box.top + yaxis._offset + yaxis.l2p(layer)];
}"""
"""Where in the window the middle of a cell is."""


def test_page_opens_without_a_network_and_without_errors(visit, result):
    seen = visit(result)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("data:", "blob:"))] == [seen.page.url]
    assert seen.page.url.startswith("file://")
    assert seen.page.title() == "antonym: function vector on rel-small"


def test_heatmap_is_drawn_in_the_colours_of_its_values(visit, result):
    seen = visit(result)
    plot = seen.page.locator(".js-plotly-plot").first
    assert plot.locator(".heatmaplayer image").count() > 0
    aie = result.effects["permuted"].aie.double().numpy()
    stops = [stop for stop, _ in DIVERGING]
    scale = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in DIVERGING])
    share = 0.5 + aie / (2 * abs(aie).max())
    expected = np.stack([np.interp(share, stops, scale[:, i]) for i in range(3)], axis=-1)
    shown = np.array(seen.page.evaluate(COLOURS))
    assert (shown[..., 3] == 255).all()
    np.testing.assert_allclose(shown[..., :3], expected, atol=4)
    assert len(np.unique(shown.reshape(-1, 4), axis=0)) > 3
    outlines = plot.locator(".shapelayer path")
    assert outlines.count() == len(result.vector.heads)
    assert seen.page.locator(".js-plotly-plot .heatmaplayer image").count() == 2


def test_hovering_over_a_cell_shows_its_value_and_standard_error(visit, result):
    seen = visit(result)
    effects = result.effects["permuted"]
    aie, stderr = effects.aie, effects.stderr
    n_layers, n_heads = aie.shape
    labels = seen.page.locator(".js-plotly-plot").first.locator(".hoverlayer .hovertext")
    for layer, head in (effects.top(1)[0], (0, 0), (n_layers - 1, n_heads - 1)):
        seen.page.mouse.move(2, 2)
        labels.wait_for(state="detached", timeout=10_000)
        x, y = seen.page.evaluate(CELL, [layer, head])
        seen.page.mouse.move(x - 2, y - 2)
        seen.page.mouse.move(x, y)
        labels.first.wait_for(state="visible", timeout=10_000)
        text = labels.first.text_content()
        assert text.startswith(f"L{layer}H{head}")
        assert f"AIE: {aie[layer, head].item():+.4g} ± {stderr[layer, head].item():.2g} (standard error)" in text
    assert seen.complaints == []


def shown_rows(page):
    """Texts of the rows of the table of queries that are not filtered out."""
    rows = page.locator("#samples tbody tr:visible")
    return [[cell.strip() for cell in row.locator("td").all_text_contents()] for row in rows.all()]


def test_queries_sort_and_filter_and_are_saved(visit, result, tmp_path):
    seen = visit(result)
    page, first = seen.page, shown_rows(seen.page)
    assert len(first) == result.n_test
    assert page.locator(".tools[data-table=samples] output").text_content() == f"{len(first)} of {len(first)}"
    button = page.locator("#samples thead th button").nth(1)
    button.click()
    assert [row[1] for row in shown_rows(page)] == sorted((row[1] for row in first), key=str.lower)
    button.click()
    assert [row[1] for row in shown_rows(page)] == sorted((row[1] for row in first), key=str.lower, reverse=True)
    button.click()
    assert shown_rows(page) == first
    word = first[-1][0]
    page.locator("input[type=search]").fill(word.upper())
    found = [row for row in first if any(word in cell for cell in row)]
    assert shown_rows(page) == found and 0 < len(found) < len(first)
    page.locator("input[type=search]").fill("")
    page.locator("input[type=checkbox]").check()
    missed = [row for row in first if "\N{CHECK MARK}" not in row[4]]
    assert shown_rows(page) == missed
    with page.expect_download() as saved:
        page.locator(".tools[data-table=samples] button").click()
    saved.value.save_as(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading[:2] == ["query", "answer"] and rows == missed
    assert seen.complaints == []


def test_figures_are_saved_and_heads_copied(visit, result, tmp_path):
    seen = visit(result, permissions=["clipboard-read", "clipboard-write"])
    page = seen.page
    tools = page.locator(".figure .tools").first
    for format, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as saved:
            tools.locator(f"[data-save={format}]").click()
        saved.value.save_as(tmp_path / f"figure.{format}")
        assert (tmp_path / f"figure.{format}").read_bytes().startswith(start)
    with page.expect_download() as saved:
        tools.locator("[data-save=csv]").click()
    saved.value.save_as(tmp_path / "figure.csv")
    with (tmp_path / "figure.csv").open(encoding="utf-8", newline="") as file:
        points = {(int(row["y"]), int(row["x"])): float(row["value"]) for row in csv.DictReader(file) if row["value"]}
    aie = result.effects["permuted"].aie
    assert len(points) == aie.numel()
    assert all(value == pytest.approx(float(aie[place]), abs=1e-6) for place, value in points.items())
    page.locator("button[data-copy=heads]").click()
    until(page, "document.querySelector('[data-copy=heads]').textContent == 'copied'", 5)
    assert page.evaluate("navigator.clipboard.readText()") == ",".join(map(str, result.vector.heads))
    assert seen.complaints == []


def test_figures_follow_the_colours_and_the_width_of_the_window(visit, result):
    seen = visit(result, color_scheme="dark")
    look = "() => [...document.querySelectorAll('.drawn')].map(p => [p._fullLayout.paper_bgcolor, p._fullLayout.width])"
    paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(27, 27, 27)"
    assert seen.page.evaluate(look) == [[THEMES["dark"].paper, 700]] * N_FIGURES
    seen.page.set_viewport_size({"width": 390, "height": 800})
    seen.page.emulate_media(color_scheme="light")
    until(seen.page, f"({look})().every(one => one[0] == '{THEMES['light'].paper}' && one[1] == 317)")
    assert seen.complaints == []


@pytest.mark.parametrize("width", [1000, 700, 390])
def test_nothing_is_cut_off(visit, result, width):
    """On a narrow screen figures are those of a column, and the page does not scroll sideways."""
    seen = visit(result, width)
    assert seen.page.evaluate(cut_off()) == []
    assert seen.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_odd_names_are_shown_and_not_run(visit, result):
    name = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    rename = lambda parts: {key: dataclasses.replace(part, relation=name) for key, part in parts.items()}  # noqa: E731
    odd = dataclasses.replace(result, relation=name, effects=rename(result.effects), decoded=((name, 1.0),))
    vector = dataclasses.replace(result.tuned.vector, relation=name)
    run = dataclasses.replace(result.tuned.run, vector=vector)
    odd = dataclasses.replace(
        odd, tuned=dataclasses.replace(result.tuned, run=run, vector=vector, decoded=((name, 1.0),))
    )
    seen = visit(odd)
    assert seen.complaints == []
    assert seen.page.evaluate("document.images.length") == 0
    assert seen.page.locator("h1").text_content() == name
    title = seen.page.locator(".js-plotly-plot .gtitle").first.text_content()
    assert name.replace(" ", "") in title.replace(" ", "")  # the title wraps at a space
