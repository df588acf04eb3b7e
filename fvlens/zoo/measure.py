"""Measure the table of the model card: ``python -m fvlens.zoo.measure [--model DIR] [--seeds 0 1 2] [--out FILE]``.

For every library relation and seed: split, task means over 100 clean prompts, indirect effects over 25 prompts with
permuted and 25 with random labels, function vectors of the top heads with layer and scale chosen on the validation
pairs, and scores on the test pairs, whose words are never among the demonstrations. Then all function vectors with
heads by permuted labels are fine-tuned on the first 20 training pairs, each after its own layer, and scored on the same
test pairs. Values are averaged over seeds within a relation and then over relations; intervals are 95% bootstrap
intervals over relations.
"""

import argparse
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.evaluation import evaluate
from fvlens.files import write_json
from fvlens.find import RANKINGS, find_vector
from fvlens.metrics import bootstrap_interval, paired_difference
from fvlens.models import load_model
from fvlens.relations import Split, disjoint_relations, list_relations, load_relation
from fvlens.training import FineTuned, finetune_many
from fvlens.vectors import FunctionVector, random_vector_like

N_TRAIN = 20
"""Training pairs of a fine-tuned vector."""


def measure_relation(
    model: Any, name: str, seed: int, *, n_heads: int = 10, n_random: int = 10
) -> tuple[dict[str, float], dict[str, Float[Tensor, "layer head"]], dict[str, FunctionVector]]:
    """Scores, AIE maps and function vectors of one relation with one seed."""
    generator = torch.Generator().manual_seed(seed)
    relation = load_relation(name)
    split = relation.split(generator)
    means = None
    scores: dict[str, float] = {}
    maps: dict[str, Tensor] = {}
    vectors: dict[str, FunctionVector] = {}
    for ranking in RANKINGS:
        found = find_vector(
            model, split, labels=ranking, n_heads=n_heads, relation=name, means=means, seed=seed, generator=generator,
            progress=False,
        )  # fmt: skip
        assert found.effects is not None
        means, maps[ranking], vectors[ranking] = found.means, found.effects.aie, found.vector
        scores[f"fv_{ranking}"] = evaluate(model, split.test, vector=found.vector, generator=generator).top1
        one = found.vector_at_scale_one
        scores[f"fv_{ranking}_scale_1"] = evaluate(model, split.test, vector=one, generator=generator).top1
        scores[f"layer_{ranking}"], scores[f"scale_{ranking}"] = float(found.layer), found.scale
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
        disjoint = _others(vectors, name)
        pick = disjoint[int(torch.randint(len(disjoint), (1,), generator=generator))]
        vector = vectors[pick].at_layer(own.layer)
        found[name] = evaluate(model, split.test, vector=vector, generator=generator).top1
    return found


def _others(names: Iterable[str], name: str) -> list[str]:
    """Those of ``names`` whose vectors serve as controls for the relation ``name``."""
    disjoint = set(disjoint_relations(load_relation(name)))
    found = [other for other in names if other in disjoint]
    if not found:
        raise ValueError(
            f"measure: none of the other relations given has another family and disjoint outputs than {name!r}; give "
            "more relations."
        )
    return found


def fine_tuned(
    model: Any, starts: Mapping[str, FunctionVector], splits: Mapping[str, Split], seed: int, *, epochs: int = 20
) -> dict[str, FineTuned]:
    """Each relation's vector trained after the layer of its start, in one batched run a layer."""
    runs = {}
    for layer in sorted({start.layer for start in starts.values()}):
        own = {name: start for name, start in starts.items() if start.layer == layer}
        trained = finetune_many(
            model,
            {name: splits[name] for name in own},
            init=own,
            n_train=N_TRAIN,
            epochs=epochs,
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )
        runs |= dict(zip(own, trained, strict=True))
    return {name: runs[name] for name in starts}


def finetuning_scores(
    model: Any, vectors: Mapping[str, FunctionVector], seed: int, *, n_others: int = 10
) -> dict[str, dict[str, float]]:
    """Zero-shot top-1 on each relation's test pairs with fine-tuned vectors, its own and those of other relations.

    Args:
        model: the model.
        vectors: by relation, the vector that training starts from; its layer was chosen on the validation pairs.
        seed: that of the splits and of all else that is drawn.
        n_others: at most this many other relations, of other families and with disjoint outputs, are tried, each after
            the layer that it was trained at.

    Returns:
        Of each relation ``tuned`` (20 epochs from the function vector), ``epochs_5_vector``, ``epochs_5_zero`` and
        ``epochs_5_random`` (5 epochs from the function vector, from zero and from noise of its norm), ``other`` (mean
        over other relations' vectors), and ``other_answer``: the share of predictions with those vectors that are the
        answer to the query in some library relation, right or not.
    """
    generator = torch.Generator().manual_seed(seed)
    splits = {name: load_relation(name).split(torch.Generator().manual_seed(seed)) for name in vectors}
    starts = {
        "vector": dict(vectors),
        "zero": {name: 0.0 * vector for name, vector in vectors.items()},
        "random": {name: random_vector_like(vector, generator) for name, vector in vectors.items()},
    }
    tuned = fine_tuned(model, vectors, splits, seed)
    early = {init: fine_tuned(model, own, splits, seed, epochs=5) for init, own in starts.items()}
    answers = defaultdict(set)
    for name in list_relations():
        for query, answer in load_relation(name):
            answers[query].add(answer)
    found = {}
    for name, split in splits.items():
        scores = {"tuned": evaluate(model, split.test, vector=tuned[name].vector, generator=generator).top1}
        for init, runs in early.items():
            scored = evaluate(model, split.test, vector=runs[name].vector, generator=generator)
            scores[f"epochs_5_{init}"] = scored.top1
        disjoint = _others(vectors, name)
        picks = torch.randperm(len(disjoint), generator=generator)[:n_others].tolist()
        others = [evaluate(model, split.test, vector=tuned[disjoint[i]].vector, generator=generator) for i in picks]
        scores["other"] = sum(one.top1 for one in others) / len(others)
        known = [
            word in answers[pair.input]
            for one in others
            for word, pair in zip(one.predictions, one.queries, strict=True)
        ]
        scores["other_answer"] = sum(known) / len(known)
        found[name] = scores
    return found


def measure(model: Any, names: Sequence[str], seeds: Sequence[int], *, progress: bool = True) -> dict[str, Any]:
    """The whole table: means over relations, intervals, and every relation's own scores."""
    rows: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    tuned_rows: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    maps: dict[str, list[Tensor]] = {ranking: [] for ranking in RANKINGS}
    bar = tqdm(total=len(seeds) * len(names), desc="measuring", disable=not progress)
    for seed in seeds:
        vectors: dict[str, dict[str, FunctionVector]] = {ranking: {} for ranking in RANKINGS}
        for name in names:
            scores, found, own = measure_relation(model, name, seed)
            for key, value in scores.items():
                rows[name][key].append(value)
            for ranking in RANKINGS:
                maps[ranking].append(found[ranking])
                vectors[ranking][name] = own[ranking]
            bar.update()
        for name, value in other_relation_scores(model, vectors["random"], seed).items():
            rows[name]["other_relation"].append(value)
        for name, scores in finetuning_scores(model, vectors["permuted"], seed).items():
            for key, value in scores.items():
                tuned_rows[name][key].append(value)
    bar.close()
    by_relation, tuned = _seed_means(rows), _seed_means(tuned_rows)
    generator = torch.Generator().manual_seed(0)
    table, paired = _summary(
        by_relation,
        {
            "10 shots over 2": ("top1_10", "top1_2"),
            "2 shots over 0": ("top1_2", "top1_0"),
            "random vector over zero-shot": ("random_vector", "top1_0"),
            "other relation over zero-shot": ("other_relation", "top1_0"),
            "function vector (random labels) over zero-shot": ("fv_random", "top1_0"),
        },
        generator,
    )
    heads = {ranking: _heads(torch.stack(maps[ranking]), len(names), generator) for ranking in RANKINGS}
    return {
        "relations": len(names),
        "pairs": sum(len(load_relation(name)) for name in names),
        "seeds": list(seeds),
        "table": table,
        "paired": paired,
        "heads": heads,
        "by_relation": by_relation,
        "finetuning": finetuning_summary(by_relation, tuned),
    }


def finetuning_summary(
    by_relation: Mapping[str, Mapping[str, float]], tuned: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Means and paired differences of fine-tuned vectors, beside the scores without training in ``by_relation``."""
    columns = {"icl": "top1_10", "zero_shot": "top1_0", "untuned": "fv_permuted"}
    merged = {name: {key: by_relation[name][old] for key, old in columns.items()} | dict(tuned[name]) for name in tuned}
    table, paired = _summary(
        merged,
        {
            "fine-tuned over untuned": ("tuned", "untuned"),
            "10 shots over untuned": ("icl", "untuned"),
            "fine-tuned over 10 shots": ("tuned", "icl"),
            "5 epochs, from the vector over from zero": ("epochs_5_vector", "epochs_5_zero"),
            "5 epochs, from the vector over from noise": ("epochs_5_vector", "epochs_5_random"),
            "other relation over zero-shot": ("other", "zero_shot"),
        },
        torch.Generator().manual_seed(0),
    )
    return {"n_train": N_TRAIN, "table": table, "paired": paired, "by_relation": merged}


def card_markdown(found: Mapping[str, Any]) -> str:
    """The first table of the model card, with its bars, and the list of heads below it."""
    table, paired, heads = found["table"], found["paired"], found["heads"]
    lines = [
        ("10 demonstrations, top-1", table["top1_10"], "at least 0.95"),
        ("2 demonstrations, top-1", table["top1_2"], ""),
        ("bare query, top-1", table["top1_0"], "at most 0.30"),
        ("10 demonstrations over 2, paired", paired["10 shots over 2"], "lower bound over 0"),
        ("2 demonstrations over none, paired", paired["2 shots over 0"], "lower bound over 0"),
        ("probability of the answer, 10 clean demonstrations", table["p_10"], ""),
        ("the same, labels permuted", table["p_permuted"], "at most half of clean"),
        ("the same, labels random", table["p_random"], ""),
        ("top-1, labels permuted", table["top1_permuted"], ""),
        ("top-1, labels random", table["top1_random"], ""),
        ("function vector, heads by permuted labels, bare query, top-1", table["fv_permuted"], "at least 0.60"),
        ("function vector, heads by random labels, bare query, top-1", table["fv_random"], "at least 0.80"),
        ("10 random vectors of the same norm, top-1", table["random_vector"], "at most bare query + 0.05"),
        ("vector of another relation (disjoint outputs), top-1", table["other_relation"], "at most bare query + 0.05"),
        ("random vector over bare query, paired", paired["random vector over zero-shot"], ""),
        ("other relation over bare query, paired", paired["other relation over zero-shot"], ""),
    ]
    clear = [head for head in heads["random"]["over_0.02"] if head["low"] > 0]
    rows = [
        *_rows(lines),
        f"| share of the top head in the summed positive AIE, random labels | {heads['random']['top_share']:.2f} | "
        "at most 0.60 |",
        f"| heads with mean AIE over 0.02 and interval over 0, random labels | {len(clear)} | at least 3 |",
        "",
        "Heads whose AIE exceeds 0.02, mean over relations [95% interval]:",
        "",
    ]
    for ranking in reversed(RANKINGS):
        named = [
            f"L{head['head'][0]}H{head['head'][1]} {head['aie']:.3f} [{head['low']:.3f}, {head['high']:.3f}]"
            for head in heads[ranking]["over_0.02"]
        ]
        rows.append(f"- {ranking} labels: {', '.join(named) or 'none'}")
    return "\n".join(rows)


def finetuning_markdown(found: Mapping[str, Any]) -> str:
    """The table of fine-tuning in the model card, with its bars."""
    table, paired = found["table"], found["paired"]
    icl, bare = table["icl"]["mean"], table["zero_shot"]["mean"]
    gap = paired["10 shots over untuned"]["mean"]
    gain = 0.15 if gap >= 0.30 else gap / 2
    lines = [
        ("fine-tuned vector, top-1", table["tuned"], f"at least 0.85, and {0.9 * icl:.3f} (0.90 of 10 demonstrations)"),
        ("the vector it starts from, top-1", table["untuned"], ""),
        (
            "fine-tuned over its start, paired",
            paired["fine-tuned over untuned"],
            f"at least {gain:+.3f} ({'0.15' if gap >= 0.30 else 'half of what 10 demonstrations have over the start'})",
        ),
        ("5 epochs from the function vector, top-1", table["epochs_5_vector"], ""),
        ("5 epochs from zero, top-1", table["epochs_5_zero"], ""),
        ("5 epochs from noise of the same norm, top-1", table["epochs_5_random"], ""),
        (
            "5 epochs, from the vector over from zero, paired",
            paired["5 epochs, from the vector over from zero"],
            "lower bound at least -0.01",
        ),
        (
            "5 epochs, from the vector over from noise, paired",
            paired["5 epochs, from the vector over from noise"],
            "lower bound at least -0.01",
        ),
        (
            "fine-tuned vector of another relation (disjoint outputs), top-1",
            table["other"],
            f"at most {bare + 0.05:.3f} (bare query + 0.05)",
        ),
        ("the same over the bare query, paired", paired["other relation over zero-shot"], ""),
        ("the same, answers of any library relation to the query", table["other_answer"], ""),
    ]
    return "\n".join(_rows(lines))


def _rows(lines: Sequence[tuple[str, Mapping[str, float], str]]) -> list[str]:
    """Quantity, mean with interval, and bar as rows of a Markdown table."""
    rows = ["| quantity | value [95% interval] | bar |", "| --- | --- | --- |"]
    for name, row, bar in lines:
        sign = "+" if name.endswith("paired") else ""
        value, low, high = (format(row[key], f"{sign}.3f") for key in ("mean", "low", "high"))
        rows.append(f"| {name} | {value} [{low}, {high}] | {bar} |")
    return rows


def _seed_means(rows: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {key: sum(v) / len(v) for key, v in row.items()} for name, row in rows.items()}


def _summary(
    by_relation: Mapping[str, Mapping[str, float]], pairs: Mapping[str, tuple[str, str]], generator: torch.Generator
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Mean and interval over relations of every score, and of the differences that ``pairs`` names."""
    keys = list(next(iter(by_relation.values())))
    columns = {key: torch.tensor([row[key] for row in by_relation.values()]) for key in keys}
    table, paired = {}, {}
    for key, values in columns.items():
        interval = bootstrap_interval(values, generator=generator)
        table[key] = {"mean": float(values.mean()), "low": interval.low, "high": interval.high}
    for name, (a, b) in pairs.items():
        found = paired_difference(columns[a], columns[b], generator=generator)
        paired[name] = {"mean": found.mean, "low": found.interval.low, "high": found.interval.high}
    return table, paired


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
    write_json(args.out, found, indent=1, null_for_nan=True)
    tqdm.write(card_markdown(found))
    tqdm.write(finetuning_markdown(found["finetuning"]))


if __name__ == "__main__":
    main()
