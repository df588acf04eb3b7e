"""Measure composite vectors: ``python -m fvlens.zoo.analogies [--model DIR] [--seeds 0 1 2] [--out FILE]``.

Test analogies are the same for every seed and take no part in anything else (``fvlens/relations/held_out.json``): near
ones, and far ones of three levels: (i) new word pairs between domains that fitting connects, (ii) between domains that
it does not, (iii) of families that take part in nothing. A seed trains the basis (20 pairs a relation, from zero), maps
on ``--n-fit`` analogies (half near and half far for the bare query, far ones for the one-shot prompt, which needs help
with no others) and a logistic gate on a fifth as many others (half near, half far). Of the maps, the one with the
best top-1 on validation analogies is the composite: on near ones in the bare query, on far ones in the one-shot
prompt. Values are means over seeds of each analogy, then over analogies; intervals are 95% bootstrap intervals over
analogies, paired where two ways are compared.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.composition import (
    ANALOGY_SETTINGS,
    MAPS,
    AnalogyEvaluation,
    CompositeMap,
    SourceScores,
    evaluate_analogies,
    fit_composite,
    fit_gate,
    library_analogies,
    library_composite,
    library_parts,
    source_scores,
)
from fvlens.files import write_json
from fvlens.finetuning import VectorSet
from fvlens.metrics import paired_difference
from fvlens.models import load_model
from fvlens.relations import Analogy, Relation, held_out, load_relation, make_analogies
from fvlens.zoo._table import markdown, mean_with_interval

log = logging.getLogger("fvlens.zoo")

LEVELS = ("near", "far (i)", "far (ii)", "far (iii)")
_COMPOSITES = ("composite", "gated composite")
WAYS = ("unsteered", "composite", "gated composite", "no map", "uniform", "best single", "random", "own vector")


def drawn_tests(n: int, seed: int) -> dict[str, list[Analogy]]:
    """At most ``n`` test analogies of each level; without foils, the table is of the open vocabulary."""
    division = held_out()
    generator = torch.Generator().manual_seed(seed)

    def made(parts: Sequence[Relation], **how: Any) -> list[Analogy]:
        known = [load_relation(one.name) for one in parts]
        return make_analogies(parts, n=n, n_foils=0, generator=generator, known=known, **how)

    fitted, unseen = (library_parts("test", division.relations(unseen=unseen)) for unseen in (False, True))
    return {
        "near": made(fitted, kind="near"),
        "far (i)": made(fitted, kind="far", domains=division.fitted_domain_pairs()),
        "far (ii)": made(fitted, kind="far", domains=division.domain_pairs),
        "far (iii)": made(unseen, kind="far"),
    }


def measure_seed(
    model: Any, tests: Mapping[str, Sequence[Analogy]], seed: int, *, names: Sequence[str] | None, n_fit: int,
    layer: int, epochs: int,
) -> tuple[
    dict[tuple[str, str, str], Tensor], dict[str, dict[str, float]], dict[str, AnalogyEvaluation], dict[str, Any]
]:  # fmt: skip
    """What each way solves (level, setting, way), validation top-1 of each map by setting, evaluations, neighbours."""
    generator = torch.Generator().manual_seed(seed)
    plain = library_composite(model, names=names, layer=layer, generator=generator, progress=False)
    drawn: dict[str, Any] = dict(generator=generator, names=names, n_foils=0)
    for_gate = library_analogies("valid", n=max(4, n_fit // 5), **drawn)
    solved: dict[tuple[str, str, str], Tensor] = {}
    chosen: dict[str, dict[str, float]] = {}
    evaluations: dict[str, AnalogyEvaluation] = {}

    def scores_of(analogies: Sequence[Analogy]) -> SourceScores:
        return source_scores(model, plain.basis, [one.source_pair for one in analogies], template=plain.template)

    of_gate = scores_of(for_gate)
    of_tests = {level: scores_of(analogies) for level, analogies in tests.items()}
    for setting in ANALOGY_SETTINGS:
        shot = setting == "one_shot"
        train = library_analogies("train", n=max(4, n_fit), kind="far" if shot else None, **drawn)
        valid = library_analogies("valid", n=max(4, n_fit // 10), kind="far" if shot else "near", **drawn)
        given = scores_of([*train, *valid])
        fitted: dict[str, CompositeMap] = {}
        for map in MAPS:
            began = time.monotonic()
            fitted[map] = fit_composite(
                model, plain.basis, train, valid=valid, map=map, setting=setting, learn_strength=map != "none",
                epochs=epochs, basis_pairs=sorted(plain.seen.pairs), sources=given, generator=generator, progress=False,
            )  # fmt: skip
            log.info("seed %d, %s, map %s: %.0f s", seed, setting, map, time.monotonic() - began)
        chosen[setting] = {map: max(one.history.valid_top1) for map, one in fitted.items()}
        best = max(chosen[setting], key=lambda map: chosen[setting][map])
        gated = fit_gate(
            model, fitted[best], for_gate, setting=setting, sources=of_gate, generator=generator, progress=False
        )
        log.info("seed %d, %s: map %s, gate %s", seed, setting, best, gated.gates[0].describe())
        for level, analogies in tests.items():
            shared: dict[str, Any] = dict(settings=[setting], generator=generator, progress=False)
            shared["sources"] = of_tests[level]
            found = evaluate_analogies(model, analogies, gated, **shared)
            evaluations[f"{level}, {setting}"] = found
            for name, way in found.scored.items():
                solved[level, setting, name.rsplit(", ", 1)[0]] = way.right.double()
            for map, one in fitted.items():
                by_map = found if map == best else evaluate_analogies(model, analogies, one, controls=[], **shared)
                name = "no map" if map == "none" else f"map {map}"
                solved[level, setting, name] = by_map[f"composite, {setting.replace('_', '-')}"].right.double()
    return solved, chosen, evaluations, _nearest(plain.basis)


def _nearest(basis: VectorSet) -> dict[str, dict[str, Any]]:
    """The other basis vector of the highest cosine, by relation."""
    cosine = basis.similarity().fill_diagonal_(-2)
    best = cosine.max(dim=1)
    return {
        name: {"nearest": basis.names[place], "cosine": value}
        for name, place, value in zip(basis.names, best.indices.tolist(), best.values.tolist(), strict=True)
    }


def measure(
    model: Any,
    seeds: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    n_test: int = 400,
    n_fit: int = 2430,
    layer: int = 1,
    epochs: int = 20,
) -> dict[str, Any]:
    """The whole table as JSON: a row a level and setting, with mean and interval of every way and difference.

    ``names`` restricts the basis and the fitting, not the tests.
    """
    tests = drawn_tests(n_test, 0)
    every, maps, last, near = [], {}, {}, {}
    for seed in seeds:
        solved, chosen, last, near = measure_seed(
            model, tests, seed, names=names, n_fit=n_fit, layer=layer, epochs=epochs
        )
        every.append(solved)
        maps[str(seed)] = chosen
    means = {key: torch.stack([solved[key] for solved in every]).mean(dim=0) for key in every[0]}
    rows, relations = [], []
    for level, analogies in tests.items():
        for setting in ANALOGY_SETTINGS:
            ways = {way: values for (of, how, way), values in means.items() if (of, how) == (level, setting)}
            row: dict[str, Any] = {"level": level, "setting": setting.replace("_", "-"), "n": len(analogies)}
            row |= {way: mean_with_interval(values.tolist(), 0) for way, values in ways.items()}
            for first in _COMPOSITES:
                row |= {f"{first} - {way}": _difference(ways[first], ways[way]) for way in ways if way != first}
            rows.append(row)
            label = setting.replace("_", "-")
            table = last[f"{level}, {setting}"].by_relation(f"composite, {label}", f"unsteered, {label}")
            relations += [
                {"level": level, "setting": label, **one, **near.get(one["relation"], {})}
                for one in table.to_dict("records")
            ]
    kept: dict[str, Any] = dict(seeds=list(seeds), n_fit=n_fit, layer=layer, maps=maps)
    return {**kept, "rows": rows, "families": _families(tests, means), "relations": relations}


def _families(
    tests: Mapping[str, Sequence[Analogy]], means: Mapping[tuple[str, str, str], Tensor]
) -> list[dict[str, Any]]:
    """What the composite does to far analogies of fitted families in the one-shot prompt, a row a family."""
    rows = []
    pooled = [(level, i, one) for level in ("far (i)", "far (ii)") for i, one in enumerate(tests[level])]
    families = [load_relation(one.target_relation).family for _, _, one in pooled]
    for family in sorted(set(families)):
        own = [(level, i) for (level, i, _), of in zip(pooled, families, strict=True) if of == family]
        ways = {
            way: torch.stack([means[level, "one_shot", way][i] for level, i in own])
            for way in ("unsteered", "composite", "gated composite", "own vector")
            if all((level, "one_shot", way) in means for level, _ in own)
        }
        row: dict[str, Any] = {"family": family, "n": len(own)}
        row |= {way: mean_with_interval(values.tolist(), 0) for way, values in ways.items()}
        row |= {f"{way} - unsteered": _difference(ways[way], ways["unsteered"]) for way in _COMPOSITES}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["gated composite - unsteered"]["mean"])


def _difference(first: Tensor, second: Tensor) -> dict[str, float]:
    """Mean of the paired differences, with its interval."""
    mean, (low, high, _) = paired_difference(first, second, generator=torch.Generator().manual_seed(0))
    return {"mean": mean, "low": low, "high": high}


def tables(found: Mapping[str, Any]) -> str:
    """The ways, the differences that bars are about, and far analogies by family, as Markdown."""
    labels = {"level": "analogies", "setting": "prompt", "n": "n"}
    ways = {way: (way, 2) for way in (*WAYS, *(f"map {map}" for map in MAPS if map != "none"))}
    absent = dict.fromkeys(("mean", "low", "high"), float("nan"))
    rows = [dict.fromkeys(ways, absent) | row for row in found["rows"]]
    differences = {
        f"{first} - {second}": (f"{first} - {second}", 3)
        for first, second in (
            ("composite", "unsteered"), ("composite", "uniform"), ("composite", "best single"),
            ("composite", "random"), ("composite", "own vector"), ("gated composite", "unsteered"),
        )
    }  # fmt: skip
    rows = [dict.fromkeys(differences, absent) | row for row in rows]
    columns = {way: (way, 2) for way in ("unsteered", *_COMPOSITES, "own vector")}
    columns |= {f"{way} - unsteered": (f"{way} - unsteered", 2) for way in _COMPOSITES}
    families = [dict.fromkeys(columns, absent) | row for row in found["families"]]
    by_family = markdown(families, {"family": "family, far (i) and (ii), one-shot", "n": "n"}, columns)
    return "\n\n".join([markdown(rows, labels, ways), markdown(rows, labels, differences), by_family])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fvlens.zoo.analogies", description=__doc__)
    parser.add_argument("--model", default="rel-small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-test", type=int, default=400, help="test analogies of each level")
    parser.add_argument("--n-fit", type=int, default=2430, help="training analogies of a map")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training analogies")
    parser.add_argument("--out", type=Path, default=None, help="write everything to this JSON file")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = measure(
        load_model(args.model, device="cpu"), args.seeds, n_test=args.n_test, n_fit=args.n_fit, layer=args.layer,
        epochs=args.epochs,
    )  # fmt: skip
    if args.out is not None:
        write_json(args.out, found, indent=1, null_for_nan=True)
    tqdm.write(tables(found))


if __name__ == "__main__":
    main()
