"""Composite vectors on near and far analogies.

Test analogies are the same for every seed and take no part in anything else (``fvlens/relations/held_out.json``): near
ones, and far ones of three levels: (i) new word pairs between domains that fitting connects, (ii) between domains that
it does not, (iii) of families that take part in nothing. A seed trains the basis (20 pairs a relation, from zero); for
either prompt it trains maps on 2,430 analogies (half near and half far for the bare query, far ones for the one-shot
prompt, which needs help with no others) and a logistic gate on a fifth as many others (half near, half far). Of the
maps, the one with the best top-1 on validation analogies is the composite: on near ones in the bare query, on far ones
in the one-shot prompt. Values are means over seeds of each analogy, then over analogies; intervals are 95% bootstrap
intervals over analogies, paired where two ways are compared.

A cell is one seed and one prompt. Both cells of a seed have the same basis, which the first of them keeps.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fvlens.composition import (
    ANALOGY_SETTINGS,
    MAPS,
    STARTS,
    AnalogyEvaluation,
    CompositeMap,
    SourceScores,
    Start,
    evaluate_analogies,
    fit_composite,
    fit_gate,
    library_analogies,
    library_composite,
    library_parts,
    source_scores,
)
from fvlens.find import finished
from fvlens.relations import Analogy, Relation, held_out, load_relation, make_analogies
from fvlens.studies._analogies_tables import EXCERPTS, TARGETS, WAYS, tables, whole
from fvlens.studies._shelf import Shelf
from fvlens.studies._study import Cell, Settings, Study, Value, at_least, library_data, plain
from fvlens.training import VectorSet


@dataclass(frozen=True, slots=True)
class AnalogiesOptions:
    """Options of the study of composite vectors.

    Attributes:
        n_seeds: seeds, each with a basis, maps and a gate of its own.
        n_test: test analogies of each level at most.
        n_fit: training analogies of each map; the gate and the validation take a share of as many.
        epochs: passes over them.
        start: what the vectors of the basis are trained from, function vectors or zero.
    """

    n_seeds: int = 3
    n_test: int = 400
    n_fit: int = 2430
    epochs: int = 20
    start: Start = "vector"

    def __post_init__(self) -> None:
        at_least(self, n_seeds=1, n_test=2, n_fit=4, epochs=1)
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r}; expected one of {', '.join(STARTS)}.")


def _cells(settings: Settings) -> list[Cell]:
    options: AnalogiesOptions = settings.chosen(AnalogiesOptions)
    # a cell names what is not the default, so that cells of the defaults are those from before there were options
    own = tuple(item for item in plain(options, ("n_seeds",)) if item not in plain(AnalogiesOptions()))
    only: dict[str, Any] = {"basis": " ".join(settings.relations)} if settings.relations else {}
    return [
        dataclasses.replace(settings, seed=seed).cell("", options=own, prompt=setting, **only)
        for seed in range(settings.seed, settings.seed + options.n_seeds)
        for setting in ANALOGY_SETTINGS
    ]


def _data(cell: Cell) -> str:
    """Hash of the library and of its division."""
    division = json.dumps(dataclasses.asdict(held_out()), sort_keys=True)
    return hashlib.sha256(f"{library_data(cell)}\n{division}".encode()).hexdigest()[:16]


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


def _basis(cell: Cell, model: Any, shelf: Shelf, names: list[str] | None, start: Start) -> CompositeMap:
    """The seed's basis with no map, trained if no cell has kept it yet."""

    def make() -> dict[str, CompositeMap]:
        generator = torch.Generator().manual_seed(cell.seed)
        return {"basis": library_composite(model, names=names, start=start, generator=generator, progress=False)}

    varies = (*(value for value in cell.varies if value[0] != "prompt"), ("start", start))
    whose = dataclasses.replace(cell, varies=(*varies, ("part", "basis")), options=())
    return shelf.get(whose, ("basis",), functools.partial(CompositeMap.load, model=model), make)["basis"]


def _run(cell: Cell, model: Any, shelf: Shelf) -> list[dict[str, Value]]:
    """Rows of validation (a map each), of ways (a level and family of targets each), and of target relations."""
    options: AnalogiesOptions = cell.chosen(AnalogiesOptions)
    setting: Any = cell["prompt"]
    shot = setting == "one_shot"
    names = str(dict(cell.varies)["basis"]).split() if "basis" in dict(cell.varies) else None
    start = _basis(cell, model, shelf, names, options.start)
    generator = torch.Generator().manual_seed(cell.seed)
    drawn: dict[str, Any] = dict(generator=generator, names=names, n_foils=0)
    for_gate = library_analogies("valid", n=max(4, options.n_fit // 5), **drawn)
    train = library_analogies("train", n=max(4, options.n_fit), kind="far" if shot else None, **drawn)
    valid = library_analogies("valid", n=max(4, options.n_fit // 10), kind="far" if shot else "near", **drawn)

    def scores_of(analogies: Sequence[Analogy]) -> SourceScores:
        return source_scores(model, start.basis, [one.source_pair for one in analogies], template=start.template)

    # the five maps share the scores of what they are trained on
    given = scores_of([*train, *valid])
    fitted: dict[str, CompositeMap] = {}
    for map in MAPS:
        fitted[map] = fit_composite(
            model, start.basis, train, valid=valid, map=map, setting=setting, learn_strength=map != "none",
            epochs=options.epochs, basis_pairs=sorted(start.seen.pairs), sources=given, generator=generator,
            progress=False,
        )  # fmt: skip
        finished(fitted[map])
    reached = {map: max(one.history.valid_top1) for map, one in fitted.items()}
    best = max(reached, key=lambda map: reached[map])
    gated = fit_gate(
        model, fitted[best], for_gate, setting=setting, sources=scores_of(for_gate), generator=generator, progress=False
    )
    finished(gated)
    rows: list[dict[str, Value]] = [
        {"of": "map", "map": map, "valid_top1": value, "chosen": map == best} for map, value in reached.items()
    ]
    nearest = nearest_vectors(start.basis)
    for level, analogies in drawn_tests(options.n_test, 0).items():
        shared: dict[str, Any] = dict(settings=[setting], generator=generator, progress=False)
        shared["sources"] = scores_of(analogies)
        found = evaluate_analogies(model, analogies, gated, **shared)
        right = {name.rsplit(", ", 1)[0]: way.right for name, way in found.scored.items()}
        for map, one in fitted.items():
            by_map = found if map == best else evaluate_analogies(model, analogies, one, controls=[], **shared)
            right[f"map {map}"] = by_map[f"composite, {setting.replace('_', '-')}"].right
        rows += _by_family(level, analogies, {way: values.tolist() for way, values in right.items()})
        rows += _by_target(level, found, setting, nearest)
    return rows


def _by_family(level: str, analogies: Sequence[Analogy], right: Mapping[str, list[bool]]) -> list[dict[str, Value]]:
    """A row a family of targets: of each way what it solves (``x``) and what not (``.``), in the order of the tests."""
    families = [load_relation(one.target_relation).family for one in analogies]
    rows: list[dict[str, Value]] = []
    for family in dict.fromkeys(families):
        own = [i for i, of in enumerate(families) if of == family]
        solved = {way: "".join("x" if values[i] else "." for i in own) for way, values in right.items()}
        rows.append({"of": WAYS, "level": level, "family": family, "n": len(own), **solved})
    return rows


def _by_target(
    level: str, found: AnalogyEvaluation, setting: str, nearest: Mapping[str, dict[str, Value]]
) -> list[dict[str, Value]]:
    """A row a target relation: its gain, what the mixtures put their weight on, and the nearest other basis vector."""
    label = setting.replace("_", "-")
    ways = {f"{way}, {label}": way for way in ("composite", "unsteered")}
    frame = found.by_relation(*ways).rename(columns=ways)
    return [
        {"of": TARGETS, "level": level, **one, **nearest.get(one["relation"], {})} for one in frame.to_dict("records")
    ]


def nearest_vectors(basis: VectorSet) -> dict[str, dict[str, Value]]:
    """The other basis vector of the highest cosine, by relation."""
    cosine = basis.similarity().fill_diagonal_(-2)
    best = cosine.max(dim=1)
    return {
        name: {"nearest": basis.names[place], "cosine": value}
        for name, place, value in zip(basis.names, best.indices.tolist(), best.values.tolist(), strict=True)
    }


ANALOGIES = Study(
    name="analogies",
    summary="composite vectors on near and far analogies that took no part in fitting, beside controls",
    version=2,
    cells=_cells,
    run=_run,
    tables=tables,
    markdown=whole,
    data_hash=_data,
    shares=True,
    options=AnalogiesOptions,
    excerpts=EXCERPTS,
)
