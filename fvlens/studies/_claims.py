"""What fvlens claims, on a language model that nobody here trained: demonstrations, vectors, training, controls.

A cell is a relation and a seed. Its split gives demonstrations and training pairs, validation pairs for every choice
(heads' queries, layer, scale, epoch), and test pairs for the rows, whose words nothing before has seen. The function
vector is that of :func:`~fvlens.find_vector`. From it and from zero, vectors are trained on the first 20 training
pairs, at the function vector's layer and at a few others that are fixed beforehand, so that what the start does is told
from what the layer does. Controls are random vectors, random heads, and the function vector of another relation
(another family, no output in common), at the same place and under the same factor.

Relations are those of the library whose answers differ in their first token under the model's tokenizer, every second
of them; top-1 looks at that token, ``exact`` at the whole answer. Of some of the other relations ``exact`` is measured
alone. The other relation of a cell is the nearest before it, so that its vector is on the shelf already.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fvlens.evaluation import ControlKind, Controls, controls
from fvlens.find import Found, find_vector, finished
from fvlens.prompts import build_prompts, check_pairs
from fvlens.relations import disjoint_relations, list_relations, load_relation
from fvlens.report import RecipeOptions, at_least_one
from fvlens.scoring import score
from fvlens.studies._claims_pages import EXCERPTS, figures, whole
from fvlens.studies._claims_tables import EXACT, FIRST, tables
from fvlens.studies._shelf import Shelf
from fvlens.studies._study import Cell, Settings, Study, Value, field_names, load_float32, plain
from fvlens.training import FineTuned, finetune_many
from fvlens.vectors import FunctionVector

LEAST = 42
"""Relations of the first group, if every second were fewer."""

DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Where vectors are trained beside the function vector's layer, as shares of the model's layers."""

UNTRAINED = "function vector"
"""Name of what a relation's cell keeps for others: its vector, not scaled."""

_ROWS: dict[ControlKind, str] = {
    "no_vector": "bare",
    "icl": "icl",
    "shuffled": "permuted",
    "vector": "fv",
    "random_vector": "random",
    "random_heads": "random_heads",
    "other_relation": "other",
}
"""Row of a table of controls -> its name here."""


@dataclass(frozen=True, slots=True)
class ClaimsOptions(RecipeOptions):
    """Options of the claims.

    Attributes:
        n_train: training pairs of the fine-tuned vectors.
        epochs: passes over the training pairs.
        layers: where vectors are trained beside the function vector's layer; by default at 0.3 to 0.7 of the depth.
        n_random: random vectors, and random sets of heads.
        n_seeds: seeds; the first one of all relations comes first.
        n_exact: relations whose answers share first tokens.
    """

    n_train: int = 20
    epochs: int = 20
    layers: tuple[int, ...] = ()
    n_random: int = 10
    n_seeds: int = 3
    n_exact: int = 10

    def __post_init__(self) -> None:
        RecipeOptions.__post_init__(self)
        at_least_one(self, "n_train", "epochs", "n_random", "n_seeds")
        if self.n_exact < 0:
            raise ValueError(f"n_exact: expected 0 or more, got {self.n_exact}.")


# --- which cells there are ---


def _cells(settings: Settings) -> list[Cell]:
    options: ClaimsOptions = settings.chosen(ClaimsOptions)
    own = plain(options, ("n_seeds", "n_exact", "layers"))
    model = load_float32(settings.cell("")).model
    groups = by_group(model, settings.relations or list_relations())
    if settings.relations is None:
        groups = {FIRST: half_of(groups[FIRST]), EXACT: spaced(groups[EXACT], options.n_exact)}
    others = {group: others_of(names) for group, names in groups.items()}
    layers = " ".join(map(str, sorted(set(options.layers)) or layers_of(model.cfg.n_layers)))
    return [
        dataclasses.replace(settings, seed=seed).cell(
            name, options=own, group=group, control=others[group][name], layers=layers
        )
        for seed in range(settings.seed, settings.seed + options.n_seeds)
        for group, names in groups.items()
        for name in names
    ]


def by_group(model: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """The relations whose answers differ in their first token under the model's tokenizer, and the others."""
    groups: dict[str, list[str]] = {FIRST: [], EXACT: []}
    for name in names:
        answers = check_pairs(load_relation(name), model, generator=torch.Generator().manual_seed(0)).answers
        groups[EXACT if answers is None or answers.n_sharing else FIRST].append(name)
    return groups


def half_of(names: Sequence[str]) -> list[str]:
    """Every second, or if that were fewer than :data:`LEAST` so many of them, as far as there are."""
    return list(names[::2]) if len(names) >= 2 * LEAST - 1 else spaced(names, LEAST)


def spaced(names: Sequence[str], n: int) -> list[str]:
    """So many of the names, evenly spaced, or all."""
    n = min(n, len(names))
    return [names[i * len(names) // n] for i in range(n)]


def layers_of(n: int) -> list[int]:
    """Where vectors are trained in a model of ``n`` layers, whatever the function vector's layer is."""
    return sorted({min(n - 1, round(depth * n)) for depth in DEPTHS})


def others_of(names: Sequence[str]) -> dict[str, str]:
    """For each of ``names`` the nearest before it, in a circle, of another family and without an output in common; the
    library's first such relation if there is none among them.

    Raises:
        ValueError: there is none in the library either.
    """
    found: dict[str, str] = {}
    for i, name in enumerate(names):
        disjoint = disjoint_relations(load_relation(name))
        before = (names[(i - k) % len(names)] for k in range(1, len(names)))
        other = next((one for one in before if one in disjoint), next(iter(disjoint), None))
        if other is None:
            raise ValueError(f"study claims: no library relation has another family and other outputs than {name!r}.")
        found[name] = other
    return found


# --- one cell ---


def _run(cell: Cell, model: Any, shelf: Shelf) -> list[dict[str, Value]]:
    """One row."""
    options: ClaimsOptions = cell.chosen(ClaimsOptions)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*share their first token")  # that is what the groups are for
        warnings.filterwarnings("ignore", message=".* was interrupted")  # said once, by the study
        found, generator = _found(cell.relation, cell, model)
        shelf.put(_part(cell, cell.relation), {UNTRAINED: found.unscaled})
        other = _of_another(cell, model, shelf)
        compared = finished(
            controls(
                model, found.split.test, found.unscaled, scale=found.scale, others=[other], means=found.means,
                n_random=options.n_random, demonstrations=found.split.train, n_shots=options.n_shots,
                template=options.template, relation=cell.relation, generator=generator, progress=False,
            )
        )  # fmt: skip
        trained = _trained(found, cell, model)
        return [_measured(compared, found, trained, options, model)]


def _found(name: str, cell: Cell, model: Any) -> tuple[Found, torch.Generator]:
    """A relation's function vector and all that led to it, and the generator as it is then."""
    options: ClaimsOptions = cell.chosen(ClaimsOptions)
    recipe = {field: getattr(options, field) for field in field_names(RecipeOptions) if field != "bos"}
    generator = torch.Generator().manual_seed(cell.seed)
    split = load_relation(name).split(generator)
    found = find_vector(
        model, split, relation=name, seed=cell.seed, generator=generator, progress=False, **recipe,
    )  # fmt: skip
    return found, generator


def _part(cell: Cell, name: str) -> Cell:
    """Whose a vector is on the shelf."""
    return dataclasses.replace(cell, relation=name, varies=(("part", "vector"),))


def _of_another(cell: Cell, model: Any, shelf: Shelf) -> FunctionVector:
    """The vector of the cell's other relation."""
    name = str(cell["control"])

    def load(path: Path) -> FunctionVector:
        return FunctionVector.load(path, model=model)

    def make() -> dict[str, FunctionVector]:
        return {UNTRAINED: _found(name, cell, model)[0].unscaled}

    return shelf.get(_part(cell, name), (UNTRAINED,), load, make)[UNTRAINED]


def _trained(found: Found, cell: Cell, model: Any) -> dict[str, dict[int, FineTuned]]:
    """By start and layer, a vector trained there. The starts of a layer are trained in one run, and the pairs come in
    the same order at every layer."""
    options: ClaimsOptions = cell.chosen(ClaimsOptions)
    others = map(int, str(cell["layers"]).split())
    starts = {"tuned": found.vector, "zero": 0.0 * found.vector}
    runs: dict[str, dict[int, Any]] = {start: {} for start in starts}
    for layer in sorted({found.layer, *others}):
        together = finetune_many(
            model, dict.fromkeys(starts, found.split), init=starts, layer=layer, n_train=options.n_train,
            epochs=options.epochs, template=options.template, generator=torch.Generator().manual_seed(cell.seed),
            progress=False,
        )  # fmt: skip
        for run in finished(together):
            runs[run.relation][layer] = run
    return runs


def best_layer(runs: Mapping[int, FineTuned]) -> int:
    """The layer whose vector is best on the validation pairs, by the rule that its epoch was chosen by: top-1, then the
    loss; ties go to the lower layer."""

    def order(layer: int) -> tuple[float, float, int]:
        run = runs[layer]
        return float(run.history.valid_top1[run.best_epoch]), -float(run.history.valid_loss[run.best_epoch]), -layer

    return max(runs, key=order)


def _measured(
    compared: Controls, found: Found, trained: Mapping[str, Mapping[int, FineTuned]], options: ClaimsOptions, model: Any
) -> dict[str, Value]:
    """The row: top-1 and ``exact`` of everything on the test pairs, and the places that were chosen."""
    split = found.split
    row: dict[str, Value] = {"n_train": min(options.n_train, len(split.train)), "n_valid": len(split.valid)}
    row |= {"n_test": len(split.test), "layer": found.layer, "scale": found.scale}
    for one in compared.rows:
        row |= {_ROWS[one.kind]: one.top1, f"{_ROWS[one.kind]}_exact": one.exact}
    vectors: dict[str, Any] = {"fv_scale_1": found.vector_at_scale_one}
    for start, runs in trained.items():
        best = best_layer(runs)
        vectors |= {start: runs[found.layer].vector, f"{start}_best": runs[best].vector}
        row[f"{start}_layer"] = best
    # nothing is drawn: there are no demonstrations
    bare = build_prompts(model, split.test, n_shots=0, template=options.template, generator=torch.Generator())
    scored = score(model, bare, list(vectors.values()), what="study claims")
    top1, exact = (part.double().mean(dim=1).tolist() for part in (scored.ranks == 0, scored.exact))
    for name, first, full in zip(vectors, top1, exact, strict=True):
        row |= {name: first, f"{name}_exact": full}
    return row


CLAIMS = Study(
    name="claims",
    summary="what fvlens claims, on a real language model: vectors, training and controls, with bars",
    version=1,
    cells=_cells,
    run=_run,
    tables=tables,
    markdown=whole,
    figures=figures,
    options=ClaimsOptions,
    shares=True,
    excerpts=EXCERPTS,
    pictures=("claims",),
)
