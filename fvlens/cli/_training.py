"""``fvlens compare`` and ``study``: trained vectors beside other methods, and what training depends on."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table

from fvlens.cli._app import out, say, wrote
from fvlens.cli._options import Fields, QuietOption, RelationArgument, made, option_name, result_folder, spread
from fvlens.cli._studies import list_studies, measure
from fvlens.files import write_table
from fvlens.relations import load_relation
from fvlens.report import Loading, RunOptions

_RECIPE = ("seed", "n_shots", "n_prompts", "n_heads", "labels", "layer", "template")
TrainingOptions = Annotated[RunOptions, Fields(RunOptions, (*_RECIPE, "n_train"))]


@spread
def compare(
    relation: RelationArgument,
    loading: Loading,
    settings: TrainingOptions,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the table [default: fvlens-RELATION].")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training pairs.")] = 20,
    n_unrelated: Annotated[
        int, typer.Option("--n-unrelated", min=1, help="Prompts behind the collateral change.")
    ] = 200,
    quiet: QuietOption = False,
) -> None:
    """A fine-tuned vector against prompting, activation addition, soft prompts and LoRA."""
    from fvlens.training import compare as compare_methods

    found = load_relation(relation)
    folder = result_folder(folder, relation)
    result = compare_methods(
        loading.load(),
        found,
        n_train=settings.n_train,
        n_heads=settings.n_heads,
        labels=settings.labels,
        layer=settings.layer,
        n_shots=settings.n_shots,
        n_prompts=settings.n_prompts,
        epochs=epochs,
        n_unrelated=n_unrelated,
        template=settings.template,
        seed=settings.seed,
        progress=not quiet,
    )
    heading, *body = result.cells()
    numbers = [Column(name, justify="right") for name in heading[1:]]
    table = Table(heading[0], *numbers, box=None, padding=(0, 1, 0, 0))
    for cells in body:
        table.add_row(*cells)
    out.print(table)
    say(result.describe())
    wrote(result.save(folder))
    if not result.complete:
        raise typer.Exit(130)


@spread
def study(
    loading: Annotated[dict[str, Any], Fields(Loading)],
    settings: Annotated[dict[str, Any], Fields(RunOptions, _RECIPE)],
    name: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="By default all are listed.")] = None,
    relation: Annotated[
        str | None, typer.Argument(help="Of a study of trained vectors: name of a library relation.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for results [default: fvlens-RELATION or fvlens-study-STUDY].")
    ] = None,
    n_seeds: Annotated[
        int | None, typer.Option("--n-seeds", min=1, help="Trainings behind each point [default: 3 or 5].")
    ] = None,
    n_train: Annotated[
        int | None, typer.Option("--n-train", min=1, help="Training pairs [default: 20; not for training-size].")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the training pairs [default: 20].")
    ] = None,
    relations: Annotated[
        list[str] | None,
        typer.Option("--relations", help="Of a study over the library, once each [default: as the study chooses]."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes of a study over the library [default: 1].")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of each of its cells [default: 1].")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Keep its tables in assets/measured, and put them into pages.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """A study over the library, kept cell by cell, or of what one relation's fine-tuned vector depends on."""
    from fvlens.studies import STUDIES
    from fvlens.training import STUDIES as TRAINED

    if name is None:
        list_studies(STUDIES, TRAINED)
        return
    if name not in STUDIES and name not in TRAINED:
        raise ValueError(f"no study named {name!r}; expected one of {', '.join([*STUDIES, *TRAINED])}.")
    over_library = {"relations": relations, "jobs": jobs, "threads": threads, "write": write or None}
    of_training = {"n_seeds": n_seeds, "n_train": n_train, "epochs": epochs}
    if name in STUDIES:
        if relation is not None:
            raise ValueError(f"study {name} measures over the library; name relations with --relations.")
        given = loading | settings | {key: value for key, value in of_training.items() if value is not None}
        measure(
            STUDIES[name], given, relations=relations, folder=folder, jobs=jobs or 1, threads=threads or 1, write=write
        )
        return
    if relation is None:
        raise ValueError(f"study {name}: expected the name of a relation; see `fvlens relations`.")
    others = [option_name(key) for key, value in over_library.items() if value is not None]
    if others:
        raise ValueError(f"{', '.join(others)}: study {name} does not take this; leave it out.")
    _study_training(
        name, relation, made(Loading, loading), made(RunOptions, settings), folder=folder, n_seeds=n_seeds,
        n_train=n_train, epochs=20 if epochs is None else epochs, quiet=quiet,
    )  # fmt: skip


def _study_training(
    name: str,
    relation: str,
    loading: Loading,
    settings: RunOptions,
    *,
    folder: Path | None,
    n_seeds: int | None,
    n_train: int | None,
    epochs: int,
    quiet: bool,
) -> None:
    """What a fine-tuned vector depends on: training pairs, layer, scale, l2 or start."""
    from fvlens.find import find_vector
    from fvlens.pages import write_figure
    from fvlens.training import STUDIES, Settings

    sized = name == "training-size"
    if sized and n_train is not None:
        raise ValueError("--n-train: the number of training pairs is what this study varies; leave it out.")
    found = load_relation(relation)
    folder = result_folder(folder, relation)
    network = loading.load()

    # the vector that trainings start from; many training pairs need a larger part
    generator = torch.Generator().manual_seed(settings.seed)
    split = found.split(generator, train=0.7 if sized else 0.45)
    recipe = find_vector(
        network, split, labels=settings.labels, n_heads=settings.n_heads, n_shots=settings.n_shots,
        n_prompts=settings.n_prompts, layers=None if settings.layer is None else [settings.layer],
        template=settings.template, relation=relation, seed=settings.seed, generator=generator, progress=not quiet,
    )  # fmt: skip
    # the study of scales multiplies the vector itself, all others start from the best multiple of it
    vector = recipe.unscaled if name == "scale" else recipe.vector

    # each study has its own defaults, so only what was given is passed on
    given = {"n_seeds": n_seeds, "n_train": n_train}
    result = STUDIES[name](
        network, split, init=vector, settings=Settings(epochs=epochs, template=settings.template), relation=relation,
        generator=generator, progress=not quiet, **{key: value for key, value in given.items() if value is not None},
    )  # fmt: skip

    # a row for each value of what varies, intervals where there is room for them
    table = Table(result.x_title, *(Column(line, justify="right") for line in result.lines), box=None)
    for x in sorted({point.x for point in result.points}):
        cells = []
        for line in result.lines:
            at = next(point for point in result.line(line) if point.x == x)
            interval = f" [{at.interval.low:.3f}, {at.interval.high:.3f}]" if len(result.lines) < 3 else ""
            cells.append(f"{at.top1:.3f}{interval}")
        table.add_row(f"{x:g}", *cells)
    out.print(table)
    compared = ", ".join(f"{name} {top1:.3f}" for name, top1 in result.references.items())
    times = "" if name == "scale" else f"times {recipe.scale:g}, "
    seeds = "1 seed" if result.n_seeds == 1 else f"{result.n_seeds} seeds"
    say(
        f"top-1 of {relation} on {loading.model}, vector after layer {vector.layer}, {times}{seeds}, "
        f"{result.n_test} test pairs; {compared}; intervals: {result.intervals}"
    )
    for caution in recipe.cautions:
        say(caution)
    folder.mkdir(parents=True, exist_ok=True)
    table_file = write_table(folder / f"study-{name}.csv", result.to_dataframe())
    wrote([table_file, write_figure(folder / f"study-{name}.html", result.plot())])
    if not result.complete:
        raise typer.Exit(130)
