"""The part of ``fvlens study`` that measures over the library: cells in, tables and figures out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from fvlens.cli._app import say, wrote
from fvlens.cli._options import option_name, result_folder

_TAKEN = ("model", "seed")


def list_studies(library: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """A line each: those over the library, and those of one relation's trained vectors."""
    lines = {name: study.summary for name, study in library.items()}
    lines |= {f"{name} RELATION": (study.__doc__ or "").partition("\n")[0] for name, study in trained.items()}
    width = max(map(len, lines))
    for name, summary in lines.items():
        say(f"{name:<{width}}  {summary}")


def measure(
    study: Any,
    given: Mapping[str, Any],
    *,
    relations: Sequence[str] | None,
    folder: Path | None,
    jobs: int,
    threads: int,
    write: bool,
) -> None:
    """Run a study over the library, go on where it was stopped, and write what is finished.

    Args:
        study: the :class:`fvlens.studies.Study`.
        given: options of other studies that stand on the line; only model and seed are taken.
        relations: names; None for the study's own choice.
        folder: for cells, tables and figures.
        jobs, threads: processes, and threads of a cell.
        write: also keep the tables with the project and put them into its pages.

    Raises:
        ValueError: an option that this study does not take, an unknown relation, or no cell that could be run.
    """
    from fvlens.pages import write_figure
    from fvlens.relations import load_relation
    from fvlens.studies import Settings, project_root, run_study, write_measured

    others = [option_name(name) for name in given if name not in _TAKEN]
    if others:
        raise ValueError(f"{', '.join(others)}: study {study.name} does not take this; leave it out.")
    root = project_root() if write else None  # before hours of work
    for name in relations or ():
        load_relation(name)
    folder = result_folder(folder, f"study-{study.name}")
    settings = Settings(relations=tuple(relations) if relations else None, threads=threads, **given)
    outcome = run_study(study, study.cells(settings), folder, jobs=jobs, say=say)
    if not outcome.kept and outcome.failed:
        raise ValueError(f"study {study.name}: {outcome.standing} finished; the first error is {outcome.failed[0][1]}")
    if outcome.kept:
        say(study.markdown(outcome.tables()))
        figures = [write_figure(folder / f"{name}.html", figure) for name, figure in outcome.figures().items()]
        wrote([*outcome.save(folder), *figures])
    for cell, error in outcome.failed:
        say(f"failed: {cell}: {error}")
    if len(outcome.kept) + len(outcome.failed) < outcome.n_cells:
        raise typer.Exit(130)
    if root is not None:
        wrote(write_measured(outcome, root))
    if outcome.failed:
        raise typer.Exit(1)
