"""Measure the table of the model card: ``python -m fvlens.zoo.measure [--model DIR] [--seeds 0 1 2] [--out FILE]``.

For every library relation and seed: split, task means over 100 clean prompts, indirect effects over 25 prompts with
permuted and 25 with random labels, function vectors of the top heads with the layer chosen on the validation pairs, and
scores on the test pairs, whose words are never among the demonstrations. Values are averaged over seeds within a
relation and then over relations; intervals are 95% bootstrap intervals over relations.
"""

import argparse
import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.activations import mean_head_activations
from fvlens.attribution import indirect_effects
from fvlens.evaluation import evaluate, layer_sweep
from fvlens.metrics import bootstrap_interval, paired_difference
from fvlens.models import load_model
from fvlens.prompts import build_prompts
from fvlens.relations import list_relations, load_relation
from fvlens.vectors import FunctionVector, function_vector, random_vector_like

RANKINGS = ("permuted", "random")


def measure_relation(
    model: Any, name: str, seed: int, *, n_heads: int = 10, n_random: int = 10
) -> tuple[dict[str, float], dict[str, Float[Tensor, "layer head"]], dict[str, FunctionVector]]:
    """Scores, AIE maps and function vectors of one relation with one seed."""
    generator = torch.Generator().manual_seed(seed)
    relation = load_relation(name)
    split = relation.split(generator)
    shared: dict[str, Any] = {"queries": split.valid, "relation": name, "generator": generator}
    clean = build_prompts(model, split.train, n_prompts=100, **shared)
    means = mean_head_activations(model, clean, progress=False)
    scores: dict[str, float] = {}
    maps: dict[str, Tensor] = {}
    vectors: dict[str, FunctionVector] = {}
    for ranking in RANKINGS:
        corrupted = build_prompts(model, split.train, n_prompts=25, labels=ranking, **shared)
        effects = indirect_effects(model, corrupted, means, progress=False)
        maps[ranking] = effects.aie
        vector = function_vector(model, means, heads=effects.top(n_heads), layer=0, seed=seed)
        sweep = layer_sweep(model, split.valid, vector, generator=generator, progress=False)
        vectors[ranking] = vector.at_layer(sweep.best_layer)
        scored = evaluate(model, split.test, vector=vectors[ranking], generator=generator)
        scores[f"fv_{ranking}"] = scored.top1
        scores[f"layer_{ranking}"] = float(sweep.best_layer)
    for shots in (10, 2):
        found = evaluate(
            model, split.test, setting="icl", demonstrations=split.train, n_shots=shots, generator=generator
        )
        scores[f"top1_{shots}"], scores[f"p_{shots}"] = found.top1, found.probability
    scores["top1_0"] = evaluate(model, split.test, generator=generator).top1
    for ranking in RANKINGS:
        found = evaluate(
            model, split.test, setting="shuffled", labels=ranking, demonstrations=split.train, generator=generator
        )
        scores[f"top1_{ranking}"], scores[f"p_{ranking}"] = found.top1, found.probability
    randoms = [
        evaluate(model, split.test, vector=random_vector_like(vectors["random"], generator), generator=generator).top1
        for _ in range(n_random)
    ]
    scores["random_vector"] = sum(randoms) / len(randoms)
    scores["n_test"] = float(len(split.test))
    return scores, maps, vectors


def other_relation_scores(model: Any, vectors: dict[str, FunctionVector], seed: int) -> dict[str, float]:
    """Zero-shot top-1 on each relation's test pairs with the vector of another relation whose outputs are disjoint."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, own in vectors.items():
        relation = load_relation(name)
        split = relation.split(torch.Generator().manual_seed(seed))
        outputs = set(relation.outputs)
        disjoint = [
            other
            for other in vectors
            if load_relation(other).family != relation.family and not outputs & set(load_relation(other).outputs)
        ]
        pick = disjoint[int(torch.randint(len(disjoint), (1,), generator=generator))]
        vector = vectors[pick].at_layer(own.layer)
        found[name] = evaluate(model, split.test, vector=vector, generator=generator).top1
    return found


def measure(model: Any, names: Sequence[str], seeds: Sequence[int], *, progress: bool = True) -> dict[str, Any]:
    """The whole table: means over relations, intervals, and every relation's own scores."""
    rows: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    maps: dict[str, list[Tensor]] = {ranking: [] for ranking in RANKINGS}
    bar = tqdm(total=len(seeds) * len(names), desc="measuring", disable=not progress)
    for seed in seeds:
        vectors = {}
        for name in names:
            scores, found, own = measure_relation(model, name, seed)
            for key, value in scores.items():
                rows[name][key].append(value)
            for ranking in RANKINGS:
                maps[ranking].append(found[ranking])
            vectors[name] = own["random"]
            bar.update()
        for name, value in other_relation_scores(model, vectors, seed).items():
            rows[name]["other_relation"].append(value)
    bar.close()
    by_relation = {name: {key: sum(v) / len(v) for key, v in row.items()} for name, row in rows.items()}
    generator = torch.Generator().manual_seed(0)
    keys = list(next(iter(by_relation.values())))
    columns = {key: torch.tensor([by_relation[name][key] for name in names]) for key in keys}
    table = {}
    for key, values in columns.items():
        interval = bootstrap_interval(values, generator=generator)
        table[key] = {"mean": float(values.mean()), "low": interval.low, "high": interval.high}
    paired = {}
    for name, (a, b) in {
        "10 shots over 2": ("top1_10", "top1_2"),
        "2 shots over 0": ("top1_2", "top1_0"),
        "random vector over zero-shot": ("random_vector", "top1_0"),
        "other relation over zero-shot": ("other_relation", "top1_0"),
        "function vector (random labels) over zero-shot": ("fv_random", "top1_0"),
    }.items():
        difference = paired_difference(columns[a], columns[b], generator=generator)
        paired[name] = {
            "mean": difference.mean, "low": difference.interval.low, "high": difference.interval.high
        }  # fmt: skip
    return {
        "relations": len(names),
        "pairs": sum(len(load_relation(name)) for name in names),
        "seeds": list(seeds),
        "table": table,
        "paired": paired,
        "heads": {ranking: _heads(torch.stack(maps[ranking]), len(names), generator) for ranking in RANKINGS},
        "by_relation": by_relation,
    }


def _heads(aie: Float[Tensor, "run layer head"], n_relations: int, generator: torch.Generator) -> dict[str, Any]:
    """How the effect is spread over heads: mean map, share of the top head, heads clearly over 0.02."""
    by_relation = aie.unflatten(0, (-1, n_relations)).mean(dim=0)  # seeds averaged within a relation
    mean = by_relation.mean(dim=0)
    positive = mean.clamp(min=0)
    clear = []
    for layer, head in (mean > 0.02).nonzero().tolist():
        interval = bootstrap_interval(by_relation[:, layer, head], generator=generator)
        clear.append(
            {"head": [layer, head], "aie": float(mean[layer, head]), "low": interval.low, "high": interval.high}
        )
    clear.sort(key=lambda row: -row["aie"])
    return {
        "top_share": float(positive.max() / positive.sum()) if bool(positive.any()) else float("nan"),
        "over_0.02": clear,
        "map": [[round(float(value), 5) for value in row] for row in mean],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fvlens.zoo.measure", description=__doc__)
    parser.add_argument("--model", default="rel-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--relations", nargs="+", default=None, help="only these relations")
    parser.add_argument("--every", type=int, default=1, help="only every Nth relation, for a quick look")
    parser.add_argument("--out", type=Path, default=Path("rel-small-table.json"))
    args = parser.parse_args(argv)
    names = args.relations or list_relations()[:: args.every]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        found = measure(load_model(args.model), names, args.seeds)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for key, row in found["table"].items():
        tqdm.write(f"{key:18s} {row['mean']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
    for key, row in found["paired"].items():
        tqdm.write(f"{key}: {row['mean']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}]")
    for ranking, heads in found["heads"].items():
        names_of = ", ".join(f"L{h['head'][0]}H{h['head'][1]} {h['aie']:.3f}" for h in heads["over_0.02"])
        tqdm.write(f"heads, {ranking} labels: top share {heads['top_share']:.2f}; over 0.02: {names_of or 'none'}")


if __name__ == "__main__":
    main()
