"""``fvlens run`` and ``rerun``: the whole chain on one relation, and the same run again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fvlens.cli._app import command_line, note, out, say, say_template, wrote
from fvlens.cli._figures import Drawing
from fvlens.cli._loading import GivenLoading, load_recorded
from fvlens.cli._options import Fields, QuietOption, RelationArgument, made, option_name, result_folder, spread
from fvlens.cli._relations import relation_of
from fvlens.prompts import get_template
from fvlens.report import Loading, RunOptions, RunResult
from fvlens.types import named_heads

_ELSE = "By default the one that the run names, if fvlens knows it."


@spread
def run(
    relation: RelationArgument,
    loading: GivenLoading,
    settings: Annotated[dict[str, Any], Fields(RunOptions)],
    drawing: Drawing,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results [default: fvlens-RELATION].")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads",
            help="Take these heads, as L1H2,L3H4, or those of a file (`fvlens universal`, or a JSON list); rank none.",
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """The whole chain on one relation: heads, function vector, fine-tuning, controls, report."""
    from fvlens.report import run_relation, write_run
    from fvlens.universal import made_on, name_heads, read_heads

    found = relation_of(relation)
    options = made(RunOptions, settings)
    ranked = [name for name in ("n_heads", "labels", "both_labels") if name in settings]
    if heads is not None and ranked:
        raise ValueError(
            f"{option_name(ranked[0])} says how to rank heads, but --heads {heads} gives them; leave one of them out."
        )
    named = None if heads is None else named_heads(heads)
    heads_file = None if heads is None or named is not None else Path(heads)
    folder = result_folder(folder, found.name)
    mark = None if heads_file is None else made_on(heads_file)
    if heads_file is None or mark is None:
        how = made(Loading, loading)
        network = how.load()
    else:
        how, network = load_recorded(heads_file, mark, loading)
    given = None if heads_file is None else read_heads(heads_file, network)
    if named is not None:
        given = name_heads(named, network)
    result = run_relation(
        network,
        found,
        options=options,
        heads=given,
        loading=how,
        command=command_line.get(),
        progress=not quiet,
    )
    files = write_run(result, folder)
    if given is not None:
        say(f"{len(given.heads)} heads {f'from {given.path} ({given.note})' if given.path else given.note}")
    say_template(get_template(result.options.template))
    out.print(_summary(result))
    for caution in result.cautions:
        say(caution)
    wrote([*files, *drawing.draw(result.controls.plot)])


@spread
def rerun(
    folder: Annotated[Path, typer.Argument(help="Folder that `fvlens run` wrote.")],
    loading: Annotated[dict[str, Any], Fields(Loading, ("model", "base", "trust"), notes={"model": _ELSE})],
    again: Annotated[
        Path | None, typer.Option("--out", help="Folder for the second run's results [default: DIR-rerun].")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Numbers count as the same up to this, relative above 1.")
    ] = 1e-5,
    quiet: QuietOption = False,
) -> None:
    """Repeat a run from its files and say what differs; exit code 1 if a number does."""
    from fvlens.report import RESULTS_FILE, read_run
    from fvlens.report import rerun as run_again

    if "base" in loading and "model" not in loading:
        raise ValueError("--base is for a model that is named on the line; add --model.")

    recorded = read_run(folder).loading
    how = None
    if "model" in loading:
        how = dataclasses.replace(recorded or Loading(), **{"base": None, **loading})

    def announce(changes: Sequence[Any]) -> None:
        told = ", ".join(f"{one.kind} {one.name}" for one in changes) or "nothing that the numbers depend on"
        if how is None and recorded is not None:
            note(f"{folder / RESULTS_FILE} names the model {recorded.model}")
        say(f"changed since the first run: {told}")

    done = run_again(
        folder,
        out=again,
        loading=how,
        trust=bool(loading.get("trust")),
        tolerance=tolerance,
        announce=announce,
        command=command_line.get(),
        progress=not quiet,
    )
    if done.differences:
        table = Table("what differs", "", "first run", "this run", "difference", title=str(folder), box=None)
        for one in done.differences:
            size = "" if one.size is None else f"{one.size:.1e}"
            table.add_row(one.kind, one.name, str(one.old), str(one.new), size)
        out.print(table)
    wrote(done.files)
    if done.agrees:
        most = f"largest difference {done.largest:.1e}" if done.largest else "all equal"
        say(f"the same run: {done.n_numbers} numbers compared, {most}")
        return
    n_beyond = sum(one.kind == "result" or (one.size or 0) > tolerance for one in done.differences)
    say(
        f"not the same run: {n_beyond} results differ beyond {tolerance:g} ({done.n_numbers} numbers compared, largest "
        f"difference {done.largest:.1e})"
    )
    raise typer.Exit(1)


def _summary(result: RunResult) -> Table:
    """Short table of a run: who answers how often, and how often the whole answer where that differs."""
    exact = result.exact()
    table = Table(
        "zero-shot top-1 on test unless said otherwise",
        "top-1",
        "95% interval",
        *([] if exact is None else ["exact"]),
        title=f"{result.relation} on {result.model_name}, {result.n_test} test pairs",
        box=None,
    )
    for i, (name, value, interval) in enumerate(result.summary()):
        text = "" if interval is None else f"{interval.low:.2f} to {interval.high:.2f}"
        table.add_row(name, f"{value:.2f}", text, *([] if exact is None else [f"{exact[i]:.2f}"]))
    return table
