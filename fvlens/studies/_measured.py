"""Measured tables that are kept with the project, and the pages that quote them."""

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvlens.files import read_text, replacing, table_text, write_text
from fvlens.studies._runner import Outcome
from fvlens.studies._study import Study

if TYPE_CHECKING:
    import pandas as pd

MOST_BYTES = 1_000_000
"""Of the tables of one study."""


def project_root() -> Path:
    """The folder of the project, which has pages and measured tables; an installed package has none.

    Raises:
        ValueError: this is an installed package.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        raise ValueError(f"--write: {root} is no checkout of fvlens; measured tables are kept only there.")
    return root


def root_for(study: Study) -> Path:
    """:func:`project_root`, after it was asked whether the study's figures can be drawn: before hours of work.

    Raises:
        ValueError: this is an installed package; pages show figures of the study, and what draws them is missing.
    """
    root = project_root()
    if study.pictures and importlib.util.find_spec("kaleido") is None:
        raise ValueError(
            f"--write: pages show a figure of the study {study.name}, and kaleido, which draws it, is not installed; "
            "expected it, pip install kaleido, and a Chromium or Chrome."
        )
    return root


def measured_folder(root: Path, study: Study) -> Path:
    """Where the study's tables are kept."""
    return root / "assets" / "measured" / study.name


def take_kept_cells(study: Study, folder: Path) -> int:
    """Put the finished cells that the project keeps into a study's folder, for a long study that is measured in pieces.

    What is in the folder stays as it is. A cell that is not one of the study's, or of another version, is not read.

    Returns:
        How many cells were put there.

    Raises:
        ValueError: this is an installed package, or the project keeps no cells of this study.
    """
    kept = sorted((measured_folder(project_root(), study) / "cells").glob("*.json"))
    if not kept:
        raise ValueError(f"--kept: the project keeps no cells of the study {study.name}; leave --kept out.")
    cells = folder / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    missing = [file for file in kept if not (cells / file.name).exists()]
    for file in missing:
        write_text(cells / file.name, read_text(file, "cell"))
    return len(missing)


def read_measured(root: Path, study: Study) -> "dict[str, pd.DataFrame]":
    """The study's kept tables by name; none if it has not been measured."""
    import pandas as pd

    # a hash may look like a number
    texts: Any = dict.fromkeys(("model", "fingerprint", "data_hash", "seed", "fvlens", "settings", "cells"), str)
    return {file.stem: pd.read_csv(file, dtype=texts) for file in sorted(measured_folder(root, study).glob("*.csv"))}


def quotable(study: Study) -> "dict[str, Callable[[Mapping[str, pd.DataFrame]], str]]":
    """What pages can quote of a study, by what their marker says: ``NAME`` the whole, ``NAME, PART`` an excerpt."""
    return {study.name: study.markdown, **{f"{study.name}, {part}": text for part, text in study.excerpts.items()}}


def between(marker: str) -> re.Pattern[str]:
    """What of a page is a study's: the text between its markers."""
    name = re.escape(marker)
    return re.compile(rf"(?<=<!-- study {name} -->\n).*?(?=<!-- end study {name} -->)", re.DOTALL)


def pages(root: Path, study: Study) -> list[Path]:
    """The project's READMEs that quote the study."""
    files: Iterable[Path] = [root / "README.md", *sorted((root / "fvlens").rglob("README.md"))]
    return [
        file
        for file in files
        if file.is_file() and any(between(marker).search(read_text(file, "page")) for marker in quotable(study))
    ]


def write_measured(outcome: Outcome, root: Path) -> list[Path]:
    """Keep a study's tables under ``assets/measured``, the figures that pages show under ``assets``, and put the tables
    into the pages that quote it.

    Raises:
        ValueError: cells are missing; the tables are too large.
    """
    study = outcome.study
    if not outcome.complete:
        raise ValueError(f"--write: only {outcome.standing} are finished; pages quote whole studies.")
    texts = {name: table_text(frame) for name, frame in outcome.tables().items()}
    n_bytes = sum(len(text.encode()) for text in texts.values())
    if n_bytes > MOST_BYTES:
        raise ValueError(f"--write: the tables take {n_bytes:,} bytes; expected at most {MOST_BYTES:,}.")
    folder = measured_folder(root, study)
    folder.mkdir(parents=True, exist_ok=True)
    written = [write_text(folder / f"{name}.csv", text) for name, text in texts.items()]
    figures = outcome.figures() if study.pictures else {}
    for name in figures.keys() & {*study.pictures}:
        picture = root / "assets" / f"{name}.png"
        with replacing(picture) as file:
            file.write(figures[name].to_image(format="png", scale=2))
        written.append(picture)
    # from the files, not from memory: that is what the test compares pages with
    tables = read_measured(root, study)
    quotes = {marker: text(tables) + "\n" for marker, text in quotable(study).items()}
    for page in pages(root, study):
        whole = read_text(page, "page")
        for marker, quote in quotes.items():
            whole = between(marker).sub(lambda _, quote=quote: quote, whole)
        written.append(write_text(page, whole))
    return written
