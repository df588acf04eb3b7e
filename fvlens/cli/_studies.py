"""``fvlens study``: the list of studies, and a command for each with the options of that study alone."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from fvlens.cli._app import note, say, say_page, wrote
from fvlens.cli._glossary import help_note
from fvlens.cli._loading import allowed_loading
from fvlens.cli._options import Fields, QuietOption, SeedOption, made, result_folder, spread
from fvlens.cli._relations import names_of
from fvlens.report import Loading

if TYPE_CHECKING:
    from fvlens.studies import Outcome, Study

JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="Processes on this machine.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Threads of each cell.")]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """How a study runs; none of this changes a number.

    Attributes:
        jobs: processes on this machine.
        quiet: say nothing of single cells.
    """

    jobs: int = 1
    quiet: bool = False


def study_command(study: "Study", name: str = "") -> Callable[..., None]:
    """The command of a study, under its own name or another."""

    @spread
    def command(
        names: Annotated[
            list[str] | None, typer.Argument(metavar="[RELATIONS]...", help="As --relations, all in one go.")
        ] = None,
        *,
        loading: Annotated[dict[str, Any], Fields(Loading, ("model", *study.takes))],  # pyright: ignore
        given: Annotated[dict[str, Any], Fields(study.options or _NoOptions)],  # pyright: ignore
        relations: Annotated[
            list[str] | None,
            typer.Option("--relations", help="Relations, files or folders, once each [default: as the study chooses]."),
        ] = None,
        folder: Annotated[
            Path | None, typer.Option("--out", help=f"Folder for results [default: fvlens-study-{study.name}].")
        ] = None,
        seed: SeedOption = 0,
        jobs: JobsOption = 1,
        threads: ThreadsOption = 1,
        write: Annotated[
            bool, typer.Option("--write", help="Keep the tables in assets/measured, and put them into pages.")
        ] = False,
        kept: Annotated[
            bool, typer.Option("--kept", help="Go on from the finished cells that the project keeps.")
        ] = False,
        quiet: QuietOption = False,
    ) -> None:
        from fvlens.files import write_text
        from fvlens.plots import save as save_figure
        from fvlens.studies import root_for, take_kept_cells, write_measured

        root = root_for(study) if write else None  # before hours of work
        folder = result_folder(folder, f"study-{study.name}")
        chosen = (*(names or ()), *(relations or ()))
        settings = study_settings(study, loading, given, relations=chosen or None, seed=seed, threads=threads)
        if kept:
            note(f"{take_kept_cells(study, folder)} finished cells were taken from the project")
        outcome = measured(study, settings, folder, Running(jobs, quiet))
        if outcome.kept:
            text = study.markdown(outcome.tables())
            say_page(text)
            page = write_text(folder / f"{study.name}.md", f"{text}\n")
            figures = [save_figure(figure, folder / f"{name}.html") for name, figure in outcome.figures().items()]
            wrote([*outcome.save(folder), page, *figures])
        end(outcome, lambda: [] if root is None else write_measured(outcome, root))

    command.__name__ = name or study.name
    command.__doc__ = f"{study.summary[:1].upper()}{study.summary[1:]}."
    return command


def study_settings(study: "Study", loading: Mapping[str, Any], given: Mapping[str, Any], **others: Any) -> Any:
    """What stands on the line as :class:`fvlens.studies.Settings`.

    Raises:
        ValueError: an unknown relation, or a value that the study's options or the settings refuse.
    """
    from fvlens.studies import Settings

    if others["relations"]:
        others["relations"] = tuple(names_of(others["relations"]))
    options = None if study.options is None else made(study.options, given)
    mark = study.made_on(options)
    how = dict(loading)
    if mark is not None:
        recorded = dataclasses.asdict(allowed_loading("the study's file", mark, loading)).items()
        how = {name: value for name, value in recorded if value not in (None, False)}
    model = how.pop("model", "rel-small")
    return Settings(model=model, loading=tuple(how.items()), options=options, **others)


def measured(study: "Study", settings: Any, folder: Path, running: Running) -> "Outcome":
    """Run a study, or what of it is missing in this folder.

    Raises:
        ValueError: no cell could be run.
    """
    from fvlens.studies import run_study

    say_cell = _log.info if running.quiet else note
    outcome = run_study(study, study.cells(settings), folder, jobs=running.jobs, say=say_cell)
    if not outcome.kept and outcome.failed:
        raise ValueError(f"study {study.name}: {outcome.standing} finished; the first error is {outcome.failed[0][1]}")
    return outcome


def end(outcome: "Outcome", write: Callable[[], list[Path]]) -> None:
    """Say what failed, and leave with the code of an interruption or a failure; else write what is for whole studies.

    Raises:
        Exit: not all cells are finished.
    """
    for cell, error in outcome.failed:
        note(f"failed: {cell}: {error}")
    if len(outcome.kept) + len(outcome.failed) < outcome.n_cells:
        raise typer.Exit(130)
    wrote(write())
    if outcome.failed:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _NoOptions:
    """Of a study that has none of its own."""


class Studies(TyperGroup):
    """A command for every entry of :data:`fvlens.studies.STUDIES`, as that is when it is asked for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Without a name: the list of all, a line each."""
        from fvlens.studies import STUDIES

        if not args and not ctx.resilient_parsing:  # a shell that completes a line parses it, too
            width = max(map(len, STUDIES))
            for name, one in STUDIES.items():
                say(f"{name:<{width}}  {one.summary}")
            ctx.exit()
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the studies, in their order."""
        from fvlens.studies import STUDIES

        return list(STUDIES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a study.

        Raises:
            ValueError: there is none of that name.
        """
        from fvlens.studies import STUDIES

        if cmd_name not in STUDIES:
            raise ValueError(f"no study named {cmd_name!r}; expected one of {', '.join(STUDIES)}.")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cmd_name, epilog=help_note("study"))(study_command(STUDIES[cmd_name]))
        return get_command(alone)


study = typer.Typer(cls=Studies, name="study", rich_markup_mode=None)


@study.callback()
def _study() -> None:
    """A study by its name: cells that are kept one by one, and tables over them. Alone: the list of all."""
