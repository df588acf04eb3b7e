"""Figures as files: pages and pictures through one function, what is missing said in words, notebooks that go on."""

import re
import shutil
import struct
import xml.etree.ElementTree as xml
import zlib

import plotly.graph_objects as go
import plotly.io
import plotly.io._renderers
import pytest

from fvlens.plots import _figure as figures
from fvlens.plots import _save as saving
from fvlens.plots import bars, check_figure_file, one_browser, save
from fvlens.plots._save import block

needs_chromium = pytest.mark.skipif(
    saving.missing_for_pictures() is not None, reason=f"pictures need {saving.missing_for_pictures()}"
)


def figure(title="Scores of <b>two</b> vectors"):
    return bars(["no <vector>", "vector"], [0.2, 0.9], x_title="Top-1", title=title)


ALT = "Scores of <b>two</b> vectors. Bars of Top-1: no <vector> 0.2, vector 0.9"


@pytest.fixture
def nothing_draws(monkeypatch):
    monkeypatch.setattr(saving, "missing_for_pictures", lambda: "Chromium")
    monkeypatch.setattr(figures, "_said", set())

    def fails(*args, **how):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(go.Figure, "to_image", fails)
    monkeypatch.setattr(plotly.io, "to_image", fails)
    monkeypatch.setattr("plotly.io._base_renderers.to_image", fails)


def test_a_page_is_one_file_that_works_offline(tmp_path):
    path = figure().save(tmp_path / "scores.html")
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "scores.html" and text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert text.count("plotly.js (cartesian - minified) v") == 1 and '"displayModeBar": false' in text
    assert "<title>Scores of &lt;b&gt;two&lt;/b&gt; vectors</title>" in text
    assert 'role="img" aria-label="Scores of &lt;b&gt;two&lt;/b&gt; vectors. Bars of Top-1' in text
    assert not re.search(r'<(script|link|img)[^>]* (src|href)="http', text)
    assert "background: #1b1b1b" in figure().save(path, theme="dark").read_text(encoding="utf-8")


def test_figures_of_plotly_are_saved_too(tmp_path):
    text = save(go.Figure(layout={"title": "plain"}), str(tmp_path / "a.HTML")).read_text(encoding="utf-8")
    assert 'aria-label="plain"' in text and "<title>plain</title>" in text
    assert block(figure(), name="one").count('id="one"') == 1


@needs_chromium
def test_pictures_have_their_size_and_their_words(tmp_path):
    drawing = figure().save(tmp_path / "a.svg", width="column", title=None).read_text(encoding="utf-8")
    root = xml.fromstring(drawing)
    assert root.get("width") == "317" and root.get("role") == "img"
    (said,) = root.findall("{http://www.w3.org/2000/svg}desc")
    assert said.text == ALT and said.get("id") == root.get("aria-describedby")
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Top-1" in texts and "no <vector>" in texts and "Scores of <b>two</b> vectors" not in texts

    data = figure().save(tmp_path / "a.png", width="column").read_bytes()
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks.setdefault(kind, body)
        at += 12 + length
    wide, dots = struct.unpack(">I", chunks[b"IHDR"][:4])[0], struct.unpack(">I", chunks[b"pHYs"][:4])[0]
    assert wide / (dots * 0.0254) == pytest.approx(3.3, abs=0.01)  # inches
    assert dots * 0.0254 == pytest.approx(300, abs=0.02)
    assert chunks[b"iTXt"].split(b"\0")[0] == b"Description" and chunks[b"iTXt"].endswith(ALT.encode())

    paper = figure().save(tmp_path / "a.pdf", width="column").read_bytes()
    assert paper.startswith(b"%PDF")
    box = re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", paper)
    assert box is not None and float(box[1]) / 72 == pytest.approx(3.3, abs=0.03)


@needs_chromium
def test_many_pictures_are_drawn_by_one_browser(tmp_path):
    alone = figure().save(tmp_path / "a.png", dots=96).read_bytes()
    with one_browser():
        together = [figure().save(tmp_path / f"{i}.png", dots=96).read_bytes() for i in range(2)]
    assert together == [alone, alone]
    assert int.from_bytes(alone[16:20]) == 700


def test_another_format_is_refused(tmp_path):
    for name in ("a.eps", "a", "html"):
        with pytest.raises(ValueError, match=r"a figure is written as \.html, \.svg, \.pdf, \.png; give a name with"):
            figure().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"--figure a\.eps: a figure is written as \.html"):
        check_figure_file("a.eps")
    with pytest.raises(ValueError, match="save: expected dots of at least 1 an inch, got 0"):
        figure().save(tmp_path / "a.png", dots=0)
    with pytest.raises(ValueError, match="create it first"):
        figure().save(tmp_path / "none" / "a.html")
    with pytest.raises(ValueError, match=r"--figure .*none.* does not exist; create it first"):
        check_figure_file(tmp_path / "none" / "a.html")
    assert check_figure_file(tmp_path / "a.html") == tmp_path / "a.html" and not list(tmp_path.iterdir())


def test_what_is_missing_is_said_before_and_after_the_work(tmp_path, nothing_draws):
    told = r"Chromium is missing; expected pip install 'fvlens\[figures\]' and a Chromium or .* \.html file needs none"
    old = tmp_path / "a.png"
    old.write_bytes(b"old")
    for name in ("a.png", "a.svg", "a.pdf"):
        with pytest.raises(ValueError, match=told):
            figure().save(tmp_path / name)
        with pytest.raises(ValueError, match=f"--figure .*{name}: {told}"):
            check_figure_file(tmp_path / name)
    assert old.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    assert figure().save(tmp_path / "a.html").exists()
    with pytest.raises(ValueError, match="one_browser: Chromium is missing"), one_browser():
        pass


def test_a_browser_that_fails_is_said_in_words(tmp_path, nothing_draws, monkeypatch):
    monkeypatch.setattr(saving, "missing_for_pictures", lambda: None)
    with pytest.raises(ValueError, match=r"no \.png could be drawn: RuntimeError: Kaleido .* needs no browser"):
        figure().save(tmp_path / "a.png")


def test_what_draws_pictures_is_looked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert saving.missing_for_pictures() == "kaleido"
    monkeypatch.undo()
    pytest.importorskip("kaleido")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("choreographer.browsers.Chromium.find_browser", lambda skip_local: shutil.which("chromium"))
    assert saving.missing_for_pictures() == "Chromium"


@pytest.fixture
def shown(monkeypatch):
    """What a notebook is given to show."""
    bundles = []
    monkeypatch.setattr(plotly.io._renderers, "ipython_display", _Display(bundles))
    before = plotly.io.renderers.default
    plotly.io.renderers.render_on_display = True
    yield bundles
    plotly.io.renderers.default = before


class _Display:
    def __init__(self, bundles):
        self.bundles = bundles

    def display(self, bundle, raw):
        self.bundles.append(bundle)


def test_a_notebook_without_pictures_shows_figures_that_can_be_used(nothing_draws, shown):
    plotly.io.renderers.default = "plotly_mimetype+png"
    with pytest.warns(UserWarning, match="figures are interactive here, since no picture can be drawn: Chromium is"):
        figure()._ipython_display_()
    figure()._ipython_display_()  # said once
    assert [sorted(bundle) for bundle in shown] == [["application/vnd.plotly.v1+json"]] * 2
    assert sorted(figure()._repr_mimebundle_()) == ["application/vnd.plotly.v1+json"]
    plotly.io.renderers.default = "svg"
    figure().show()
    figure().show("png")
    assert all("application/vnd.plotly.v1+json" in bundle and "text/html" in bundle for bundle in shown[2:])
    assert len(shown) == 4


def test_other_faults_of_showing_are_not_hidden(nothing_draws, shown):
    with pytest.raises(ValueError, match="nosuch"):
        figure().show("nosuch")
    plotly.io.renderers.default = "plotly_mimetype"
    figure().show()
    assert len(shown) == 1


@needs_chromium
def test_a_notebook_with_pictures_shows_both(shown):
    plotly.io.renderers.default = "plotly_mimetype+png"
    figure()._ipython_display_()
    assert sorted(shown[0]) == ["application/vnd.plotly.v1+json", "image/png"]
