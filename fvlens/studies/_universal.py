"""The heads that carry many relations, a relation at a time.

A cell is a relation: the average indirect effect of every head, top-1 with clean demonstrations, and the commonest
answer's share (:func:`fvlens.universal.carried`). Each relation draws from the seed by itself, so that its effects do
not depend on which others are asked for. The table has the mean over the relations that count.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.models import Fingerprint
from fvlens.relations import load_relation
from fvlens.report import RecipeOptions
from fvlens.studies._study import Cell, Row, Settings, Study, Value, every, plain
from fvlens.studies._tables import means_grid, means_over_relations, standing
from fvlens.types import Head
from fvlens.universal import Carried, UniversalHeads, carried, heads_of

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 10
"""Heads that a page shows."""


def _cells(settings: Settings) -> list[Cell]:
    # how many heads are a set changes no effect
    own = plain(settings.chosen(RecipeOptions), ("n_heads",))
    return [settings.cell(name, options=own) for name in every(1, settings)]


def _run(cell: Cell, model: Any) -> list[dict[str, Value]]:
    """A row for each head."""
    generator = torch.Generator().manual_seed(cell.seed)
    split = load_relation(cell.relation).split(generator)
    found = carried(model, split, relation=cell.relation, generator=generator, progress=False, **cell.given())
    low, high = found.icl_interval
    whole: dict[str, Value] = {
        "icl_top1": found.icl_top1, "icl_low": low, "icl_high": high, "majority": found.majority, "path": found.path,
    }  # fmt: skip
    return [
        {"layer": layer, "head": head, "aie": aie, "stderr": stderr, **whole}
        for layer, (effects, errors) in enumerate(zip(found.aie.tolist(), found.prompt_stderr.tolist(), strict=True))
        for head, (aie, stderr) in enumerate(zip(effects, errors, strict=True))
    ]


def heads_from(
    rows: Sequence[Row], n: int, *, complete: bool, fingerprint: Fingerprint, **prompts: Any
) -> UniversalHeads:
    """The set of heads that the study's rows give, as :func:`fvlens.universal.heads_of` makes it.

    Args:
        rows: all rows.
        n: number of heads in the set.
        complete: whether all relations are there.
        fingerprint: the model.
        prompts: ``labels, n_shots, n_prompts, n_corrupted, template``.

    Raises:
        ValueError: the model can do none of the relations; more heads than there are.
    """
    by_relation: dict[str, list[Any]] = {}
    for row in rows:
        by_relation.setdefault(str(row["relation"]), []).append(row)
    shape = (fingerprint.n_layers, fingerprint.n_heads)
    found = [
        Carried(
            torch.tensor([row["aie"] for row in own]).reshape(shape),
            torch.tensor([row["stderr"] for row in own]).reshape(shape),
            own[0]["icl_top1"],
            (own[0]["icl_low"], own[0]["icl_high"]),
            own[0]["majority"],
            own[0]["path"],
        )
        for own in by_relation.values()
    ]
    hashes = [load_relation(name).data_hash for name in by_relation]
    return heads_of(
        found, n, relations=list(by_relation), data_hashes=hashes, complete=complete, fingerprint=fingerprint, **prompts
    )


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    """Heads by their mean AIE over the relations that count, best first."""
    import pandas as pd

    counting = [row for row in rows if float(row["icl_top1"]) > float(row["majority"])]
    if not counting:
        return {"universal": pd.DataFrame(columns=["layer", "head", "aie", "aie_low", "aie_high", "n_relations"])}
    frame = means_over_relations(counting, ("layer", "head"), ("aie",))
    frame = frame.sort_values("aie", ascending=False, kind="stable", ignore_index=True)
    return {"universal": frame.assign(n_relations=len({row["relation"] for row in counting}))}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    frame = tables["universal"]
    if frame.empty:
        return "The model beats the majority label on none of the relations."
    shown = frame.head(SHOWN)
    named = shown.assign(name=[str(Head(*place)) for place in zip(shown["layer"], shown["head"], strict=True)])
    table = means_grid(named, {"name": "head"}, {"aie": ("mean AIE", 4)})
    below = (
        f"Mean over {frame.iloc[0]['n_relations']} relations that the model does. Intervals: 95% bootstrap over them."
    )
    return "\n\n".join([table, below, standing(frame)])


UNIVERSAL = Study(
    name="universal",
    summary="one set of heads for many relations: mean indirect effects over those that the model does",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
    options=RecipeOptions,
)
