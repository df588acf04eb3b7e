"""Methods of one budget over relations: what they cost, their top-1 on test queries, and what they change elsewhere.

A cell is a relation, whose rows are those of :func:`fvlens.training.compare`: demonstrations, vectors with and without
training, activation addition, soft prompts and low-rank updates, all made from the same training pairs.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlens.find import finished
from fvlens.studies._lab import StartOptions
from fvlens.studies._study import Cell, Row, Settings, Study, Value, at_least, every, plain
from fvlens.studies._tables import means_grid, own_or_means, standing
from fvlens.training import compare

if TYPE_CHECKING:
    import pandas as pd

SCORES = {"top1": ("top-1", 2), "kl": ("KL", 3)}
"""Key of a score with an interval -> its heading and digits."""


@dataclass(frozen=True, slots=True)
class CompareOptions(StartOptions):
    """Options of the comparison.

    Attributes:
        n_train: training pairs of every method.
        n_unrelated: prompts behind the collateral change.
    """

    n_train: int = 20
    n_unrelated: int = 200

    def __post_init__(self) -> None:
        StartOptions.__post_init__(self)
        at_least(self, n_train=1, n_unrelated=1)


def _cells(settings: Settings) -> list[Cell]:
    own = plain(settings.chosen(CompareOptions))
    return [settings.cell(name, options=own) for name in every(14, settings)]


def _run(cell: Cell, model: Any) -> list[dict[str, Value]]:
    """A row for each method."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* was interrupted")  # said once, by the study
        found = finished(compare(model, cell.relation, seed=cell.seed, progress=False, **cell.given()))
    whole: dict[str, Value] = {
        "layer": found.layer, "scale": found.scale, "n_train": found.n_train, "n_valid": found.n_valid,
        "n_test": found.n_test, "caution": found.caution,
    }  # fmt: skip
    frame = found.to_dataframe().drop(columns=["relation", "n", "exact"])
    named = frame.rename(columns={"low": "top1_low", "high": "top1_high"})
    return [row | whole for row in named.to_dict("records")]  # pyright: ignore


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    means = ("n_trainable", "seconds", "mean_rank", "probability", "log_probability")
    whole = ("layer", "scale", "n_train", "n_valid", "n_test")
    return {"compare": own_or_means(rows, ("method",), tuple(SCORES), (*means, *whole), ("caution",))}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    frame = tables["compare"]
    first: Any = frame.iloc[0]
    n = max(map(int, frame["n_relations"].tolist()))
    shown = frame.assign(
        trained=[f"{value:,.0f}" for value in frame["n_trainable"]],
        duration=[f"{value:.1f}" for value in frame["seconds"]],
    )
    labels = {"method": "method", "trained": "trained", "duration": "seconds"}
    table = means_grid(shown, labels, SCORES)
    place = (
        f"{first['n_train']:.0f} training and {first['n_valid']:.0f} validation pairs, {first['n_test']:.0f} test "
        f"queries, vectors after layer {first['layer']:.0f}, the function vector times {first['scale']:g}. "
        if n == 1
        else ""
    )
    # an empty text is no text once it was in a file
    caution = f" Heads: {first['caution']}" if isinstance(first["caution"], str) and first["caution"] else ""
    below = (
        f"{place}No demonstrations unless the method is demonstrations. Trained: numbers that were trained. KL: "
        "collateral change of the next token after prompts of other relations, in nats. Intervals: 95% bootstrap over "
        f"{'test queries and prompts' if n == 1 else f'{n} relations'}.{caution}"
    )
    return "\n\n".join([table, below, standing(frame)])


COMPARE = Study(
    name="compare",
    summary="fine-tuned vectors against prompting, activation addition, soft prompts and LoRA",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
    options=CompareOptions,
)
