"""Templates of the package, filled and written. Figures come as figures and are drawn where the template has them."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from fvlens.files import write_text

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class FigureBlock:
    """A figure under a heading.

    Attributes:
        title: the heading.
        text: what the figure shows and how to read it.
        figure: the figure.
    """

    title: str
    text: str
    figure: "go.Figure"


def render(template: str, **values: Any) -> str:
    """A page as text.

    The template may call ``draw(figure)``. The first figure of a page brings plotly's script along, so that the page
    needs no network, and the others use it.

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
    drawn = 0

    def draw(figure: "go.Figure") -> str:
        from fvlens.plots import block

        nonlocal drawn
        drawn += 1
        return block(figure, script=drawn == 1)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(draw=draw, **values)


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
