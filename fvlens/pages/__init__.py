"""What pages are made of: one HTML file with its figures and scripts inside, readable without a network.

A page is a Jinja template of the room that writes it. It extends ``pages/page.html``, which has the head and the style,
and is put together from the blocks of ``pages/blocks.html``: figures, tables of scores, tables of facts. All values are
escaped, so words and names are shown as they are.
"""

from fvlens.pages._page import FigureBlock, render, write_page

__all__ = ["FigureBlock", "render", "write_page"]
