"""``fvlens compose``, ``analogy`` and ``analogies``: composite vectors and what they answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.table import Column, Table

from fvlens.cli._app import note, out, say, say_template, wrote
from fvlens.cli._figures import Drawing
from fvlens.cli._loading import GivenLoading, load_recorded
from fvlens.cli._options import Fields, QuietOption, SeedOption, made, result_folder, spread
from fvlens.cli._relations import relations_of
from fvlens.files import as_path, check_destination, write_table
from fvlens.prompts import get_template
from fvlens.report import Loading, RunOptions

CompositeOption = Annotated[
    Path | None,
    typer.Option("--composite", help="A file of `fvlens compose`; without one the library's basis is trained first."),
]


@spread
def compose(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RELATIONS]...", help="Basis: relations, files or folders [default: the library's, see README]."
        ),
    ] = None,
    *,
    loading: Loading,
    settings: Annotated[RunOptions, Fields(RunOptions, ("seed", "n_train", "template", "bos"))],
    file: Annotated[Path, typer.Option("--out", help="File for the composite.")] = Path("composite.safetensors"),
    map: Annotated[
        Literal["none", "diagonal", "full", "lowrank", "transfer"],
        typer.Option("--map", help="From source scores to weights; none needs no analogies."),
    ] = "none",
    gate: Annotated[
        Literal["logistic", "threshold", "learned"] | None,
        typer.Option("--gate", help="What decides whether to steer, or how strongly."),
    ] = None,
    setting: Annotated[
        Literal["zero_shot", "one_shot"], typer.Option("--setting", help="Prompts that map and gate are trained on.")
    ] = "one_shot",
    n_analogies: Annotated[int, typer.Option("--n-analogies", min=4, help="Training analogies of the map.")] = 2430,
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="Inject after this layer [default: as --start says]."),
    ] = None,
    start: Annotated[
        Literal["zero", "vector"],
        typer.Option(
            "--start", help="Train from function vectors at their best layer, or from zero a third of the way up."
        ),
    ] = "vector",
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over pairs and analogies.")] = 20,
    quiet: QuietOption = False,
) -> None:
    """A basis of the library's or your own relations with a map and a gate, for `fvlens analogy --composite`."""
    from fvlens.composition import library_composite

    file = check_destination(file, suffix=".safetensors")
    chosen = relations_of(names) if names else None
    solver = library_composite(
        loading.load(), names=chosen, layer=layer, start=start, n_train=settings.n_train, map=map, setting=setting,
        n_analogies=n_analogies, epochs=epochs, gate=gate, template=settings.template,
        generator=torch.Generator().manual_seed(settings.seed), progress=not quiet,
    )  # fmt: skip
    say(f"{len(solver.basis)} vectors after layer {solver.basis.layer}, map {map}")
    say_template(get_template(solver.template))
    if layer is None:
        how = "a third of the way up" if start == "zero" else "where function vectors do best together"
        note(f"layer {solver.basis.layer} was chosen, {how}; --layer decides")
    for found in solver.gates:
        say(f"gate, {_setting(found.setting)}: {found.describe()}")
    wrote([solver.save(file)])


@spread
def analogy(
    a: Annotated[str, typer.Argument(metavar="A", help="A is to B ...")],
    b: Annotated[str, typer.Argument(metavar="B")],
    c: Annotated[str, typer.Argument(metavar="C", help="... as C is to what?")],
    loading: GivenLoading,
    drawing: Drawing,
    choices: Annotated[
        str | None, typer.Option("--choices", help="Answers to choose among, with commas between them.")
    ] = None,
    composite: CompositeOption = None,
    seed: SeedOption = 0,
    n_top: Annotated[int, typer.Option("--top", min=1, help="Answers and basis relations shown.")] = 5,
    quiet: QuietOption = False,
) -> None:
    """Solve A : B :: C : ? with a composite vector; show its weights and the unsteered answer."""
    from fvlens.composition import answer_analogy

    options = None if choices is None else [word.strip() for word in choices.split(",") if word.strip()]
    if options is not None and len(set(options)) < 2:
        raise ValueError(f"--choices {choices!r}: expected at least two different words with commas between them.")
    network, solver = _composite(loading, composite, seed, quiet)
    found = answer_analogy(network, solver, a, b, c, choices=options)
    table = Table(Column("way", no_wrap=True), "answers with their probability", box=None)
    for name, answers in found.answers.items():
        table.add_row(name, ", ".join(f"{word} {chance:.2f}" for word, chance in answers[:n_top]))
    say(f"{a} : {b} :: {c} : {found.answer}")
    out.print(table)
    weights = Table("basis relation", Column("weight", justify="right"), box=None)
    for name, weight in found.explanation.top(n_top):
        weights.add_row(name, f"{weight:.3f}")
    if solver.map == "transfer":
        named = ", ".join(f"{name} {chance:.2f}" for name, chance in found.explanation.named())
        say(f"{a} : {b} is taken for: {named}")
    out.print(weights)
    for setting, strength in found.gates.items():
        say(f"gate, {_setting(setting)}: {strength:.2f} of the composite is injected")
    wrote(drawing.draw(lambda: found.explanation.plot(n_top)))


@spread
def analogies(
    file: Annotated[Path, typer.Argument(help="A file or BATS folder of analogies.")],
    loading: GivenLoading,
    drawing: Drawing,
    composite: CompositeOption = None,
    format: Annotated[
        str | None, typer.Option("--format", help="How it is written [default: guessed]; see fvlens.relations.READERS.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for tables and figure [default: none].")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many, drawn at random.")] = None,
    seed: SeedOption = 0,
    allow_leak: Annotated[
        bool, typer.Option("--allow-leak", help="Score pairs that took part in making the composite, too.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluate the analogies of a file: unsteered, with the composite, with its controls."""
    from fvlens.composition import evaluate_analogies
    from fvlens.relations import guess_format, read_analogies

    folder = None if folder is None else result_folder(folder)
    generator = torch.Generator().manual_seed(seed)
    if format is None:
        format = guess_format(as_path(file))
        note(f"{file} is read as {format}; --format decides")
    read = read_analogies(file, format=format, n=limit, generator=generator)
    network, solver = _composite(loading, composite, seed, quiet)
    found = evaluate_analogies(
        network, read, solver, allow_leak=allow_leak, generator=generator, progress=not quiet,
    )  # fmt: skip
    table = Table("kind", "way", *(Column(name, justify="right") for name in ("n", "top-1", "interval", "choice")),
                  box=None)  # fmt: skip
    summary = found.summary()
    for row in summary.to_dict("records"):
        choice = "" if row["choice"] != row["choice"] else f"{row['choice']:.3f}"
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        table.add_row(row["kind"] or "", row["way"], str(row["n"]), f"{row['top1']:.3f}", interval, choice)
    out.print(table)
    written = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        each = write_table(folder / "analogies.csv", found.to_dataframe())
        table_file = write_table(folder / "summary.csv", summary)
        written = [each, table_file, found.plot().save(folder / "analogies.html")]
    wrote([*written, *drawing.draw(found.plot)])


def _setting(name: str) -> str:
    return {"zero_shot": "bare query", "one_shot": "one-shot prompt"}[name]


def _composite(loading: Mapping[str, Any], file: Path | None, seed: int, quiet: bool) -> tuple[Any, Any]:
    """The model and a composite on it: the file's, or one of the library's basis, trained now."""
    from fvlens.composition import CompositeMap, library_composite

    if file is not None:
        solver = CompositeMap.load(file)
        return load_recorded(file, solver.basis.fingerprint, loading)[1], solver
    network = made(Loading, loading).load()
    note("no --composite, so one of the library's relations is trained first")
    return network, library_composite(network, generator=torch.Generator().manual_seed(seed), progress=not quiet)
