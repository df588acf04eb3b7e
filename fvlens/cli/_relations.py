"""Relations on the command line: names of the library, files and folders; what reading them changed is said."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table

from fvlens.cli._app import note, out, say, say_template
from fvlens.cli._glossary import help_note
from fvlens.cli._options import BosOption, Fields, SeedOption, spread, template
from fvlens.relations import Reading, Relation, list_relations, load_relation, reading_of, readings_of
from fvlens.report import Loading

app = typer.Typer(
    name="relations", help="The word-pair library, and what files of pairs are worth.", rich_markup_mode=None
)
"""``fvlens relations``: the library, and ``check`` below it."""
_SHOWN = 10
"""Dropped pairs that are listed."""


def relation_of(given: str) -> Relation:
    """A relation by name, or from a file; what reading it changed is printed."""
    reading = reading_of(given, what="")
    _say_notes(reading, given)
    return reading.relation


def relations_of(given: Sequence[str]) -> list[Relation]:
    """Relations by name, from files and from folders; what reading them changed is printed."""
    readings = readings_of(given)
    for reading in readings:
        _say_notes(reading)
    for name in given:
        _say_library(name)
    return [reading.relation for reading in readings]


def names_of(given: Sequence[str]) -> list[str]:
    """The same as names that :func:`fvlens.relations.load_relation` takes: folders are the files in them."""
    return [found.path or found.name for found in relations_of(given)]


def _say_notes(reading: Reading, given: str = "") -> None:
    relation = reading.relation
    if relation.path:
        note(f"{relation.path}: a file of {len(relation)} word pairs, the relation {relation.name}")
    for text in reading.notes:
        note(f"{relation.name}: {text}")
    _say_library(given)


def _say_library(given: str) -> None:
    """What is meant by a name that stands for two things."""
    if given in list_relations() and Path(given).exists():
        note(f"{given} is the library's relation; what is here under that name is given as ./{given}")


def _listed(names: list[str] | None, **filters: Any) -> None:
    """The library's table; nothing where a command below was run, which gives no names."""
    if names is None:
        return
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


@app.callback(invoke_without_command=True, result_callback=_listed)
def relations(
    category: Annotated[str | None, typer.Option("--category", help="Only this category.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Only this domain.")] = None,
) -> list[str]:
    """The word-pair library; `fvlens relations check FILE` says what a file of your own is worth."""
    return list_relations(category, family=family, domain=domain)


@app.command(epilog=help_note("check"))
@spread
def check(
    file: Annotated[str, typer.Argument(help="A file of word pairs, a folder of them, or a library relation.")],
    loading: Annotated[dict[str, Any], Fields(Loading, ("device", "dtype", "revision", "backend", "base", "trust"))],
    model: Annotated[
        str | None, typer.Option("--model", help="Also count tokens, with the tokenizer of this model.")
    ] = None,
    written: Annotated[
        str, typer.Option("--template", help="How prompts are written: a built-in template, or a JSON file.")
    ] = "qa",
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> None:
    """What pairs are worth: kept and dropped and why, tokens of the answers, splits, whether they can be trained on."""
    from fvlens.prompts import checked

    readings = readings_of([file])
    if model is None and loading:
        raise ValueError(f"{', '.join(f'--{name}' for name in loading)} without --model; say which model.")
    network = None if model is None else Loading(model=model, **loading).load()
    for reading in readings:
        generator = torch.Generator().manual_seed(seed)
        found = checked(reading, network, template=template(written, bos), generator=generator)
        say_template(found.template)
        name = found.relation.name
        table = Table(Column(name, no_wrap=True), Column("", justify="right"), box=None)
        for what, number in found.rows():
            table.add_row(what, number)
        out.print(table)
        for one in found.dropped[:_SHOWN]:
            say(f"dropped, {one.place}: {' -> '.join(one.pair)} ({one.why})")
        if len(found.dropped) > _SHOWN:
            say(f"dropped, and {len(found.dropped) - _SHOWN} more")
        for text in (*(f"{text}." for text in found.notes), *found.cautions):
            say(text)
