"""How many pairs a fine-tuned vector needs: the study ``training-size`` on relations of the study ``claims``.

Twelve relations whose answers differ in their first token and that have 40 training pairs, those of ``claims`` first;
on SmolLM2-135M they are of morphology, spelling and meaning, as the library's other relations are too small.
"""

import dataclasses
from dataclasses import dataclass

import torch

from fvlens.relations import list_relations, load_relation
from fvlens.studies._claims import by_group, half_of
from fvlens.studies._claims_tables import FIRST
from fvlens.studies._study import Cell, Settings, load_float32
from fvlens.studies._trained import SIZE_TRAIN, SizeOptions, size_cells, size_study

N_RELATIONS = 12


@dataclass(frozen=True, slots=True)
class ClaimsSizeOptions(SizeOptions):
    """Options of the study of training pairs on relations of the claims.

    Attributes:
        sizes: numbers of training pairs; a relation that is not named on the line has all of them.
    """

    sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 40)


def _cells(settings: Settings) -> list[Cell]:
    options: ClaimsSizeOptions = settings.chosen(ClaimsSizeOptions)
    names = settings.relations
    if names is None:
        every = by_group(load_float32(settings.cell("")).model, list_relations())[FIRST]
        claimed = half_of(every)
        ordered = [*claimed, *(name for name in every if name not in claimed)]
        names = tuple(name for name in ordered if _n_train(name, settings.seed) >= max(options.sizes))[:N_RELATIONS]
    return size_cells(dataclasses.replace(settings, relations=names or None, options=options))


def _n_train(name: str, seed: int) -> int:
    return len(load_relation(name).split(torch.Generator().manual_seed(seed), train=SIZE_TRAIN).train)


CLAIMS_SIZE = size_study(
    "claims-size",
    "fine-tuned vectors by the number of training pairs, on twelve relations of the claims",
    ClaimsSizeOptions,
    _cells,
)
