"""A study is data: cells of plain values, what is measured in one, and the tables over all of them."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fvlens.models import fingerprint, load_model
from fvlens.relations import list_relations, load_relation

if TYPE_CHECKING:
    import pandas as pd

Value = str | int | float | bool
"""What cells and rows are made of."""

Row = Mapping[str, Value]
"""One line of results, a column a key."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user chooses of any study.

    Attributes:
        model: rel-small, a local folder, or a TransformerLens name.
        relations: names of library relations; None for those that the study chooses itself.
        seed: of everything random.
        threads: of each cell; sums can differ in their last bits with it.
    """

    model: str = "rel-small"
    relations: tuple[str, ...] | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"study: threads={self.threads}; expected at least 1.")
        if self.relations is not None and not self.relations:
            raise ValueError("study: expected at least one relation, got none.")
        if self.relations is not None and len(set(self.relations)) < len(self.relations):
            raise ValueError(f"study: expected each relation once, got {', '.join(self.relations)}.")


@dataclass(frozen=True, slots=True)
class Cell:
    """The smallest part of a study that is measured, kept and repeated by itself.

    Attributes:
        model: where the model is loaded from; what it *is* says its fingerprint.
        relation: name of a library relation.
        seed: of everything random.
        threads: torch's, while the cell is measured.
        varies: what else tells the study's cells apart.
    """

    model: str
    relation: str
    seed: int
    threads: int = 1
    varies: tuple[tuple[str, Value], ...] = ()

    def __getitem__(self, name: str) -> Value:
        return dict(self.varies)[name]

    def key(self, study: "Study", model: Mapping[str, Value], data: str) -> str:
        """16 hex digits of a SHA-256 over all that the cell's rows depend on: no path, no time.

        Args:
            study: whose cell it is.
            model: the model's fingerprint, which stands for the name that it is loaded by.
            data: hash of the word pairs.
        """
        values = {name: value for name, value in asdict(self).items() if name != "model"}
        whole = [study.name, study.version, values, dict(model), data]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        varied = "".join(f", {name} {value}" for name, value in self.varies)
        return f"{self.relation}, seed {self.seed}{varied}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, whatever a study's cells need of it, and its fingerprint's fields with ``weights`` in it."""

    model: Any
    fingerprint: Mapping[str, Value]


def load_float32(cell: Cell) -> Loaded:
    """The cell's model in float32 on the CPU."""
    return named(load_model(cell.model, device="cpu", dtype=torch.float32))


def named(model: Any, reference: Any = None) -> Loaded:
    """What a cell is run with, under the fingerprint of ``reference``, by default of the model itself."""
    fields = asdict(fingerprint(model if reference is None else reference))
    whence = ("name", "revision", "source", "backend")  # where it came from, not which one it is
    return Loaded(model, {name: value for name, value in fields.items() if name not in whence})


def library_data(cell: Cell) -> str:
    """Hash of the relation's pairs, and of the library that random labels are drawn from."""
    text = f"{load_relation(cell.relation).data_hash}\n{_library_hash()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _library_hash() -> str:
    lines = [f"{name}\t{load_relation(name).data_hash}" for name in list_relations()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def every(n: int, settings: Settings) -> list[str]:
    """The settings' relations, or every ``n``-th of the library."""
    return list(settings.relations or list_relations()[::n])


def no_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """For a study whose tables say all."""
    return {}


@dataclass(frozen=True)
class Study:
    """An experiment. Its functions are those of a module, so that other processes find them.

    Attributes:
        name: as the command takes it.
        summary: one line.
        version: goes up when the same cell would have other rows, so that old files are not taken for new ones.
        cells: the cells under these settings.
        run: the rows of one cell, with the model that ``load`` gave. What ``run`` measures in seconds is the only thing
            that may differ from one run to the next.
        tables: from all rows (each with the cell's relation, seed and what varies) to tables by name.
        markdown: a page's text from those tables, also when they were read from files.
        figures: from all rows to figures by name.
        load: the model of a cell.
        loading: names of those varying values that decide what ``load`` gives.
        data_hash: of all word pairs that a cell sees.
    """

    name: str
    summary: str
    version: int
    cells: Callable[[Settings], list[Cell]]
    run: Callable[[Cell, Any], list[dict[str, Value]]]
    tables: "Callable[[Sequence[Row]], dict[str, pd.DataFrame]]"
    markdown: "Callable[[Mapping[str, pd.DataFrame]], str]"
    figures: Callable[[Sequence[Row]], dict[str, Any]] = no_figures
    load: Callable[[Cell], Loaded] = load_float32
    loading: tuple[str, ...] = field(default=())
    data_hash: Callable[[Cell], str] = library_data
