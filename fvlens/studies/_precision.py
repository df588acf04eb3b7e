"""What half precision costs.

For every relation: task means over 100 clean prompts, indirect effects over 25 prompts with permuted and 25 with random
labels, and the function vector of the 10 best heads; in float32, and on the same prompts with the model in bfloat16 and
in float16. A row of the table compares one precision with float32 in the same class of model: means over relations,
with 95% bootstrap intervals over relations. The yardstick is the first row: float32 on 25 other corrupted prompts.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvlens.activations import HeadMeans, mean_head_activations
from fvlens.attribution import IndirectEffects, indirect_effects
from fvlens.evaluation import evaluate
from fvlens.find import RANKINGS, best_place
from fvlens.metrics import spearman, top_k_overlap
from fvlens.prompts import Prompts, build_prompts
from fvlens.relations import Pair, load_relation
from fvlens.studies._study import Cell, Loaded, Row, Settings, Study, Value, every, named
from fvlens.studies._tables import markdown, means_over_relations
from fvlens.vectors import FunctionVector, function_vector

if TYPE_CHECKING:
    import pandas as pd

N_HEADS = 10
N_CLEAN, N_CORRUPTED = 100, 25
OTHER_PROMPTS = "other prompts"
"""The yardstick's name in the place of a precision."""

BACKENDS = ("hooked", "bridge")
DTYPES = ("float32", "bfloat16", "float16")
"""The reference comes first."""

COLUMNS = {
    "spearman": ("Spearman of AIE", 3),
    "overlap": (f"top {N_HEADS} heads shared", 2),
    "difference": ("largest difference of AIE", 4),
    "clear": ("heads above it", 2),
    "spearman_clear": ("Spearman of these", 4),
    "cosine": ("cosine of vectors", 5),
    "top1_float32": ("top-1, float32", 3),
    "top1": ("top-1", 3),
}
"""Key of a score -> its heading and digits."""

QUOTED = ("spearman", "overlap", "difference")
"""The scores that a page has room for."""

LABELS = {"backend": "class", "precision": "precision", "labels": "labels"}


def _cells(settings: Settings) -> list[Cell]:
    names = every(14, settings)
    return [settings.cell(name, backend=backend) for backend in BACKENDS for name in names]


def _load(cell: Cell) -> Loaded:
    models = {precision: cell.load(device="cpu", dtype=precision, backend=cell["backend"]) for precision in DTYPES}
    return named(models, models["float32"])


def compare(effects: IndirectEffects, reference: IndirectEffects) -> dict[str, float]:
    """Agreement of two AIE maps of the same heads.

    ``difference`` is the largest absolute difference of the AIE of a head, ``clear`` the share of heads whose AIE is
    larger than that in ``reference`` (without its sign), and ``spearman_clear`` the rank correlation of these heads
    (NaN for fewer than 2).
    """
    ours, theirs = effects.aie.flatten(), reference.aie.flatten()
    difference = float((ours - theirs).abs().max())
    clear = theirs.abs() > difference
    return {
        "spearman": spearman(ours, theirs),
        "overlap": top_k_overlap(ours, theirs, N_HEADS),
        "difference": difference,
        "clear": float(clear.float().mean()),
        "spearman_clear": spearman(ours[clear], theirs[clear]) if int(clear.sum()) > 1 else float("nan"),
    }


def _run(cell: Cell, models: dict[str, Any]) -> list[dict[str, Value]]:
    """A row for each precision (the yardstick first) and kind of labels; ``models`` is by precision."""
    reference = models["float32"]
    generator = torch.Generator().manual_seed(cell.seed)
    split = load_relation(cell.relation).split(generator)

    def prompts(n_prompts: int, labels: Any) -> Prompts:
        return build_prompts(
            reference,
            split.train,
            queries=split.valid,
            n_prompts=n_prompts,
            labels=labels,
            relation=cell.relation,
            generator=generator,
        )

    clean = prompts(N_CLEAN, "true")
    corrupted = {labels: prompts(N_CORRUPTED, labels) for labels in RANKINGS}
    others = {labels: prompts(N_CORRUPTED, labels) for labels in RANKINGS}

    def top1(model: Any, vector: FunctionVector) -> float:
        return evaluate(model, split.test, vector=vector, generator=torch.Generator().manual_seed(cell.seed)).top1

    means = mean_head_activations(reference, clean, progress=False)
    exact, vectors, scales = {}, {}, {}
    for labels in RANKINGS:
        exact[labels] = indirect_effects(reference, corrupted[labels], means, progress=False)
        vectors[labels], scales[labels] = best_vector(reference, split.valid, means, exact[labels], cell.seed)
    best = {labels: top1(reference, vectors[labels]) for labels in RANKINGS}
    rows: list[dict[str, Value]] = []
    for precision, model in models.items():
        same = model is reference
        own_means = means if same else mean_head_activations(model, clean, progress=False)
        for labels in RANKINGS:
            asked = others[labels] if same else corrupted[labels]
            effects = indirect_effects(model, asked, own_means, progress=False)
            layer = vectors[labels].layer
            vector = function_vector(model, own_means, heads=effects.ranking[:N_HEADS], layer=layer, seed=cell.seed)
            vector = vector * scales[labels]
            rows.append(
                {
                    "precision": OTHER_PROMPTS if same else precision,
                    "labels": labels,
                    **compare(effects, exact[labels]),
                    "cosine": vector.cosine(vectors[labels]),
                    "top1_float32": best[labels],
                    "top1": top1(model, vector),
                }
            )
    return rows


def best_vector(
    model: Any, valid: Sequence[Pair], means: HeadMeans, effects: IndirectEffects, seed: int
) -> tuple[FunctionVector, float]:
    """The vector of the best heads at the layer that is best on the validation pairs, and its scale there."""
    vector, sweep = best_place(
        model, means, effects.ranking[:N_HEADS], valid, seed=seed, generator=torch.Generator().manual_seed(seed),
        progress=False,
    )  # fmt: skip
    return vector * sweep.best_scale, sweep.best_scale


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    return {"precisions": means_over_relations(rows, tuple(LABELS), tuple(COLUMNS))}


def _markdown(tables: "Mapping[str, pd.DataFrame]") -> str:
    return markdown(tables["precisions"], LABELS, {score: COLUMNS[score] for score in QUOTED})


PRECISION = Study(
    name="precision",
    summary="effects, heads and vectors of a model in half precision against float32",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=_markdown,
    load=_load,
    loading=("backend",),
    takes=("device", "revision", "base", "trust"),
)
