"""What the vectors of a basis gain by starting from function vectors, and what that costs.

For every relation, over the division that :func:`~fvlens.composition.library_composite` keeps: vectors trained on the
first 20 training pairs, for 20 epochs, the epoch chosen on the validation pairs; from zero a third of the way up, as a
basis is trained by default; from the vector of :func:`~fvlens.find_vector` at its layer and scale; and from zero at
that layer. Beside them that vector as it is. Top-1 is that of bare queries, of the validation pairs, by which a start
is to be chosen, and of the test pairs. Cost is the time of start and training over that of training from zero a third
of the way up; a basis is trained in one batch, which takes less still. Values are means over relations, with 95%
bootstrap intervals over relations.

On rel-small (the tables in ``assets/measured/start``) starts from function vectors are ahead on validation and test
pairs, at more than twice the time.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.evaluation import evaluate
from fvlens.find import find_vector
from fvlens.relations import held_out, load_relation
from fvlens.studies._study import Cell, Row, Settings, Study, Value
from fvlens.studies._tables import markdown, means_over_relations
from fvlens.training import finetune

if TYPE_CHECKING:
    import pandas as pd

N_TRAIN, EPOCHS = 20, 20

LABELS = {"start": "start", "layer": "layer"}
COLUMNS = {
    "valid": ("top-1, validation", 3),
    "test": ("top-1, test", 3),
    "log_probability": ("log-probability, test", 3),
    "cost": ("time over training from zero", 1),
}
"""Key of a score -> its heading and digits."""


def _cells(settings: Settings) -> list[Cell]:
    names = settings.relations or held_out().relations()[::13]
    return [settings.cell(name) for name in names]


def _run(cell: Cell, model: Any) -> list[dict[str, Value]]:
    """A row for each start and layer."""
    whole = held_out().split(load_relation(cell.relation))
    split = dataclasses.replace(whole, train=whole.train[:N_TRAIN])

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(cell.seed)

    def tuned(init: Any, layer: int) -> Any:
        return finetune(
            model, split.train, init=init, layer=layer, valid=split.valid, epochs=EPOCHS, generator=fresh(),
            progress=False,
        ).vector  # fmt: skip

    tuned("zero", 0)  # weights are laid out once, and not at the cost of the first
    third = model.cfg.n_layers // 3
    plain, of_zero = _timed(lambda: tuned("zero", third))
    found, of_start = _timed(
        lambda: find_vector(model, split, relation=cell.relation, generator=fresh(), progress=False)
    )
    at_best, of_best = _timed(lambda: tuned("zero", found.layer))
    started, of_started = _timed(lambda: tuned(found.vector, found.layer))
    made = [
        ("zero", "a third up", plain, of_zero),
        ("zero", "chosen", at_best, of_start + of_best),
        ("function vector", "chosen", started, of_start + of_started),
        ("function vector, not trained", "chosen", found.vector, of_start),
    ]
    rows: list[dict[str, Value]] = []
    for start, layer, vector, seconds in made:
        valid, test = (
            evaluate(model, pairs, vector=vector, relation=cell.relation, generator=fresh())
            for pairs in (split.valid, split.test)
        )
        rows.append(
            {
                "start": start,
                "layer": layer,
                "valid": valid.top1,
                "test": test.top1,
                "log_probability": test.answer_log_probability,
                "cost": seconds / of_zero,
            }
        )
    return rows


def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """What ``make`` gives, and its time on the processor."""
    began = time.process_time()
    made = make()
    return made, time.process_time() - began


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    return {"starts": means_over_relations(rows, tuple(LABELS), tuple(COLUMNS))}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    return markdown(tables["starts"], LABELS, COLUMNS)


START = Study(
    name="start",
    summary="vectors of a basis trained from zero and from function vectors: top-1 and time",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
)
