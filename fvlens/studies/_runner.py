"""Cells are run, kept and put together.

Every cell's rows go into a file of their own, named by the cell's hash and written at once when the cell is finished.
A run that was stopped at any time, in whatever way, goes on from these files when it is started again; results are
always read back from them, so that a run in one go and one in pieces give the same numbers.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fvlens.files import read_json, write_json, write_table
from fvlens.interruption import keeping
from fvlens.showing import Shown, shortened
from fvlens.studies._shelf import Shelf
from fvlens.studies._study import DEFAULTS, Cell, Loaded, Study, Value, field_names, plain

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "fvlens-cell-1"
_MOST_CELL = 50_000_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, repr=False)
class Kept(Shown):
    """A finished cell, as its file has it.

    Attributes:
        cell: whose rows these are.
        weights: hash of the model's weights.
        data_hash: of the word pairs.
        fvlens: version that measured it.
        rows: what was measured.
    """

    cell: Cell
    weights: str
    data_hash: str
    fvlens: str
    rows: tuple[dict[str, Value], ...]

    def _line(self) -> str:
        return f"{shortened(str(self.cell), 80)}: {len(self.rows)} rows"

    def labelled(self) -> list[dict[str, Value]]:
        """The rows, each with the values of the cell."""
        whose = {"relation": self.cell.relation} if self.cell.relation else {}
        where = {**whose, "seed": self.cell.seed, **dict(self.cell.varies)}
        return [where | row for row in self.rows]


@dataclass(frozen=True, slots=True, repr=False)
class Outcome(Shown):
    """What a study gave, as far as it is finished.

    Attributes:
        study: the study.
        n_cells: how many cells it has.
        kept: the finished ones, in the study's order.
        failed: the others that were tried, with their error.
        redone: files that were damaged or not of this cell, whose cells were run again.
    """

    study: Study
    n_cells: int
    kept: tuple[Kept, ...]
    failed: tuple[tuple[Cell, str], ...]
    redone: tuple[str, ...]

    def _line(self) -> str:
        return f"{self.study.name}: {self.standing}, {len(self.failed)} failed"

    @property
    def complete(self) -> bool:
        """False if it was interrupted or a cell failed."""
        return len(self.kept) == self.n_cells

    @property
    def standing(self) -> str:
        """What all numbers stand on, as ``"3 of 9 cells"``."""
        return f"{len(self.kept)} of {self.n_cells} {'cell' if self.n_cells == 1 else 'cells'}"

    def rows(self) -> list[dict[str, Value]]:
        """All rows, tidy."""
        return [row for kept in self.kept for row in kept.labelled()]

    def tables(self) -> "dict[str, pd.DataFrame]":
        """The study's tables and, as ``rows``, all rows; each line says what it was measured on.

        Raises:
            ValueError: no cell is finished.
        """
        import pandas as pd

        if not self.kept:
            raise ValueError(f"study {self.study.name}: {self.standing} finished; there is no table to make.")
        rows = [row | _provenance(self.study, [kept]) for kept in self.kept for row in kept.labelled()]
        whole = _provenance(self.study, self.kept)
        made = {name: frame.assign(**whole) for name, frame in self.study.tables(self.rows()).items()}
        return {name: frame.assign(cells=self.standing) for name, frame in {**made, "rows": pd.DataFrame(rows)}.items()}

    def figures(self) -> dict[str, Any]:
        """The study's figures; their titles say how many cells they stand on."""
        figures = self.study.figures(self.rows())
        for figure in figures.values():
            figure.update_layout(title_text=f"{figure.layout.title.text or self.study.name} ({self.standing})")
        return figures

    def save(self, folder: Path) -> list[Path]:
        """Write the tables, and the list of failed cells if there are any."""
        import pandas as pd

        written = [write_table(folder / f"{name}.csv", frame) for name, frame in self.tables().items()]
        if self.failed:
            failed = [{"cell": str(cell), "error": error, "cells": self.standing} for cell, error in self.failed]
            written.append(write_table(folder / "failed.csv", pd.DataFrame(failed)))
        else:
            (folder / "failed.csv").unlink(missing_ok=True)  # of an earlier try
        return written


def _provenance(study: Study, kept: Sequence[Kept]) -> dict[str, Value]:
    def joined(values: Iterable[Any]) -> str:
        return " ".join(dict.fromkeys(map(str, values)))

    hashes = list(dict.fromkeys(one.data_hash for one in kept))
    settings = joined(filter(None, (_differing(study, one.cell) for one in kept)))
    return {
        "model": joined(Path(one.cell.model).name for one in kept),  # its folder is nobody's business
        "fingerprint": joined(one.weights for one in kept),
        "data_hash": hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16],
        "seed": joined(one.cell.seed for one in kept),
        "threads": joined(one.cell.threads for one in kept),
        "fvlens": joined(one.fvlens for one in kept),
        **({"settings": settings or DEFAULTS} if study.options is not None or settings else {}),
    }


def _differing(study: Study, cell: Cell) -> str:
    """The options and ways to load that are not the study's own."""
    given = dict(cell.options)
    kind = study.options
    own = {} if kind is None else dict(plain(kind(), [name for name in field_names(kind) if name not in given]))
    values = [(name, value) for name, value in given.items() if name not in own or own[name] != value]
    return " ".join(f"{name}={value}" for name, value in (*values, *cell.recorded_loading))


# --- one cell ---


class _Bench:
    """The model that was loaded last: cells of one model come one behind the other."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._what: Any = None
        self._loaded: Loaded | None = None

    def what(self, cell: Cell) -> Any:
        """What tells the cell's model from that of others."""
        return (cell.model, cell.loading, *(cell[name] for name in self.study.loading))

    def load(self, cell: Cell) -> Loaded:
        what = self.what(cell)
        if self._loaded is None or what != self._what:
            self._loaded = None  # the old one goes first: two may not fit into the memory
            self._loaded = self.study.load(cell)
            self._what = what
        return self._loaded

    def key(self, cell: Cell) -> str:
        return cell.key(self.study, self.load(cell).fingerprint, self.study.data_hash(cell))

    def run(self, cell: Cell, folder: Path) -> float:
        """Measure a cell and write its file; gives the seconds that it took."""
        before = torch.get_num_threads()
        torch.set_num_threads(cell.threads)
        try:
            loaded = self.load(cell)
            began = time.perf_counter()
            shared = (Shelf(folder.with_name("parts"), self.key),) if self.study.shares else ()
            rows = [dict(row) for row in self.study.run(cell, loaded.model, *shared)]
            seconds = time.perf_counter() - began
        finally:
            torch.set_num_threads(before)
        key = self.key(cell)
        content = {
            "format": FORMAT,
            "study": self.study.name,
            "hash": key,
            "cell": cell.recorded(),
            "weights": str(loaded.fingerprint["weights"]),
            "data_hash": self.study.data_hash(cell),
            "fvlens": importlib.metadata.version("fvlens"),
            "rows": rows,
            "rows_hash": _rows_hash(rows),
        }
        write_json(folder / f"{key}.json", content, null_for_nan=True)
        return seconds


def _rows_hash(rows: Any) -> str:
    """Of the rows as the file has them: NaN is null there."""
    without = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    return hashlib.sha256(json.dumps(without).encode()).hexdigest()[:16]


def read_cell(path: Path, cell: Cell, key: str) -> Kept:
    """A finished cell out of its file.

    Raises:
        ValueError: the file is missing, damaged, or that of another cell.
    """
    found = read_json(path, "file of a cell", most=_MOST_CELL)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path.name}: not a cell of a study.")
    if found.get("hash") != key:
        raise ValueError(f"{path.name}: is the cell {found.get('hash')!r}, expected {key!r}.")
    rows = found.get("rows")
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        rows = []
    if found.get("rows_hash") != _rows_hash(rows):
        raise ValueError(f"{path.name}: damaged: the rows are not those that were written.")
    names = ("weights", "data_hash", "fvlens")
    if not all(isinstance(found.get(name), str) for name in names):
        raise ValueError(f"{path.name}: damaged: expected {', '.join(names)} as text.")
    numbers = tuple({name: float("nan") if value is None else value for name, value in row.items()} for row in rows)
    return Kept(cell, found["weights"], found["data_hash"], found["fvlens"], numbers)


# --- all cells ---

_bench: _Bench | None = None
"""That of a process which works for another one."""


def _start(study: Study) -> None:
    global _bench
    _bench = _Bench(study)


def _work(cell: Cell, folder: Path) -> float:
    assert _bench is not None
    return _bench.run(cell, folder)


def run_study(
    study: Study,
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = _log.info,
) -> Outcome:
    """Run what is not finished yet of these cells, and read all of them.

    A cell that fails is listed with its error, and the others go on. Ctrl-C ends the run and keeps what is finished;
    the same call later goes on from there.

    Args:
        study: what is measured.
        cells: what it is measured on, such as ``study.cells(Settings())``.
        folder: where ``cells/HASH.json`` lie, and in ``parts`` what they share; made if it is not there.
        jobs: processes on this machine. More than one share its cores, which times in the rows feel; all else is the
            same to the bit.
        say: told of what is going on, a line at a time.

    Raises:
        ValueError: no cells, or the same one twice; fewer than one job; a folder that cannot be made.
    """
    if not cells:
        raise ValueError(f"study {study.name}: expected at least one cell, got none.")
    if len(set(cells)) < len(cells):
        raise ValueError(f"study {study.name}: expected each cell once.")
    if jobs < 1:
        raise ValueError(f"study {study.name}: jobs={jobs}; expected at least 1.")
    files = folder / "cells"
    try:
        files.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"study {study.name}: {files} cannot be made ({error.strerror}); choose another.") from error
    bench = _Bench(study)
    keys: dict[Cell, str] = {}
    kept: dict[Cell, Kept] = {}
    failed: dict[Cell, str] = {}
    redone: list[str] = []

    def unfinished(group: Sequence[Cell]) -> Iterator[Cell]:
        for cell in group:
            try:
                keys[cell] = bench.key(cell)
            except Exception as error:
                failed[cell] = _told(error)
                say(f"failed: {cell}: {failed[cell]}")
                continue
            path = files / f"{keys[cell]}.json"
            if path.exists() or path.is_symlink():
                try:
                    kept[cell] = read_cell(path, cell, keys[cell])
                    continue
                except ValueError as error:
                    redone.append(str(error))
                    say(f"run again: {error}")
            yield cell

    def results() -> Iterator[tuple[Cell, float | Exception]]:
        # a cell's name is known once its model is loaded; so that each is loaded once, its cells are run then
        for group in _groups(bench, cells) if jobs == 1 else [cells]:
            before = len(kept)
            waiting = list(unfinished(group))
            if len(kept) > before:
                say(f"{len(kept)} of {len(cells)} cells were finished before")
            yield from _each(bench, waiting, files, jobs)

    def n_finished() -> int:
        # an interruption can come before the last models were loaded; what is finished on these counts, too
        there = _recorded(files)
        for _ in unfinished([cell for cell in cells if cell not in keys and _content(cell.recorded()) in there]):
            pass
        return len(kept)

    first = True
    with keeping(n_finished, len(cells), f"study {study.name}", "cells are finished", least=0):
        for cell, result in results():
            if isinstance(result, float):
                try:
                    kept[cell] = read_cell(files / f"{keys[cell]}.json", cell, keys[cell])
                except ValueError as error:
                    result = error
            if isinstance(result, Exception):
                failed[cell] = _told(result)
                say(f"failed: {cell}: {failed[cell]}")
                continue
            left = len(cells) - len(kept) - len(failed)
            say(f"{len(kept)} of {len(cells)} cells: {cell}")
            if first and left:
                # in whole rounds of all processes
                say(f"about {_duration(result * -(-left // jobs))} for the {left} left")
            first = False
    # several processes end in any order
    in_order = tuple(kept[cell] for cell in cells if cell in kept)
    failures = tuple((cell, failed[cell]) for cell in cells if cell in failed)
    return Outcome(study, len(cells), in_order, failures, tuple(redone))


def _recorded(folder: Path) -> set[str]:
    """The cells that files say they are of, as far as can be known without their models."""
    found = set()
    for path in folder.glob("*.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            found.add(_content(read_json(path, "file of a cell", most=_MOST_CELL)["cell"]))
    return found


def _content(cell: Mapping[str, Any]) -> str:
    """What a cell is, but for where its model and its files lie."""
    return json.dumps({name: value for name, value in cell.items() if name not in ("model", "files")}, sort_keys=True)


def _groups(bench: _Bench, cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each model."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(bench.what(cell), []).append(cell)
    return list(groups.values())


def _each(bench: _Bench, cells: Sequence[Cell], folder: Path, jobs: int) -> Iterator[tuple[Cell, float | Exception]]:
    """Seconds or error of each cell, in the order in which they end."""
    if jobs == 1 or len(cells) < 2:
        for cell in cells:
            try:
                result: float | Exception = bench.run(cell, folder)
            except Exception as error:
                result = error
            yield cell, result
        return
    # spawned: a fork of a process with torch's threads in it can hang
    pool = ProcessPoolExecutor(
        min(jobs, len(cells)), multiprocessing.get_context("spawn"), initializer=_start, initargs=(bench.study,)
    )
    try:
        futures = {pool.submit(_work, cell, folder): cell for cell in cells}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], error if isinstance(error, Exception) else future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
