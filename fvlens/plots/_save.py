"""Figures as files: one interactive page, or a picture drawn by kaleido in a Chromium."""

import contextlib
import html
import importlib.util
import itertools
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import plotly.graph_objects as go

from fvlens.files import as_path, check_destination, replacing
from fvlens.plots._script import script_for
from fvlens.plots._style import ThemeName, Width

PICTURES = ("png", "jpg", "jpeg", "svg", "pdf")
"""Names of plotly's renderers that draw pictures."""

FORMATS = (".html", ".svg", ".pdf", ".png")
"""Ends of the names of files that figures are saved as."""

DOTS = 300
"""Dots an inch of ``.png`` pictures; a pixel of a figure is 1/96 inch."""

_QUIET = {"displayModeBar": False}
"""Settings of plotly: no bar of buttons over a figure."""

_INSTALL = "pip install 'fvlens[figures]' and a Chromium or Chrome (`plotly_get_chrome` fetches one)"


class NoPicture(ValueError):
    """A picture cannot be drawn; a page can be written all the same."""

    @staticmethod
    def because(error: Exception | None) -> str:
        """What is missing, and what to do."""
        missing = missing_for_pictures()
        if missing is not None:
            return f"{missing} is missing; expected {_INSTALL}"
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def missing_for_pictures() -> str | None:
    """What is not there of what draws pictures: ``"kaleido"``, ``"Chromium"``, or None if nothing is missing."""
    if importlib.util.find_spec("kaleido") is None:
        return "kaleido"
    from choreographer.browsers import Chromium  # pyright: ignore[reportMissingImports]  # comes with kaleido

    return None if Chromium.find_browser(skip_local=False) else "Chromium"


def check_figure_file(given: str | Path, what: str = "--figure") -> Path:
    """Where a figure will go, checked before the work that leads to it.

    Raises:
        ValueError: another format; a folder, or one that does not exist or takes no file; what draws pictures is
            missing.
    """
    suffix = _format(given, what)
    path = check_destination(given, what, suffix=suffix)
    if suffix != ".html" and missing_for_pictures() is not None:
        raise NoPicture(f"{what} {given}: {NoPicture.because(None)}. An .html file needs none of it.")
    return path


def save(figure: go.Figure, path: str | Path, *, dots: int = DOTS) -> Path:
    """Write any figure of plotly, as :meth:`Figure.save` does.

    Raises:
        ValueError: as for :meth:`Figure.save`.
    """
    suffix, path = _format(path, "save:"), as_path(path)
    if not dots >= 1:
        raise ValueError(f"save: expected dots of at least 1 an inch, got {dots}.")
    data = page(figure).encode() if suffix == ".html" else picture(figure, suffix[1:], dots)
    with replacing(path) as file:
        file.write(data)
    return path


def alt_text(figure: go.Figure) -> str:
    """What a figure shows, in words; its title for one that is not of the house."""
    parts: Any = figure.layout
    meta = parts.meta if isinstance(parts.meta, dict) else {}
    return str(meta.get("alt") or parts.title.text or "")


def _format(path: str | Path, what: str) -> str:
    suffix = as_path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{what} {path}: a figure is written as {', '.join(FORMATS)}; give a name with such an end.")
    return suffix


@contextlib.contextmanager
def one_browser() -> Iterator[None]:
    """Pictures that are saved in this block are drawn by one browser, which takes a tenth of the time.

    Raises:
        NoPicture: kaleido or a Chromium is missing.
    """
    if missing_for_pictures() is not None:
        raise NoPicture(f"one_browser: {NoPicture.because(None)}.")
    import kaleido  # pyright: ignore[reportMissingImports]

    kaleido.start_sync_server(silence_warnings=True)
    try:
        with warnings.catch_warnings():
            # plotly hands every call settings of the browser, which is open already
            warnings.filterwarnings("ignore", "The kopts argument is ignored", UserWarning)
            yield
    finally:
        kaleido.stop_sync_server(silence_warnings=True)


def page(figure: go.Figure) -> str:
    """The figure as an HTML page that needs no network."""
    parts: Any = figure.layout
    paper = parts.paper_bgcolor or parts.template.layout.paper_bgcolor or "#ffffff"
    title = html.escape(html.unescape(re.sub(r"<[^>]*>", " ", parts.title.text or "")), quote=False) or "Figure"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>body {{ margin: 8px; background: {paper}; }}</style>\n</head>\n<body>\n"
        f"<script>{script_for(figure)}</script>\n{block(figure, name='figure')}\n</body>\n</html>\n"
    )


def block(figure: go.Figure, *, name: str) -> str:
    """The figure as a block of a page that has plotly's script, with its text for who sees no picture."""
    inner = figure.to_html(full_html=False, include_plotlyjs=False, config=_QUIET, div_id=name)
    return f'<div role="img" aria-label="{html.escape(alt_text(figure))}">{inner}</div>'


def looks(figure: go.Figure) -> dict[str, str]:
    """The figure as JSON in every look that a page may ask for: ``"page-light"``, ``"column-dark"`` and so on.

    A figure that is not of the house, or was copied, has one look.
    """
    styled = getattr(figure, "styled", None)
    if styled is None or getattr(figure, "_drawn", None) is None:
        return {"any": str(figure.to_json())}
    ways = itertools.product(get_args(Width), get_args(ThemeName))
    return {f"{width}-{theme}": str(styled(width=width, theme=theme).to_json()) for width, theme in ways}


def picture(figure: go.Figure, format: str, dots: int = DOTS) -> bytes:
    """The figure as a picture, ``"svg"``, ``"pdf"`` or ``"png"``; the first and the last carry what it shows in words.

    Raises:
        NoPicture: kaleido or a Chromium is missing, or the browser fails.
    """
    if missing_for_pictures() is not None:
        raise NoPicture(f"save: no .{format} can be drawn: {NoPicture.because(None)}. An .html file needs none of it.")
    try:
        data = figure.to_image(format=format, scale=dots / 96 if format == "png" else 1)
    except Exception as error:  # a browser can fail in many ways
        raise NoPicture(
            f"save: no .{format} could be drawn: {NoPicture.because(error)}. An .html file needs no browser."
        ) from error
    if format == "svg":
        return _described(data.decode(), alt_text(figure)).encode()
    return _with_text(data, alt_text(figure), dots) if format == "png" else data


def _described(svg: str, alt: str) -> str:
    """A drawing that says what it shows."""
    opened = re.sub(r"^<svg ", '<svg role="img" aria-describedby="shows" ', svg, count=1)
    text = html.escape(alt, quote=False)
    return re.sub(r"(<svg [^>]*>)", lambda found: f'{found[1]}<desc id="shows">{text}</desc>', opened, count=1)


def _with_text(png: bytes, alt: str, dots: int) -> bytes:
    """A picture with its description and its dots an inch behind its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = 8 + 12 + 13  # the signature, and the header's chunk
    metre = round(dots / 0.0254)
    density = chunk(b"pHYs", struct.pack(">IIB", metre, metre, 1))
    text = chunk(b"iTXt", b"Description\0\0\0\0\0" + alt.encode())
    return png[:header] + density + text + png[header:]
