"""``fvlens relations`` and ``models``: what there is."""

from typing import Annotated

import typer
from rich.table import Column, Table

from fvlens.cli._app import out, say
from fvlens.models import EMBEDDED_MODELS, PACKAGED_MODELS, official_names
from fvlens.relations import list_relations, load_relation


def relations(
    category: Annotated[str | None, typer.Option("--category", help="Only this category.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Only this domain.")] = None,
) -> None:
    """The word-pair library."""
    names = list_relations(category, family=family, domain=domain)
    table = Table(
        Column("relation", no_wrap=True), "category", "family", "pairs", "example", box=None, padding=(0, 1, 0, 0)
    )
    total = 0
    for name in names:
        found = load_relation(name)
        pair = found.pairs[0]
        total += len(found)
        table.add_row(name, found.category, found.family, str(len(found)), f"{pair.input} -> {pair.output}")
    out.print(table)
    say(f"{len(names)} relations, {total} pairs")


def models(
    filter: Annotated[str, typer.Option("--filter", help="Only names that contain this.")] = "",
) -> None:
    """Models that can be loaded by name."""
    here = EMBEDDED_MODELS | {name: f"{one.text}: {one.install}" for name, one in PACKAGED_MODELS.items()}
    for name, text in here.items():
        if filter.lower() in name.lower():
            say(f"{name}  ({text})")
    for name in official_names():
        if filter.lower() in name.lower():
            say(name)
