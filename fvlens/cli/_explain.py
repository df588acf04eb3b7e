"""``fvlens explain``: what a word of these commands means."""

from typing import Annotated

import typer
from rich.table import Column, Table

from fvlens.cli._app import out, say
from fvlens.cli._glossary import GLOSSARY, term


def explain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TERM]",
            help="A word, such as AIE, permuted or gate; without one all are listed.",
            autocompletion=lambda: list(GLOSSARY),
        ),
    ] = None,
) -> None:
    """What a word means: AIE, permuted, scale, map, gate ... ; alone: the list of all."""
    if not words:
        table = Table(Column("term", no_wrap=True), "what it is", box=None)
        for one in GLOSSARY.values():
            table.add_row(one.name, one.first)
        out.print(table)
        return
    found = term(" ".join(words))
    beside = f" ({', '.join(found.also)})" if found.also else ""
    say(f"{found.name}{beside}")
    out.print(found.text, highlight=False)
    if found.see:
        say(f"See also {', '.join(found.see)}.")
