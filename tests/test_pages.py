"""Pages: values are text, figures bring one script along, files are whole or not there."""

import base64
import hashlib
import json
import os
import re
from importlib import resources

import jinja2
import plotly
import plotly.graph_objects as go
import pytest

from fvlens import pages, plots
from fvlens.metrics import Interval
from fvlens.pages import FigureBlock, render, write_page
from fvlens.plots._script import bundle, bundle_version

HEAD = '{% extends "pages/page.html" %}{% import "pages/blocks.html" as blocks with context %}'


@pytest.fixture
def template(monkeypatch):
    """Puts a template under the name ``mine/page.html``, beside those of the package."""
    of_package = pages._page._source

    def put(body):
        text = f"{HEAD}{{% block title %}}{{{{ name }}}}{{% endblock %}}{{% block body %}}{body}{{% endblock %}}"
        monkeypatch.setattr(pages._page, "_source", lambda name: text if name == "mine/page.html" else of_package(name))
        return "mine/page.html"

    return put


def figure(title="a figure"):
    return plots.bars(["a", "b"], [1, 2], x_title="n", title=title)


def test_a_page_has_its_style_inside(template):
    page = render(template("<p>text</p>"), name="a name")
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n')
    assert "<title>a name</title>" in page
    (style,) = re.findall(r"<style>\n(.*?)\n</style>", page, re.DOTALL)
    assert '  body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI"' in style
    assert all(line.startswith("  ") for line in style.splitlines())
    body = page[page.index("<body>") : page.index("<script>")]
    assert body == "<body>\n<p>text</p>\n" and page.endswith("</script>\n</body>\n</html>")
    assert "url(" not in style and "@import" not in style


def test_values_are_text(template):
    odd = "</title><script>x</script>{{ 7 * 7 }}&amp;"
    block = FigureBlock(odd, odd, figure(odd))
    body = (
        '{{ name }}{{ blocks.facts("f", {name: name}) }}{{ blocks.scores("s", name, [(name, 1, none)]) }}'
        "{{ blocks.figure_block(block) }}"
    )
    page = render(template(body), name=odd, block=block)
    assert "<script>x" not in page
    assert page.count("&lt;/title&gt;&lt;script&gt;x&lt;/script&gt;{{ 7 * 7 }}&amp;amp;") == 9


def test_figures_share_one_script_and_come_in_every_look(template):
    page = render(
        template("{{ blocks.drawing(one) }}{{ blocks.figure_block(two) }}{{ blocks.drawing(three, 'fvlens <run>') }}"),
        name="x", one=figure("first"), two=FigureBlock("second", "how to read it", figure("second")),
        three=go.Figure(go.Scatter(x=[1], y=[2])),
    )  # fmt: skip
    assert page.count("plotly.js (cartesian - minified) v") == 1
    assert re.findall(r'data-figure="(.*?)"', page) == ["figure-1", "figure-2", "figure-3"]
    assert '<h2 id="section-1">second</h2>\n<p class="note">how to read it</p>\n<div class="figure">' in page
    assert page.count("<code>") == 1 and "<code>fvlens &lt;run&gt;</code>" in page
    drawn = [json.loads(text) for text in re.findall(r'<script type="application/json" id=".*?">(.*?)</script>', page)]
    looks = {f"{width}-{theme}" for width in ("page", "column") for theme in ("light", "dark")}
    assert [set(one) for one in drawn] == [looks, looks, {"any"}]
    styled = figure("first").styled(width="column", theme="dark")
    assert drawn[0]["column-dark"] == json.loads(styled.to_json())
    assert drawn[0]["page-light"]["layout"]["width"] > drawn[0]["column-light"]["layout"]["width"]


def test_a_page_without_figures_has_no_script_of_plotly(template):
    assert "plotly.js" not in render(template("<p>text</p>"), name="x")


def test_a_figure_that_the_small_script_lacks_brings_the_whole_one(template):
    page = render(template("{{ blocks.drawing(one) }}"), name="x", one=go.Figure(go.Scatter3d(x=[1], y=[2], z=[3])))
    assert "plotly.js (cartesian" not in page and "scatter3d" in page and len(page) > 3_000_000


def test_the_small_script_is_of_the_version_that_plotly_writes_for():
    version = plotly.offline.get_plotlyjs_version()
    assert bundle_version() == version
    licence = resources.files("fvlens.plots").joinpath("script/LICENSE").read_text()
    assert licence.startswith("MIT License") and "Plotly" in licence


def test_another_major_version_of_plotly_brings_its_own_script(monkeypatch):
    monkeypatch.setattr(plotly.offline, "get_plotlyjs_version", lambda: "99.0.0")
    assert plots.script_for(figure()) == plotly.offline.get_plotlyjs() != bundle()


def test_the_policy_names_every_script_that_runs_and_no_other(template):
    page = render(template("{{ blocks.drawing(one) }}"), name="x", one=figure())
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    assert re.findall(r"'sha256-(.*?)'", policy) == hashes
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_contents_list_the_second_headings(template):
    page = render(template("{{ contents() }}<h2>one</h2><h3>no</h3><h2>{{ name }}</h2>"), name="<two>")
    assert re.findall(r'<li><a href="(.*?)">(.*?)</a>', page) == [
        ("#section-1", "one"), ("#section-2", "&lt;two&gt;")
    ]  # fmt: skip
    assert '<h2 id="section-2">&lt;two&gt;</h2>' in page


def test_control_characters_are_shown_as_escapes(template):
    page = render(template("<p>{{ name }}</p>"), name="a\x00b\x1b[31m\u202ec\nd\te")
    assert "<p>a\\x00b\\x1b[31m\\u202ec\nd\te</p>" in page


def test_scores_and_facts_are_tables(template):
    body = '{{ blocks.scores("s", "on test", rows) }}|{{ blocks.facts("f", {"seed": 3}) }}'
    page = render(template(body), name="x", rows=[("a", 0.12345, Interval(0.1, 0.2, 0.95)), ("b", 1, None)])
    scores, facts = page[page.index("<table") : page.index("\n<script>")].replace("</div>", "").split("|")
    assert re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", scores) == [
        "on test", "top-1", "95% interval", "a", "0.123", "0.100 to 0.200", "b", "1.000", "",
    ]  # fmt: skip
    assert scores.startswith('<table id="s">') and scores.endswith("</table>")
    assert facts == '<table id="f">\n<tr><th>seed</th><td class="value">3</td></tr>\n</table>'


def test_what_is_missing_is_refused(template):
    with pytest.raises(jinja2.UndefinedError, match="'nosuch' is undefined"):
        render(template("{{ nosuch }}"), name="x")
    for name in ("pages/nosuch.html", "nosuch/page.html", "page.html"):
        with pytest.raises(jinja2.TemplateNotFound, match=re.escape(name)):
            render(name)


def test_files_are_written_whole(template, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")
    assert write_page(str(path), template("<p>{{ name }} é</p>"), name="new") == path
    assert path.read_text(encoding="utf-8") == render(template("<p>{{ name }} é</p>"), name="new")

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        write_page(path, template(""), name="x")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_missing_folder_is_refused(template, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"folder {tmp_path / 'none'} does not exist; create it first.")):
        write_page(tmp_path / "none" / "page.html", template(""), name="x")
