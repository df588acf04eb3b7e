"""``fvlens heads`` and ``universal``: the heads that carry a relation, or many."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.table import Table

from fvlens.cli._app import out, say, say_template, wrote
from fvlens.cli._figures import Drawing
from fvlens.cli._options import Fields, QuietOption, RelationArgument, SeedOption, spread
from fvlens.cli._relations import relation_of
from fvlens.cli._studies import JobsOption, Running, ThreadsOption, end, measured, study_settings
from fvlens.files import check_destination
from fvlens.models import fingerprint
from fvlens.prompts import get_template, template_for
from fvlens.relations import list_relations
from fvlens.report import Loading, RecipeOptions, RunOptions

RankingOptions = Annotated[
    RunOptions,
    Fields(RunOptions, ("seed", "n_shots", "n_prompts", "n_corrupted", "n_heads", "labels", "template", "bos")),
]


@spread
def heads(
    relation: RelationArgument,
    loading: Loading,
    settings: RankingOptions,
    drawing: Drawing,
    method: Annotated[
        Literal["exact", "atp", "ig", "lrp"], typer.Option("--method", help="Exact effects, or a gradient screen.")
    ] = "exact",
    recheck: Annotated[
        int, typer.Option("--recheck", min=0, help="Run so many of a screen's best heads again exactly.")
    ] = 0,
    quiet: QuietOption = False,
) -> None:
    """The heads that carry a relation, by average indirect effect or a gradient screen."""
    from fvlens.find import relation_effects

    found = relation_of(relation)
    generator = torch.Generator().manual_seed(settings.seed)
    split = found.split(generator)
    _, chosen = relation_effects(
        loading.load(), split, relation=found.name, labels=settings.labels, n_shots=settings.n_shots,
        n_prompts=settings.n_prompts, n_corrupted=settings.n_corrupted, template=settings.template, method=method,
        recheck=recheck, generator=generator, progress=not quiet,
    )  # fmt: skip
    say_template(get_template(chosen.template))
    again = chosen.recheck
    caution = chosen.caution(settings.n_heads)  # first, since it checks the number
    table = Table("head", chosen.score, "standard error", title=f"{found.name}, {settings.labels} labels", box=None)
    if again is not None:
        table.add_column("exact AIE")
        table.add_column("standard error")
    for head in chosen.ranking[: settings.n_heads]:
        row = [str(head), f"{chosen.aie[head]:.4f}", f"{chosen.stderr[head]:.4f}"]
        if again is not None and head in again.heads:
            i = again.heads.index(head)
            row += [f"{again.aie[i]:.4f}", f"{again.stderr[i]:.4f}"]
        table.add_row(*row)
    out.print(table)
    if chosen.note:
        say(chosen.note)
    if caution:
        say(caution)
    wrote(drawing.draw(lambda: chosen.plot(n_top=settings.n_heads)))


@spread
def universal(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RELATIONS]...", help="Relations, files or folders of word pairs [default: all of the library]."
        ),
    ] = None,
    *,
    loading: Annotated[dict[str, Any], Fields(Loading)],
    given: Annotated[dict[str, Any], Fields(RecipeOptions)],
    drawing: Drawing,
    file: Annotated[
        Path, typer.Option("--out", help="File for the heads; the figure and the study's folder go beside it.")
    ] = Path("heads.json"),
    category: Annotated[str | None, typer.Option("--category", help="Only relations of this category.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Only relations of this family.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first ones, by name.")] = None,
    seed: SeedOption = 0,
    jobs: JobsOption = 1,
    threads: ThreadsOption = 1,
    quiet: QuietOption = False,
) -> None:
    """The heads with the largest effect on average over relations; `fvlens run --heads` uses them.

    This is `fvlens study universal` with a file of heads: stopped, the same command goes on.
    """
    from fvlens.studies import STUDIES, heads_from

    if names and (category or family):
        raise ValueError(
            "relations are named, so --category and --family have nothing to choose; give one or the other."
        )
    chosen = list(names or list_relations(category, family=family))[:limit]
    file = check_destination(file, suffix=".json")
    figure = check_destination(file.with_suffix(".html"), "the figure beside --out,", suffix=".html")
    folder = check_destination(file.with_name(f"{file.stem}-study"), "the study's folder beside --out,")
    # the model is asked first, so that a number of heads that it does not have is refused before hours of work
    study = STUDIES["universal"]
    settings = study_settings(study, loading, given, relations=tuple(chosen), seed=seed, threads=threads)
    options: RecipeOptions = settings.chosen(RecipeOptions)
    network = study.load(settings.cell("")).model
    mark, template = fingerprint(network), template_for(network, options.template)
    if not 1 <= options.n_heads <= mark.n_layers * mark.n_heads:
        raise ValueError(f"--n-heads: expected 1 to {mark.n_layers * mark.n_heads} (all heads), got {options.n_heads}.")
    outcome = measured(study, settings, folder, Running(jobs, quiet))
    written = []
    if outcome.kept:
        found = heads_from(
            outcome.rows(), options.n_heads, complete=outcome.complete, fingerprint=mark, labels=options.labels,
            n_shots=options.n_shots, n_prompts=options.n_prompts, n_corrupted=options.n_corrupted,
            template=template,
        )  # fmt: skip
        say_template(template)
        n_kept = int(found.kept.sum())
        table = Table("head", "mean AIE", "standard error", box=None)
        for head in found.heads:
            table.add_row(str(head), f"{found.mean[head]:.4f}", f"{found.stderr[head]:.4f}" if n_kept > 1 else "")
        say(f"mean over {n_kept} relations on {settings.model}, {options.labels} labels, {outcome.standing}")
        out.print(table)
        if found.caution:
            say(found.caution)
        left_out = [name for name, kept in zip(found.relations, found.kept.tolist(), strict=True) if not kept]
        if left_out:
            say(f"left out, {options.n_shots} demonstrations do not beat the majority label: {', '.join(left_out)}")
        shown = found.plot()
        written = [found.save(file), shown.save(figure), *drawing.draw(lambda: shown), *outcome.save(folder)]
    wrote(written)
    end(outcome, list)
