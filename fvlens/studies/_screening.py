"""The gradient screens against the exact effects.

For every relation: task means over 100 clean prompts, and the effects of all heads on 25 prompts with permuted and 25
with random labels, exactly and by each screen, on the same prompts. Agreement is with the exact map; cost is a screen's
time over that of the exact effects, the shortest of a few runs of each. Values are means over relations, with 95%
bootstrap intervals over relations.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.activations import mean_head_activations
from fvlens.attribution import IndirectEffects, indirect_effects
from fvlens.find import RANKINGS
from fvlens.prompts import build_prompts
from fvlens.relations import load_relation
from fvlens.studies._study import Cell, Row, Settings, Study, Value, every
from fvlens.studies._tables import markdown, means_over_relations

if TYPE_CHECKING:
    import pandas as pd

REPEATS = 3
"""Runs whose shortest time counts."""

SCREENS: dict[str, dict[str, Any]] = {
    "atp": {"method": "atp"},
    "atp, recheck 16": {"method": "atp", "recheck": 16},
    "ig, 8 steps": {"method": "ig", "n_steps": 8},
    "lrp": {"method": "lrp"},
}
LABELS = {"screen": "screen", "labels": "labels"}
COLUMNS = {
    "spearman": ("Spearman with exact", 2),
    "overlap": ("top 10 shared", 2),
    "first": ("best head first", 2),
    "cost": ("time over exact", 2),
}
"""Key of a score -> its heading and digits."""


def _cells(settings: Settings) -> list[Cell]:
    return [settings.cell(name) for name in every(8, settings)]


def _run(cell: Cell, model: Any) -> list[dict[str, Value]]:
    """A row for each kind of labels and screen."""
    generator = torch.Generator().manual_seed(cell.seed)
    split = load_relation(cell.relation).split(generator)
    shared: dict[str, Any] = {"queries": split.valid, "relation": cell.relation, "generator": generator}
    clean = build_prompts(model, split.train, n_prompts=100, **shared)
    means = mean_head_activations(model, clean, progress=False)
    rows: list[dict[str, Value]] = []
    for labels in RANKINGS:
        corrupted = build_prompts(model, split.train, n_prompts=25, labels=labels, **shared)

        def run(**settings: Any) -> IndirectEffects:
            return indirect_effects(model, corrupted, means, progress=False, **settings)  # noqa: B023 (called at once)

        exact, exact_seconds = _timed(run)
        for screen, settings in SCREENS.items():
            effects, seconds = _timed(lambda settings=settings: run(**settings))
            quality = effects.compare(exact, n_resamples=10, generator=torch.Generator().manual_seed(cell.seed))
            overlap = quality.overlap if quality.overlap_rechecked is None else quality.overlap_rechecked
            rows.append(
                {
                    "screen": screen,
                    "labels": labels,
                    "spearman": quality.spearman,
                    "overlap": overlap,
                    "first": float(effects.ranking[0] == exact.ranking[0]),
                    "cost": seconds / exact_seconds,
                }
            )
    return rows


def _timed(run: Callable[[], IndirectEffects]) -> tuple[IndirectEffects, float]:
    """What ``run`` gives, and the shortest of its times."""

    def once() -> tuple[float, IndirectEffects]:
        began = time.process_time()
        found = run()
        return time.process_time() - began, found

    runs = [once() for _ in range(REPEATS)]
    return runs[0][1], min(seconds for seconds, _ in runs)


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    return {"screens": means_over_relations(rows, tuple(LABELS), tuple(COLUMNS))}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    return markdown(tables["screens"], LABELS, COLUMNS)


SCREENING = Study(
    name="screening",
    summary="gradient screens of all heads against the exact effects: agreement and time",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
)
