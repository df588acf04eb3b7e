"""What products in bfloat16 cost a training.

For every relation: a vector trained from zero on 20 pairs for 20 epochs, a third of the way up, with the products of
the frozen float32 model in float32 and, all else alike, in bfloat16; residual stream, sums and gradients stay float32.
The yardstick is the first row: float32 again, with another order of the minibatches. A row compares with the first
training: the cosine of the two vectors, the largest difference of a validation loss over epochs (nats), the share of
test queries whose outcome differs, and top-1 of both; every vector is scored in float32. Values are means over
relations, with 95% bootstrap intervals over relations.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.evaluation import evaluate
from fvlens.relations import load_relation
from fvlens.studies._study import Cell, Row, Settings, Study, Value, every
from fvlens.studies._tables import markdown, means_over_relations
from fvlens.training import finetune

if TYPE_CHECKING:
    import pandas as pd

N_TRAIN, EPOCHS = 20, 20
OTHER_ORDER = "float32, other order"
"""The yardstick's name in the place of a precision."""

LABELS = {"products": "products"}
COLUMNS = {
    "cosine": ("cosine of vectors", 5),
    "loss": ("largest difference of loss", 4),
    "differ": ("test outcomes that differ", 3),
    "top1_float32": ("top-1, float32", 3),
    "top1": ("top-1", 3),
}
"""Key of a score -> its heading and digits."""


def _cells(settings: Settings) -> list[Cell]:
    return [settings.cell(name) for name in every(14, settings)]


def _run(cell: Cell, model: Any) -> list[dict[str, Value]]:
    """A row for the yardstick, and one for products in bfloat16."""
    split = load_relation(cell.relation).split(torch.Generator().manual_seed(cell.seed))

    def trained(seed: int, **how: Any) -> tuple[Any, Any]:
        tuned = finetune(
            model, split.train[:N_TRAIN], init="zero", layer=model.cfg.n_layers // 3, valid=split.valid, epochs=EPOCHS,
            generator=torch.Generator().manual_seed(seed), progress=False, **how,
        )  # fmt: skip
        scores = evaluate(model, split.test, vector=tuned.vector, generator=torch.Generator().manual_seed(cell.seed))
        return tuned, scores

    tuned, scores = trained(cell.seed)
    rows: list[dict[str, Value]] = []
    for products, seed, how in (
        (OTHER_ORDER, cell.seed + 1, {}),
        ("bfloat16", cell.seed, dict(compute=torch.bfloat16)),
    ):
        other, others_scores = trained(seed, **how)
        differ = (scores.ranks == 0) != (others_scores.ranks == 0)
        rows.append(
            {
                "products": products,
                "cosine": tuned.vector.cosine(other.vector),
                "loss": float((tuned.history.valid_loss - other.history.valid_loss).abs().max()),
                "differ": float(differ.float().mean()),
                "top1_float32": scores.top1,
                "top1": others_scores.top1,
            }
        )
    return rows


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    return {"trainings": means_over_relations(rows, tuple(LABELS), tuple(COLUMNS))}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    return markdown(tables["trainings"], LABELS, COLUMNS)


COMPUTE = Study(
    name="compute",
    summary="vectors trained with products in bfloat16 against float32: vectors, losses and outcomes",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
)
