"""``fvlens diff``: two runs side by side."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Column, Table

from fvlens.cli._app import note, out, say, wrote
from fvlens.cli._options import SeedOption
from fvlens.files import check_destination

_HEAD_COLUMNS = ("place, first", "place, second", "AIE, first", "AIE, second")
_SCORE_COLUMNS = ("first", "second", "queries", "second minus first [95%]")


def diff(
    first: Annotated[Path, typer.Argument(help="Folder that `fvlens run` wrote.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run.")],
    table_file: Annotated[
        Path | None, typer.Option("--out", help="File for the table of scores, .csv [default: none].")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Two runs side by side: settings, heads, and scores with paired intervals. No model is loaded."""
    from fvlens.files import write_table
    from fvlens.report import compare_runs

    if table_file is not None:
        table_file = check_destination(table_file, suffix=".csv")
    found = compare_runs(first, second, generator=torch.Generator().manual_seed(seed))
    say(f"first: {found.first}, second: {found.second}")
    settings = Table("what is not the same", "", "first", "second", box=None)
    for one in found.settings:
        settings.add_row(one.kind, one.name, str(one.old), str(one.new))
    if found.settings:
        out.print(settings)
    else:
        say("The runs were made of the same.")
    heads = Table("head", *(Column(name, justify="right") for name in _HEAD_COLUMNS), box=None)
    for row in found.heads:
        heads.add_row(
            str(row.head), *("" if place is None else str(place) for place in (row.first, row.second)),
            *("" if aie is None else f"{aie:.4f}" for aie in (row.first_aie, row.second_aie)),
        )  # fmt: skip
    out.print(heads)
    scores = Table("top-1 on test", *(Column(name, justify="right") for name in _SCORE_COLUMNS), box=None)
    for score in found.scores:
        change = ""
        if score.difference is not None:
            low, high, _ = score.difference.interval
            change = f"{score.difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        scores.add_row(score.way, f"{score.first:.3f}", f"{score.second:.3f}", str(score.n), change)
    out.print(scores)
    note("differences are second minus first, on the test queries that both runs have, with 95% bootstrap intervals")
    if table_file is not None:
        wrote([write_table(table_file, found.to_dataframe())])
