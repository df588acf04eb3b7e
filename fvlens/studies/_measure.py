"""What the model card says: demonstrations, function vectors and fine-tuned vectors of every relation.

For every relation and seed: split, task means over 100 clean prompts, indirect effects over 25 prompts with permuted
and 25 with random labels, function vectors of the top heads with layer and scale chosen on the validation pairs, and
scores on the test pairs, whose words are never among the demonstrations. The vector with heads by permuted labels is
fine-tuned on the first 20 training pairs, after its own layer, and scored on the same test pairs. Values are averaged
over seeds within a relation and then over relations; intervals are 95% bootstrap intervals over relations.

Cells of the stage ``vectors`` measure a relation by itself and keep its vectors for the others; cells of the stage
``controls`` try vectors of other relations on it.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fvlens.evaluation import evaluate
from fvlens.find import RANKINGS, Found, find_vector
from fvlens.prompts import build_prompts
from fvlens.relations import Pair, Split, disjoint_relations, list_relations, load_relation
from fvlens.scoring import Scores, score
from fvlens.studies._measure_pages import EXCERPTS, whole
from fvlens.studies._shelf import Shelf
from fvlens.studies._study import Cell, Row, Settings, Study, Value, every
from fvlens.studies._tables import mean_with_interval, seed_means
from fvlens.training import finetune, finetune_many
from fvlens.vectors import FunctionVector, random_vector_like

if TYPE_CHECKING:
    import pandas as pd

N_SEEDS = 3
N_TRAIN = 20
"""Training pairs of a fine-tuned vector."""
N_RANDOM, N_OTHERS = 10, 10
"""Random vectors, and at most so many vectors of other relations, that each relation is tried with."""

UNTRAINED, TRAINED = "function vector", "fine-tuned vector"
"""Names of what a relation's cell keeps for others; heads by random labels, and by permuted ones."""

PAIRED = {
    "10 shots over 2": ("top1_10", "top1_2"),
    "2 shots over 0": ("top1_2", "top1_0"),
    "random vector over zero-shot": ("random_vector", "top1_0"),
    "other relation over zero-shot": ("other_relation", "top1_0"),
    "function vector (random labels) over zero-shot": ("fv_random", "top1_0"),
    "fine-tuned over untuned": ("tuned", "fv_permuted"),
    "10 shots over untuned": ("top1_10", "fv_permuted"),
    "fine-tuned over 10 shots": ("tuned", "top1_10"),
    "5 epochs, from the vector over from zero": ("epochs_5_vector", "epochs_5_zero"),
    "5 epochs, from the vector over from noise": ("epochs_5_vector", "epochs_5_random"),
    "tuned other relation over zero-shot": ("other_tuned", "top1_0"),
}
"""Differences within a relation."""


def _cells(settings: Settings) -> list[Cell]:
    names = every(1, settings)
    cells = []
    for seed in range(settings.seed, settings.seed + N_SEEDS):
        at, others = dataclasses.replace(settings, seed=seed), drawn_others(names, seed)
        cells += [at.cell(name, stage="vectors") for name in names]
        cells += [at.cell(name, stage="controls", others=" ".join(others[name])) for name in names]
    return cells


def drawn_others(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """For each of ``names`` at most :data:`N_OTHERS` of the rest: other families, and no output in common.

    Raises:
        ValueError: there is none for one of them.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in names:
        disjoint = set(disjoint_relations(load_relation(name)))
        found = [other for other in names if other in disjoint]
        if not found:
            raise ValueError(
                f"study measure: none of the other relations given has another family and disjoint outputs than "
                f"{name!r}; give more relations."
            )
        drawn[name] = [found[i] for i in torch.randperm(len(found), generator=generator)[:N_OTHERS].tolist()]
    return drawn


def _run(cell: Cell, model: Any, shelf: Shelf) -> list[dict[str, Value]]:
    """One row: of a relation's own vectors, or of those of other relations."""
    return [(_own if cell["stage"] == "vectors" else _controls)(cell, model, shelf)]


# --- a relation by itself ---


def find_both(model: Any, name: str, seed: int) -> tuple[Split, dict[str, Found]]:
    """The relation's split, and by the labels that heads are ranked on the vector and what led to it."""
    generator = torch.Generator().manual_seed(seed)
    split = load_relation(name).split(generator)
    found: dict[str, Found] = {}
    means = None
    for labels in RANKINGS:
        found[labels] = find_vector(
            model, split, labels=labels, relation=name, means=means, seed=seed, generator=generator, progress=False
        )
        means = found[labels].means
    return split, found


def trained(model: Any, start: FunctionVector, split: Split, seed: int) -> FunctionVector:
    """The vector after 20 epochs of training from ``start``, at its layer."""
    run = finetune(
        model,
        split.train[:N_TRAIN],
        init=start,
        valid=split.valid,
        epochs=20,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    assert isinstance(run.vector, FunctionVector)
    return run.vector


def _shared(model: Any, split: Split, found: Mapping[str, Found], seed: int) -> dict[str, FunctionVector]:
    """What other relations' cells need of this one."""
    return {UNTRAINED: found["random"].vector, TRAINED: trained(model, found["permuted"].vector, split, seed)}


def _part(cell: Cell, name: str) -> Cell:
    """Whose the vectors of a relation are on the shelf."""
    return dataclasses.replace(cell, relation=name, varies=(("part", "vectors"),))


def _own(cell: Cell, model: Any, shelf: Shelf) -> dict[str, Value]:
    split, found = find_both(model, cell.relation, cell.seed)
    parts = _shared(model, split, found, cell.seed)
    shelf.put(_part(cell, cell.relation), parts)
    generator = torch.Generator().manual_seed(cell.seed)
    row: dict[str, Value] = {"n_test": len(split.test)}
    for shots in (10, 2):
        shown = evaluate(
            model, split.test, setting="icl", demonstrations=split.train, n_shots=shots, generator=generator
        )
        row |= {f"top1_{shots}": shown.top1, f"p_{shots}": shown.probability}
    for labels in RANKINGS:
        one = found[labels]
        shown = evaluate(
            model, split.test, setting="shuffled", labels=labels, demonstrations=split.train, generator=generator
        )
        row |= {f"top1_{labels}": shown.top1, f"p_{labels}": shown.probability}
        row |= {f"layer_{labels}": one.layer, f"scale_{labels}": one.scale}
    # whatever is added to the bare query, in one go
    vectors: dict[str, FunctionVector | None] = {"top1_0": None, "tuned": parts[TRAINED]}
    for labels, one in found.items():
        vectors |= {f"fv_{labels}": one.vector, f"fv_{labels}_scale_1": one.vector_at_scale_one}
    start = found["permuted"].vector
    inits = {"vector": start, "zero": 0.0 * start, "random": random_vector_like(start, generator)}
    early = finetune_many(
        model,
        dict.fromkeys(inits, split),
        init=inits,
        n_train=N_TRAIN,
        epochs=5,
        generator=torch.Generator().manual_seed(cell.seed),
        progress=False,
    )
    vectors |= {f"epochs_5_{run.relation}": run.vector for run in early if isinstance(run.vector, FunctionVector)}
    noise = [random_vector_like(found["random"].vector, generator) for _ in range(N_RANDOM)]
    right = (bare_scores(model, split.test, [*vectors.values(), *noise]).ranks == 0).double().mean(dim=1).tolist()
    row |= dict(zip(vectors, right, strict=False)) | {"random_vector": _mean(right[len(vectors) :])}
    for labels, one in found.items():
        assert one.effects is not None
        for layer, line in enumerate(one.effects.aie.tolist()):
            row |= {f"aie_{labels}_L{layer}H{head}": round(value, 5) for head, value in enumerate(line)}
    return row


def bare_scores(model: Any, pairs: Sequence[Pair], vectors: Sequence[FunctionVector | None]) -> Scores:
    """What the model says to the bare queries, a row a vector."""
    # nothing is drawn: there are no demonstrations
    return score(model, build_prompts(model, pairs, n_shots=0, generator=torch.Generator()), vectors)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


# --- vectors of other relations ---


def _controls(cell: Cell, model: Any, shelf: Shelf) -> dict[str, Value]:
    def vectors(name: str) -> dict[str, FunctionVector]:
        def make() -> dict[str, FunctionVector]:
            return _shared(model, *find_both(model, name, cell.seed), cell.seed)

        return shelf.get(_part(cell, name), (UNTRAINED, TRAINED), _loader(model), make)

    test = load_relation(cell.relation).split(torch.Generator().manual_seed(cell.seed)).test
    others = [vectors(name) for name in str(cell["others"]).split()]
    # as its own vector it is added where that of this relation would be; trained ones stay where they were trained
    untrained = others[0][UNTRAINED].at_layer(vectors(cell.relation)[UNTRAINED].layer)
    scored = bare_scores(model, test, [untrained, *(one[TRAINED] for one in others)])
    right = (scored.ranks == 0).double()
    known: list[float] = [
        float(model.tokenizer.decode([token]).removeprefix(" ") in _known_answers()[pair.input])
        for said in scored.best[1:].tolist()
        for token, pair in zip(said, test, strict=True)
    ]
    return {
        "other_relation": float(right[0].mean()),
        "other_tuned": float(right[1:].mean()),
        "other_answer": _mean(known),
    }


def _loader(model: Any) -> Any:
    def load(path: Path) -> FunctionVector:
        return FunctionVector.load(path, model=model)

    return load


@functools.cache
def _known_answers() -> Mapping[str, set[str]]:
    """Of each query its answers in all library relations."""
    answers = defaultdict(set)
    for name in list_relations():
        for query, answer in load_relation(name):
            answers[query].add(answer)
    return answers


# --- tables ---

_AIE = re.compile(r"aie_(\w+)_L(\d+)H(\d+)")


def _tables(rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    import pandas as pd

    by_relation = seed_means(rows)
    scores = list(dict.fromkeys(key for row in by_relation.values() for key in row))
    nan = float("nan")
    values = {key: [row.get(key, nan) for row in by_relation.values()] for key in scores}
    lines, heads = [], []
    for key, found in values.items():
        if head := _AIE.fullmatch(key):
            where = {"labels": head[1], "layer": int(head[2]), "head": int(head[3])}
            heads.append(where | mean_with_interval(found, 0))
        else:
            lines.append({"quantity": key} | mean_with_interval(found, 0))
    for name, keys in PAIRED.items():
        a, b = (values.get(key, [nan] * len(by_relation)) for key in keys)
        lines.append({"quantity": name} | mean_with_interval([x - y for x, y in zip(a, b, strict=True)], 0))
    relations = [
        {"relation": name} | {key: row.get(key, nan) for key in scores if not _AIE.fullmatch(key)}
        for name, row in by_relation.items()
    ]
    return {"quantities": pd.DataFrame(lines), "heads": pd.DataFrame(heads), "relations": pd.DataFrame(relations)}


MEASURE = Study(
    name="measure",
    summary="demonstrations, function vectors and fine-tuned vectors of every relation, beside controls",
    version=1,
    cells=_cells,
    run=_run,
    tables=_tables,
    markdown=whole,
    shares=True,
    excerpts=EXCERPTS,
)
