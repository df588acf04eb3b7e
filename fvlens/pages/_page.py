"""Templates of the package, filled and written. Figures come as figures and are drawn where the template has them.

A page is one file that asks for nothing outside it: style, plotly's script and the page's own script (``page.js``,
which draws the figures for the window's width and colours, sorts and filters tables, saves and copies) are inside, and
a content-security policy lets exactly these run.
"""

import base64
import hashlib
import html
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from fvlens.files import write_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and signs that turn the direction of what follows."""


@dataclass(frozen=True, slots=True)
class FigureBlock:
    """A figure under a heading.

    Attributes:
        title: the heading.
        text: what the figure shows and how to read it.
        figure: the figure.
        command: the command line that makes it; empty if there is none.
    """

    title: str
    text: str
    figure: "go.Figure"
    command: str = ""


def render(template: str, **values: Any) -> str:
    """A page as text.

    The template may call ``draw(figure)``. Control characters of values are shown as their escapes. Second headings get
    ids, and are listed where the template has ``contents()``.

    Args:
        template: room and file of the template, such as ``"report/run.html"``.
        values: what the template shows. Texts are escaped.

    Returns:
        The page.

    Raises:
        jinja2.TemplateNotFound: the room has no such template.
        jinja2.UndefinedError: a value that the template asks for is not given.

    Example:
        >>> from fvlens.pages import render
        >>> render("pages/page.html").splitlines()[0]
        '<!DOCTYPE html>'
    """
    figures: list[go.Figure] = []

    def draw(figure: "go.Figure") -> Markup:
        from fvlens.plots import alt_text, looks

        figures.append(figure)
        name = f"figure-{len(figures)}"
        # as data, which no browser runs; and no text in it can end the element
        variants = ",".join(f'"{look}":{text}' for look, text in looks(figure).items()).replace("<", "\\u003c")
        label = html.escape(alt_text(figure))
        return Markup(
            f'<div class="drawn" role="img" aria-label="{label}" data-figure="{name}"></div>\n'
            f'<script type="application/json" id="{name}">{{{variants}}}</script>'
        )

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_visible
    )
    text = environment.get_template(template).render(draw=draw, contents=lambda: Markup(_CONTENTS), **values)
    return _with_scripts(_with_contents(text), figures)


_CONTENTS = '<nav id="contents"></nav>'


def _visible(value: Any) -> Any:
    """A value for a page, its control characters as their escapes; what is markup already stays."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), value)


def _with_contents(text: str) -> str:
    """The page with ids at its second headings, and links to them where it has a place for contents."""
    titles: list[str] = []

    def heading(found: re.Match[str]) -> str:
        titles.append(found[1])
        return f'<h2 id="section-{len(titles)}">{found[1]}</h2>'

    text = re.sub(r"<h2>(.*?)</h2>", heading, text)
    links = "".join(f'<li><a href="#section-{i + 1}">{title}</a></li>\n' for i, title in enumerate(titles))
    return text.replace(_CONTENTS, f'<nav id="contents" aria-label="Contents">\n<ul>\n{links}</ul>\n</nav>')


def _with_scripts(text: str, figures: "list[go.Figure]") -> str:
    """The page with the scripts that it needs before its end, and a policy that lets these run and nothing else."""
    scripts = [_source("pages/page.js") or ""]
    if figures:
        from fvlens.plots import script_for

        scripts.insert(0, script_for(*figures))
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts)
    # plotly sets styles as it draws, and saves pictures by way of blobs
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    text = text.replace('<meta charset="utf-8">\n', f'<meta charset="utf-8">\n{meta}', 1)
    start, end, rest = text.rpartition("</body>")
    inside = "".join(f"<script>{one}</script>\n" for one in scripts)
    return start + inside + end + rest


def _source(template: str) -> str | None:
    """Text of a template ``room/file``, None if there is none. Templates are read as the package's files are."""
    room, _, name = template.partition("/")
    file = resources.files("fvlens") / room / "templates" / name
    return file.read_text(encoding="utf-8") if file.is_file() else None


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Write a page, as :func:`render` makes it. Replaces an existing file at once.

    Args:
        path: the file.
        template: room and file of the template, such as ``"report/run.html"``.
        values: what the template shows.

    Returns:
        The file.

    Raises:
        ValueError: the folder does not exist.
    """
    return write_text(Path(path), render(template, **values))
