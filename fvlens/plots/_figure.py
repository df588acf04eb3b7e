"""A figure that can be laid out anew, says in words what it shows, and is saved as a page or a picture."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import Any, ParamSpec

import plotly.graph_objects as go
import plotly.io

from fvlens.plots._save import DOTS, PICTURES, NoPicture, alt_text, save
from fvlens.plots._style import Look, ThemeName, Width, as_look, look

P = ParamSpec("P")


class Figure(go.Figure):
    """A plotly figure of the house.

    ``figure.save("heads.pdf", width="column", title=None)`` writes it as a paper needs it. In a notebook where pictures
    cannot be drawn, for want of kaleido or a Chromium, it is shown interactively.
    """

    _drawn: Callable[[], go.Figure] | None = None
    _look: Look = Look()

    @property
    def alt(self) -> str:
        """What the figure shows, in words; saved pages and pictures carry it."""
        return alt_text(self)

    def styled(
        self,
        *,
        width: Width | None = None,
        theme: ThemeName | None = None,
        title: str | EllipsisType | None = ...,
    ) -> "Figure":
        """The same figure in another look, laid out anew from its data; changes that were made by hand are not in it.

        Args:
            width: ``"page"`` (700 pixels) or ``"column"`` (3.3 inches, 317 pixels of 1/96 inch), with type that can be
                read at that width; by default as it is.
            theme: ``"light"`` or ``"dark"``; by default as it is.
            title: another title, which is wrapped, or None for a figure without one.

        Raises:
            ValueError: another width or theme; the figure was copied, or read from a file, and lost its data.

        Example:
            >>> from fvlens.plots import bars
            >>> figure = bars(["no vector", "vector"], [0.2, 0.9], x_title="Top-1", title="Scores")
            >>> small = figure.styled(width="column", title=None)
            >>> small.layout.width, small.layout.title.text, small.layout.margin.t < figure.layout.margin.t
            (317, '', True)
        """
        if self._drawn is None:
            raise ValueError("styled: this figure is a copy, which has a look and no data; make it anew.")
        wanted = Look(
            self._look.width if width is None else width,
            self._look.theme if theme is None else theme,
            self._look.title if isinstance(title, EllipsisType) else title,
        )
        return _made(self._drawn, wanted)

    def save(
        self,
        path: str | Path,
        *,
        width: Width | None = None,
        theme: ThemeName | None = None,
        title: str | EllipsisType | None = ...,
        dots: int = DOTS,
    ) -> Path:
        """Write the figure: ``.html`` interactive in one file that works offline, or a picture, ``.svg``, ``.pdf`` or
        ``.png``. Replaces an existing file at once.

        Args:
            path: the file; the end of its name says the format.
            width, theme, title: of what is written, as in :meth:`styled`; by default the figure as it is.
            dots: of ``.png``, dots an inch.

        Returns:
            The file.

        Raises:
            ValueError: another format; a folder that does not exist; what draws pictures is missing: the message says
                what to install, and HTML needs none of it.
        """
        if width is None and theme is None and isinstance(title, EllipsisType):
            return save(self, path, dots=dots)
        return save(self.styled(width=width, theme=theme, title=title), path, dots=dots)

    def show(self, *args: Any, **how: Any) -> None:
        """Show the figure by plotly's renderers; where those make pictures and none can be drawn, interactively."""
        try:
            super().show(*args, **how)
        except Exception as error:  # a browser can fail in many ways
            interactive = _without_pictures(how.pop("renderer", args[0] if args else None))
            if interactive is None:
                raise
            _say_once(error)
            super().show(renderer=interactive, **how)

    def _ipython_display_(self) -> None:
        if plotly.io.renderers.render_on_display and plotly.io.renderers.default:
            self.show()
        else:
            print(repr(self))  # noqa: T201, as plotly does

    def _repr_mimebundle_(self, *args: Any, **how: Any) -> Any:
        try:
            return super()._repr_mimebundle_(*args, **how)
        except Exception as error:
            interactive = _without_pictures(None)
            if interactive is None:
                raise
            _say_once(error)
            bundle: Any = plotly.io.renderers
            return bundle._build_mime_bundle(self.to_dict(), interactive)


def drawn(draw: Callable[P, go.Figure]) -> Callable[P, Figure]:
    """A function that draws a figure in the look of the moment; its figures can be drawn again in another."""

    @functools.wraps(draw)
    def figure(*args: P.args, **kwargs: P.kwargs) -> Figure:
        return _made(lambda: draw(*args, **kwargs), look())

    return figure


def _made(draw: Callable[[], go.Figure], wanted: Look) -> Figure:
    with as_look(wanted):
        figure = Figure(draw())
    figure._drawn, figure._look = draw, wanted
    return figure


def _without_pictures(renderer: str | None) -> str | None:
    """The renderers, those of pictures left out; None if there are none of pictures among them."""
    named = (renderer or plotly.io.renderers.default or "").split("+")
    kept = [name for name in named if name not in PICTURES]
    if len(kept) == len(named):
        return None
    return "+".join(kept) or "plotly_mimetype+notebook"


_said: set[str] = set()


def _say_once(error: Exception) -> None:
    """One line under the first figure that is not drawn as a picture."""
    text = f"figures are interactive here, since no picture can be drawn: {NoPicture.because(error)}"
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=4)
