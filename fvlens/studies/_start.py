"""What the vectors of a basis gain by starting from function vectors, and what that costs.

A whole basis at a time, of all relations outside the held-out families, over the division that
:func:`~fvlens.composition.library_composite` keeps: vectors trained on the first 20 training pairs, for 20 epochs, the
epoch chosen on the validation pairs; from function vectors, as that function takes them by default, at their layer;
from zero at that layer; and from zero a third of the way up. Beside them the function vectors as they are. Top-1 is
that of bare queries, of the validation pairs, by which a start is to be chosen, and of the test pairs. Cost is the
processor time of starts and training over that of training from zero a third of the way up. Values are means over
relations, with 95% bootstrap intervals over relations.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.composition import basis_starts
from fvlens.evaluation import evaluate
from fvlens.relations import held_out, load_relation
from fvlens.studies._study import Cell, Row, Settings, Study, Value
from fvlens.studies._tables import markdown, means_over_relations
from fvlens.training import finetune, finetune_many

if TYPE_CHECKING:
    import pandas as pd

N_TRAIN, EPOCHS = 20, 20

LABELS = {"start": "start", "layer": "layer"}
COLUMNS = {
    "valid": ("top-1, validation", 3),
    "test": ("top-1, test", 3),
    "log_probability": ("log-probability, test", 3),
}
"""Key of a score -> its heading and digits."""
COST = {"cost": ("time over training from zero", 1)}


ZERO = ("zero", "a third up")
WAYS = (ZERO, ("zero", "chosen"), ("function vector", "chosen"), ("function vector, not trained", "chosen"))
"""Start and layer of each way; ``"chosen"`` is where the function vectors are."""


def _cells(settings: Settings) -> list[Cell]:
    only: dict[str, Any] = {"basis": " ".join(settings.relations)} if settings.relations else {}
    return [settings.cell("", start=start, layer=layer, **only) for start, layer in WAYS]


def _run(cell: Cell, model: Any) -> list[dict[str, Value]]:
    """A row for each relation of the basis."""
    names = str(dict(cell.varies).get("basis", "")).split() or held_out().relations()
    wholes = {name: held_out().split(load_relation(name)) for name in names}
    splits = {name: dataclasses.replace(whole, train=whole.train[:N_TRAIN]) for name, whole in wholes.items()}

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(cell.seed)

    # weights are laid out once, and not at the cost of any way
    finetune(model, splits[names[0]].train, init="zero", layer=0, epochs=1, generator=fresh(), progress=False)
    began = time.process_time()
    vectors: Any = "zero"
    layer = model.cfg.n_layers // 3
    if cell["layer"] == "chosen":
        starts = basis_starts(model, splits, generator=fresh(), progress=False)
        layer = starts[names[0]].layer
        vectors = "zero" if cell["start"] == "zero" else starts
    if cell["start"] in ("zero", "function vector"):
        vectors = finetune_many(
            model, splits, init=vectors, layer=layer, epochs=EPOCHS, generator=fresh(), progress=False
        ).vectors
    seconds = time.process_time() - began

    rows: list[dict[str, Value]] = []
    for name, split in splits.items():
        valid, test = (
            evaluate(model, pairs, vector=vectors[name], relation=name, generator=fresh())
            for pairs in (split.valid, split.test)
        )
        rows.append(
            {
                "relation": name,
                "valid": valid.top1,
                "test": test.top1,
                "log_probability": test.answer_log_probability,
                "seconds": seconds,
            }
        )
    return rows


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    frame = means_over_relations(rows, tuple(LABELS), tuple(COLUMNS))
    seconds = {(row["start"], row["layer"]): float(row["seconds"]) for row in rows}  # of a basis: the same in its rows
    ways = zip(frame["start"], frame["layer"], strict=True)
    frame["cost"] = [seconds[way] / seconds.get(ZERO, float("nan")) for way in ways]
    return {"starts": frame}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    return markdown(tables["starts"], LABELS, COLUMNS | COST)


START = Study(
    name="start",
    summary="vectors of a basis trained from zero and from function vectors: top-1 and time",
    version=2,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
)
