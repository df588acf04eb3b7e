"""What composite vectors owe to their basis: the same analogies with parts of it dropped, merged, drowned or removed.

A cell is one change of the basis, measured by :func:`fvlens.composition.basis_study` with nothing but this change. All
cells draw the same analogies, and the composite is the same in all: that of a file, or of the library's basis, which
is then trained with the study's seed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fvlens.composition import BasisStudy, Change, CompositeMap, basis_study, library_analogies, library_composite
from fvlens.metrics import Difference, Interval
from fvlens.models import Fingerprint
from fvlens.studies._study import Cell, Loaded, Row, Settings, Study, Value, at_least, library_data, named, plain
from fvlens.studies._tables import grid, in_brackets, standing
from fvlens.universal import file_hash

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

NO_CHANGE: dict[str, Any] = {"drop": (), "merge": None, "noise": (), "remove": ()}
CHANGES: dict[str, dict[str, Any]] = {
    "full basis": {},
    "10% dropped": {"drop": (0.1,)},
    "25% dropped": {"drop": (0.25,)},
    "50% dropped": {"drop": (0.5,)},
    "near-duplicates merged": {"merge": 0.9},
    "25% noise added": {"noise": (0.25,)},
    "own family removed": {"remove": ("family",)},
    "own domain removed": {"remove": ("domain",)},
}
"""Arguments of :func:`fvlens.composition.basis_study` by the name that it gives to the change."""

REFERENCES = {"unsteered": "unsteered", "own_vector": "own vector"}
"""Column -> what the changes are compared with, as :class:`~fvlens.composition.BasisStudy` names it."""


@dataclass(frozen=True, slots=True)
class SensitivityOptions:
    """Options of the study of bases.

    Attributes:
        composite: a file of `fvlens compose`; without one the library's basis is trained first.
        n_test: test analogies, half near, half far.
        n_fit: training analogies of each map, if there is a map.
        n_repeats: draws behind each random change.
        setting: prompts that are steered.
    """

    composite: Path | None = None
    n_test: int = 300
    n_fit: int = 600
    n_repeats: int = 3
    setting: Literal["zero_shot", "one_shot"] = "zero_shot"

    def __post_init__(self) -> None:
        at_least(self, n_repeats=1, n_test=2, n_fit=4)


def _made_on(options: SensitivityOptions) -> Fingerprint | None:
    return None if options.composite is None else CompositeMap.load(options.composite).basis.fingerprint


def _cells(settings: Settings) -> list[Cell]:
    options: SensitivityOptions = settings.chosen(SensitivityOptions)
    if options.composite is not None and settings.relations:
        raise ValueError(f"sensitivity: {options.composite.name} has a basis, so relations have nothing to choose.")
    basis = {"basis": " ".join(settings.relations)} if settings.relations else {}
    own = plain(options, ("composite",))
    files = {} if options.composite is None else {"composite": options.composite}
    return [settings.cell("", options=own, files=files, change=name, **basis) for name in CHANGES]


def _data(cell: Cell) -> str:
    """Hash of the library and of the composite's file."""
    hashes = [library_data(cell), *(file_hash(path) for _, path in cell.files)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]


class _Workplace:
    """A model, and the composite that was asked for last."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._what: Any = None
        self._made: CompositeMap | None = None

    def composite(self, cell: Cell) -> CompositeMap:
        names = str(dict(cell.varies).get("basis", "")).split() or None
        what = (cell.files, cell.seed, cell.threads, names)
        if self._made is None or what != self._what:
            if cell.files:
                self._made = CompositeMap.load(Path(dict(cell.files)["composite"]))
            else:
                generator = torch.Generator().manual_seed(cell.seed)
                self._made = library_composite(self.model, names=names, generator=generator, progress=False)
            self._what = what
        return self._made


def _load(cell: Cell) -> Loaded:
    model = cell.load(device="cpu", dtype="float32")
    return named(_Workplace(model), model)


def _run(cell: Cell, place: _Workplace) -> list[dict[str, Value]]:
    """One row: the change."""
    options: SensitivityOptions = cell.chosen(SensitivityOptions)
    solver = place.composite(cell)
    generator = torch.Generator().manual_seed(cell.seed)
    drawn: dict[str, Any] = dict(generator=generator, names=solver.basis.names, n_foils=0)
    kind = "far" if solver.setting == "one_shot" else None  # as library_composite fits
    fit = [] if solver.map == "none" else library_analogies("train", n=options.n_fit, kind=kind, **drawn)
    found = basis_study(
        place.model, solver, library_analogies("test", n=options.n_test, **drawn), fit=fit,
        n_repeats=options.n_repeats, setting=options.setting, generator=generator, progress=False,
        **(NO_CHANGE | CHANGES[str(cell["change"])]),
    )  # fmt: skip
    one = found[str(cell["change"])]
    row: dict[str, Value] = {
        "n_basis": one.n_basis, "n_repeats": one.n_repeats, "top1": one.top1, "low": one.interval.low,
        "high": one.interval.high, "difference": one.difference.mean, "diff_low": one.difference.interval.low,
        "diff_high": one.difference.interval.high, "stability": one.stability, "n_analogies": found.n_analogies,
        "setting": found.setting,
    }  # fmt: skip
    return [row | {key: found.references.get(name, float("nan")) for key, name in REFERENCES.items()}]


def together(rows: Sequence[Row]) -> BasisStudy:
    """The study that these rows, read back, are parts of."""
    given: list[Any] = list(rows)
    first = given[0]
    return BasisStudy(
        tuple(
            Change(
                row["change"], row["n_basis"], row["n_repeats"], row["top1"], Interval(row["low"], row["high"], 0.95),
                Difference(row["difference"], Interval(row["diff_low"], row["diff_high"], 0.95)), row["stability"],
            )
            for row in given
        ),
        {name: first[key] for key, name in REFERENCES.items() if first[key] == first[key]},
        first["n_analogies"],
        first["setting"],
    )  # fmt: skip


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    last: Any = rows[0]
    whole = {name: last[name] for name in (*REFERENCES, "n_analogies", "setting")}
    return {"sensitivity": together(rows).to_dataframe().assign(**whole)}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    frame = tables["sensitivity"]
    heads = ("basis", "vectors", "top-1", "against the full basis", "weights in common")
    lines = [
        (
            row["change"],
            f"{row['n_basis']:.0f}",
            in_brackets(row["top1"], row["low"], row["high"], ".3f"),
            in_brackets(row["difference"], row["diff_low"], row["diff_high"], "+.3f"),
            f"{row['stability']:.2f}",
        )
        for row in frame.to_dict("records")
    ]
    first = frame.iloc[0]
    compared = ", ".join(f"{name} {first[key]:.3f}" for key, name in REFERENCES.items() if first[key] == first[key])
    prompts = {"zero_shot": "bare query", "one_shot": "one-shot prompt"}[first["setting"]]
    below = f"{first['n_analogies']} analogies, {prompts}; {compared}. Intervals: 95% bootstrap over analogies."
    return "\n\n".join([grid(heads, lines), below, standing(frame)])


def _figures(rows: Sequence[Row]) -> "dict[str, go.Figure]":
    return {"sensitivity": together(rows).plot()}


SENSITIVITY = Study(
    name="sensitivity",
    summary="analogies with parts of a composite's basis dropped, merged, drowned in noise or removed",
    version=2,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
    figures=_figures,
    load=_load,
    data_hash=_data,
    options=SensitivityOptions,
    made_on=_made_on,
)
