"""The command line itself: what it prints to, and how errors and interruptions end it."""

import importlib.metadata
import itertools
import platform
import sys
import textwrap
import warnings
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from fvlens.cli._terminal import readable
from fvlens.prompts import Template

_usual_format = warnings.formatwarning


class Commands(TyperGroup):
    """The commands; without one it says what to do first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Of an empty line nothing is run."""
        if not args and not ctx.resilient_parsing:  # a shell that completes a line parses it, too
            say(_FIRST)
            ctx.exit()
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Commands,
    name="fvlens",
    help="Find, measure and combine function vectors in transformer language models.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(markup=False, emoji=False)  # names, paths and prompts are shown as they are
err = Console(stderr=True, markup=False, emoji=False)

command_line: ContextVar[list[str] | None] = ContextVar("command line", default=None)
"""What :func:`main` was given, recorded with a run."""


_FIRST = """\
fvlens finds, measures and combines function vectors in language models. First:

  fvlens run antonym
      the whole chain on the embedded model, with a report
  fvlens relations check pairs.csv --model smollm2-135m
      what word pairs of your own are worth to a model
  fvlens run pairs.csv --model smollm2-135m
      the whole chain on them

A model is a name, a folder or a GGUF file; `fvlens models` says which names.
`fvlens --help` lists all commands, `fvlens explain` what their words mean."""
"""What to do first."""


def _version(asked: bool) -> bool:
    if asked:
        of = importlib.metadata.version
        say(
            f"fvlens {of('fvlens')} (Python {platform.python_version()}, torch {of('torch')}, TransformerLens "
            f"{of('transformer-lens')}, transformers {of('transformers')})"
        )
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which version this is, and of what it stands on.", callback=_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Find, measure and combine function vectors in transformer language models."""


def say(text: str) -> None:
    """Print lines as they are, those that are longer than the terminal is wide in several, broken between words."""
    lines = text.split("\n")
    folded = [line if len(line) <= out.width else _folded(line) for line in lines]
    out.print("\n".join(folded), highlight=False, soft_wrap=True)


def _folded(line: str) -> str:
    return textwrap.fill(line, out.width, break_long_words=False, break_on_hyphens=False)


def say_page(text: str) -> None:
    """Print a page in Markdown as it is; its tables are folded where they are wider than the terminal."""
    for is_table, lines in itertools.groupby(text.splitlines(), key=lambda line: line.startswith("| ")):
        rows = list(lines)
        if not is_table or max(map(len, rows)) <= out.width:
            say("\n".join(rows))
            continue
        heading, _, *body = [row.strip().strip("|").split("|") for row in rows]
        table = Table(*(cell.strip() for cell in heading), box=None)
        for row in body:
            table.add_row(*(cell.strip() for cell in row))
        out.print(table)


def note(text: str) -> None:
    """Print a line about how the line was understood, or how far it is, beside what it gives: to standard error."""
    err.print(text, highlight=False, soft_wrap=True)


def say_template(template: Template) -> None:
    """Say what the tokenizer's chat format writes in front by itself, where prompts are turns of it."""
    if template.name == "chat" and not template.needs_tokenizer:
        before = f"which begins {template.prefix!r}" if template.prefix else "which begins with the first question"
        say(f"template chat: the chat format of the model's tokenizer, {before}")


def wrote(files: Sequence[Path]) -> None:
    """Name the files that were written."""
    for file in files:
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)  # in one line, whatever its name


def _in_one_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """How a warning is printed: what it says to users, without the place in the code."""
    if category is not UserWarning:
        return _usual_format(message, category, *where, **more)
    return f"fvlens: {' '.join(str(message).split())}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: run the app, turn errors into one line and exit code 2."""
    from typer import main as typer_main

    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    command = typer_main.get_command(app)
    command_line.set(["fvlens", *args])
    warnings.formatwarning = _in_one_line
    with readable():
        _run(command, args, debug)


def _run(command: Any, args: list[str], debug: bool) -> NoReturn:
    """Run the app and leave the process."""
    try:
        code = command.main(args=args, prog_name="fvlens", standalone_mode=False)
    except (KeyboardInterrupt, EOFError):
        err.print("fvlens: interrupted", highlight=False)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "Abort":
            err.print("fvlens: interrupted", highlight=False)
            sys.exit(130)
        usage = getattr(error, "format_message", None)  # an error of the command line's own parser
        text = usage() if usage is not None else str(error) or type(error).__name__
        hint = "" if isinstance(error, ValueError) else " (fvlens --help, or --debug for details)"
        err.print(f"fvlens: {' '.join(text.split())}{hint}", highlight=False, soft_wrap=True)
        sys.exit(2)
    finally:
        warnings.formatwarning = _usual_format
    if code == 130:  # the parser has caught the interruption itself
        err.print("fvlens: interrupted", highlight=False)
    sys.exit(code if isinstance(code, int) else 0)
