"""Measure what half precision costs: ``python -m fvlens.zoo.precision [--model DIR] [--every N] [--out FILE]``.

For every relation: task means over 100 clean prompts, indirect effects over 25 prompts with permuted and 25 with random
labels, and the function vector of the 10 best heads; in float32, and on the same prompts with the model in bfloat16 and
in float16. A row of the table compares one precision with float32 in the same class of model: means over relations,
with 95% bootstrap intervals over relations. The yardstick is the first row: float32 on 25 other corrupted prompts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fvlens.activations import HeadMeans, mean_head_activations
from fvlens.attribution import IndirectEffects, indirect_effects
from fvlens.evaluation import evaluate
from fvlens.files import write_json
from fvlens.find import RANKINGS, best_place
from fvlens.metrics import spearman, top_k_overlap
from fvlens.models import load_model
from fvlens.prompts import Prompts, build_prompts
from fvlens.relations import Pair, list_relations, load_relation
from fvlens.vectors import FunctionVector, function_vector
from fvlens.zoo._table import markdown, mean_with_interval

N_HEADS = 10
N_CLEAN, N_CORRUPTED = 100, 25
OTHER_PROMPTS = "other prompts"
"""The yardstick's name in the place of a precision."""

BACKENDS = ("hooked", "bridge")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

COLUMNS = {
    "spearman": ("Spearman of AIE", 4),
    "overlap": (f"top {N_HEADS} shared", 3),
    "difference": ("largest difference of AIE", 4),
    "clear": ("heads above it", 2),
    "spearman_clear": ("Spearman of these", 4),
    "cosine": ("cosine of vectors", 5),
    "top1_float32": ("top-1, float32", 3),
    "top1": ("top-1", 3),
}
"""Key of a score -> its heading and digits."""

LABELS = {"backend": "class", "precision": "precision", "labels": "labels"}


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


def measure_relation(models: dict[str, Any], name: str, seed: int) -> dict[tuple[str, str], dict[str, float]]:
    """Scores of one relation by (precision, labels).

    Args:
        models: precision -> model; ``"float32"`` is the reference.
        name: the relation.
        seed: of split and prompts.
    """
    reference = models["float32"]
    generator = torch.Generator().manual_seed(seed)
    split = load_relation(name).split(generator)

    def prompts(n_prompts: int, labels: Any) -> Prompts:
        return build_prompts(
            reference,
            split.train,
            queries=split.valid,
            n_prompts=n_prompts,
            labels=labels,
            relation=name,
            generator=generator,
        )

    clean = prompts(N_CLEAN, "true")
    corrupted = {labels: prompts(N_CORRUPTED, labels) for labels in RANKINGS}
    others = {labels: prompts(N_CORRUPTED, labels) for labels in RANKINGS}

    def top1(model: Any, vector: FunctionVector) -> float:
        return evaluate(model, split.test, vector=vector, generator=torch.Generator().manual_seed(seed)).top1

    found: dict[tuple[str, str], dict[str, float]] = {}
    means = mean_head_activations(reference, clean, progress=False)
    exact, vectors, scales = {}, {}, {}
    for labels in RANKINGS:
        exact[labels] = indirect_effects(reference, corrupted[labels], means, progress=False)
        vectors[labels], scales[labels] = _vector(reference, split.valid, means, exact[labels], seed)
    best = {labels: top1(reference, vectors[labels]) for labels in RANKINGS}
    for precision, model in models.items():
        same = model is reference
        own_means = means if same else mean_head_activations(model, clean, progress=False)
        for labels in RANKINGS:
            asked = others[labels] if same else corrupted[labels]
            effects = indirect_effects(model, asked, own_means, progress=False)
            layer = vectors[labels].layer
            vector = function_vector(model, own_means, heads=effects.ranking[:N_HEADS], layer=layer, seed=seed)
            vector = vector * scales[labels]
            found[OTHER_PROMPTS if same else precision, labels] = {
                **compare(effects, exact[labels]),
                "cosine": vector.cosine(vectors[labels]),
                "top1_float32": best[labels],
                "top1": top1(model, vector),
            }
    return found


def _vector(
    model: Any, valid: Sequence[Pair], means: HeadMeans, effects: IndirectEffects, seed: int
) -> tuple[FunctionVector, float]:
    """The vector of the best heads at the layer that is best on the validation pairs, and its scale there."""
    vector, sweep = best_place(
        model, means, effects.ranking[:N_HEADS], valid, seed=seed, generator=torch.Generator().manual_seed(seed),
        progress=False,
    )  # fmt: skip
    return vector * sweep.best_scale, sweep.best_scale


def measure(
    model: str | Path,
    names: Sequence[str],
    seed: int,
    *,
    backends: Sequence[Any] = BACKENDS,
    precisions: Sequence[str] = tuple(DTYPES),
    progress: bool = True,
) -> dict[str, Any]:
    """The whole table.

    Returns:
        ``"rows"``: a row a backend, precision and kind of labels, with mean and interval of each of ``COLUMNS``;
        ``"by_relation"``: the scores behind them.
    """
    rows: list[dict[str, Any]] = []
    by_relation: list[dict[str, Any]] = []
    bar = tqdm(total=len(backends) * len(names), desc="measuring", disable=not progress)
    for backend in backends:
        models = {
            precision: load_model(model, device="cpu", dtype=dtype, backend=backend)
            for precision, dtype in {"float32": torch.float32, **DTYPES}.items()
            if precision == "float32" or precision in precisions
        }
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for name in names:
            for key, scores in measure_relation(models, name, seed).items():
                found.setdefault(key, []).append(scores)
                where = {"relation": name, "backend": backend, "precision": key[0], "labels": key[1]}
                by_relation.append(where | scores)
            bar.update()
        for (precision, labels), scores in found.items():
            row: dict[str, Any] = {"backend": backend, "precision": precision, "labels": labels}
            rows.append(row | {key: mean_with_interval([one[key] for one in scores], seed) for key in COLUMNS})
    bar.close()
    return {"relations": list(names), "seed": seed, "rows": rows, "by_relation": by_relation}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fvlens.zoo.precision", description=__doc__)
    parser.add_argument("--model", default="rel-small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relations", nargs="+", default=None, help="only these relations")
    parser.add_argument("--every", type=int, default=14, help="only every Nth relation")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--out", type=Path, default=None, help="write all scores to this JSON file")
    args = parser.parse_args(argv)
    names = args.relations or list_relations()[:: args.every]
    found = measure(args.model, names, args.seed, backends=args.backends, precisions=args.precisions)
    if args.out is not None:
        write_json(args.out, found, indent=1, null_for_nan=True)
    tqdm.write(markdown(found["rows"], LABELS, COLUMNS))


if __name__ == "__main__":
    main()
