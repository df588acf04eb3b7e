"""A study is data: cells of plain values, what is measured in one, and the tables over all of them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvlens.models import INFORMATIVE, Fingerprint, fingerprint
from fvlens.prompts import Template, get_template
from fvlens.relations import list_relations, load_relation
from fvlens.report import Loading

if TYPE_CHECKING:
    import pandas as pd

Value = str | int | float | bool
"""What cells and rows are made of."""

Row = Mapping[str, Value]
"""One line of results, a column a key."""

Named = tuple[tuple[str, Value | None], ...]
"""Plain values by their names, in a form that can be compared and hashed."""

LOADING = ("device", "dtype", "revision", "backend", "base", "trust")
"""How a model may be loaded, beside its name: fields of :class:`fvlens.report.Loading`."""

UNRECORDED = ("base", "trust")
"""Of these what no file of a cell keeps: where a base lies is nobody's business (what it is, says the fingerprint), and
a file's own word that it is to be trusted would be none."""

DEFAULTS = "defaults"
"""What a table says of its settings where they are the study's own."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user chooses of any study.

    Attributes:
        model: rel-small, a local folder, or a TransformerLens name.
        relations: names of library relations; None for those that the study chooses itself.
        seed: of everything random.
        threads: of each cell; sums can differ in their last bits with it.
        loading: those of :data:`LOADING` that are not as the study chooses.
        options: those of the study alone, an instance of its :attr:`Study.options`; None for their defaults.
    """

    model: str = "rel-small"
    relations: tuple[str, ...] | None = None
    seed: int = 0
    threads: int = 1
    loading: Named = ()
    options: Any = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"study: threads={self.threads}; expected at least 1.")
        if self.relations is not None and not self.relations:
            raise ValueError("study: expected at least one relation, got none.")
        if self.relations is not None and len(set(self.relations)) < len(self.relations):
            raise ValueError(f"study: expected each relation once, got {', '.join(self.relations)}.")

    def chosen(self, kind: Callable[[], Any]) -> Any:
        """The options of a study, ``kind`` being the class of them."""
        return kind() if self.options is None else self.options

    def cell(
        self, relation: str, *, options: Named = (), files: Mapping[str, Path] | None = None, **varies: Value
    ) -> "Cell":
        """A cell under these settings: a relation, what varies, and those options and files that its rows depend on."""
        paths = tuple((name, str(path)) for name, path in (files or {}).items())
        return Cell(self.model, relation, self.seed, self.threads, tuple(varies.items()), options, self.loading, paths)


def at_least(options: Any, **least: int) -> None:
    """Check that these options, by name, are not below what is given here.

    Raises:
        ValueError: one is.
    """
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise ValueError(f"{name}: expected at least {bound}, got {getattr(options, name)}.")


def field_names(options: Any) -> list[str]:
    """The names of a study's options, given themselves or their class."""
    return [field.name for field in dataclasses.fields(options)]


def plain(options: Any, leave_out: Sequence[str] = ()) -> Named:
    """The options of a study as a cell holds them, but for those that say which cells there are."""
    values = {name: getattr(options, name) for name in field_names(options) if name not in leave_out}
    return tuple(
        (name, json.dumps(value.to_json()) if isinstance(value, Template) else value) for name, value in values.items()
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """The smallest part of a study that is measured, kept and repeated by itself.

    Attributes:
        model: where the model is loaded from; what it *is* says its fingerprint.
        relation: name of a library relation; empty where the cell is about the library as a whole.
        seed: of everything random.
        threads: torch's, while the cell is measured.
        varies: what else tells the study's cells apart.
        options: of the study, those that the rows depend on.
        loading: how the model is loaded, where it is not as the study chooses.
        files: paths of files that the cell reads, by name; what is in them is in the study's ``data_hash``.
    """

    model: str
    relation: str
    seed: int
    threads: int = 1
    varies: tuple[tuple[str, Value], ...] = ()
    options: Named = ()
    loading: Named = ()
    files: tuple[tuple[str, str], ...] = ()

    def __getitem__(self, name: str) -> Value:
        return dict(self.varies)[name]

    def chosen(self, kind: Callable[..., Any]) -> Any:
        """The options as their class has them; those that a cell does not depend on have their defaults."""
        return kind(**self.given())

    def given(self) -> dict[str, Any]:
        """The options by name, the policy of BOS in the template."""
        values: dict[str, Any] = dict(self.options)
        text = values.get("template")
        if text is not None and text.startswith("{"):
            values["template"] = Template.from_json(json.loads(text))
        bos = values.pop("bos", None)
        if bos is not None:
            values["template"] = get_template(values["template"]).with_bos(bos)
        return values

    def load(self, **otherwise: Any) -> Any:
        """The cell's model, loaded as the user says and, where that is not said, in this way."""
        how: dict[str, Any] = otherwise | dict(self.loading)
        return Loading(self.model, **how).load()

    def recorded(self) -> dict[str, Any]:
        """The cell as files keep it."""
        return asdict(self) | {"loading": self.recorded_loading}

    @property
    def recorded_loading(self) -> Named:
        """How its model is loaded, without :data:`UNRECORDED`."""
        return tuple((name, value) for name, value in self.loading if name not in UNRECORDED)

    def key(self, study: "Study", model: Mapping[str, Value], data: str) -> str:
        """16 hex digits of a SHA-256 over all that the cell's rows depend on: no path, no time.

        Args:
            study: whose cell it is.
            model: the model's fingerprint, which stands for the name that it is loaded by.
            data: hash of the word pairs.
        """
        # what is not there leaves no trace, so that a study without options has the keys it always had
        values = {name: value for name, value in self.recorded().items() if name not in ("model", "files")}
        values = {name: value for name, value in values.items() if value or name not in ("options", "loading")}
        whole = [study.name, study.version, values, dict(model), data]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return ", ".join(
            [*filter(None, [self.relation]), f"seed {self.seed}", *(f"{name} {value}" for name, value in self.varies)]
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, whatever a study's cells need of it, and its fingerprint's fields with ``weights`` in it."""

    model: Any
    fingerprint: Mapping[str, Value]


def load_float32(cell: Cell) -> Loaded:
    """The cell's model, in float32 on the CPU unless the user says otherwise."""
    return named(cell.load(device="cpu", dtype="float32"))


def named(model: Any, reference: Any = None) -> Loaded:
    """What a cell is run with, under the fingerprint of ``reference``, by default of the model itself."""
    fields = asdict(fingerprint(model if reference is None else reference))
    return Loaded(model, {name: value for name, value in fields.items() if name not in INFORMATIVE})


def library_data(cell: Cell) -> str:
    """Hash of the relation's pairs, and of the library that random labels are drawn from."""
    own = load_relation(cell.relation).data_hash if cell.relation else ""
    text = f"{own}\n{_library_hash()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _library_hash() -> str:
    lines = [f"{name}\t{load_relation(name).data_hash}" for name in list_relations()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def every(n: int, settings: Settings) -> list[str]:
    """The settings' relations, or every ``n``-th of the library."""
    return list(settings.relations or list_relations()[::n])


def no_file(options: Any) -> Fingerprint | None:
    """Of a study whose options name no file."""
    return None


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
        run: the rows of one cell, with the model that ``load`` gave, and with a
            :class:`~fvlens.studies.Shelf` if it ``shares``. What ``run`` measures in seconds is the only thing
            that may differ from one run to the next.
        tables: from all rows (each with the cell's relation, seed and what varies) to tables by name.
        markdown: a page's text from those tables, also when they were read from files.
        figures: from all rows to figures by name.
        load: the model of a cell.
        loading: names of those varying values that decide what ``load`` gives.
        data_hash: of all word pairs that a cell sees.
        options: a frozen dataclass of settings of this study alone, each with a default and a line in its docstring:
            the command makes its options of them.
        takes: what of :data:`LOADING` the user may say; the rest is the study's own choice.
        made_on: the model that a file among the options was made on, and which is loaded unless the user names another;
            None without such a file.
        shares: whether cells need what others make.
        excerpts: by name, what pages quote that have no room for all of ``markdown``, or another subject.
        pictures: names of figures that pages show; they are kept as ``assets/NAME.png``.
    """

    name: str
    summary: str
    version: int
    cells: Callable[[Settings], list[Cell]]
    run: Callable[..., list[dict[str, Value]]]
    tables: "Callable[[Sequence[Row]], dict[str, pd.DataFrame]]"
    markdown: "Callable[[Mapping[str, pd.DataFrame]], str]"
    figures: Callable[[Sequence[Row]], dict[str, Any]] = no_figures
    load: Callable[[Cell], Loaded] = load_float32
    loading: tuple[str, ...] = field(default=())
    data_hash: Callable[[Cell], str] = library_data
    options: Callable[..., Any] | None = None
    takes: tuple[str, ...] = LOADING
    made_on: Callable[[Any], Fingerprint | None] = no_file
    shares: bool = False
    excerpts: "Mapping[str, Callable[[Mapping[str, pd.DataFrame]], str]]" = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
