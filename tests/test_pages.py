"""Pages: values are text, figures bring one script along, files are whole or not there."""

import os
import re

import jinja2
import pytest

from fvlens import pages, plots
from fvlens.metrics import Interval
from fvlens.pages import FigureBlock, render, write_page

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
    assert page.endswith("<body>\n<p>text</p>\n</body>\n</html>")
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


def test_the_first_figure_brings_the_script_along(template):
    page = render(
        template("{{ blocks.drawing(one) }}{{ blocks.figure_block(two) }}{{ blocks.drawing(three) }}"),
        name="x", one=figure("first"), two=FigureBlock("second", "how to read it", figure("second")),
        three=figure("third"),
    )  # fmt: skip
    assert page.count("plotly.js v") == 1
    assert page.index("plotly.js v") < page.index("second")
    assert page.count("Plotly.newPlot(") == 3
    assert page.count('<div class="figure">') == 3
    assert '<h2>second</h2>\n<p class="note">how to read it</p>\n<div class="figure">' in page
    # and so it is on the next page
    assert render(template("{{ blocks.drawing(one) }}"), name="x", one=figure()).count("plotly.js v") == 1


def test_scores_and_facts_are_tables(template):
    body = '{{ blocks.scores("s", "on test", rows) }}|{{ blocks.facts("f", {"seed": 3}) }}'
    page = render(template(body), name="x", rows=[("a", 0.12345, Interval(0.1, 0.2, 0.95)), ("b", 1, None)])
    scores, facts = page[page.index("<table") : page.index("\n</body>")].split("|")
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
