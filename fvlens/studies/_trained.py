"""What a trained vector depends on: number of training pairs, layer, scale, l2, start. One function a study.

A cell is a relation and a place on the study's axis. Trainings start from the relation's function vector, which is
found as :func:`fvlens.find_vector` does; :mod:`fvlens.studies._lab` has what they share.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fvlens.relations import load_relation
from fvlens.studies._lab import VALIDATION, Axis, FewPairsOptions, Lab, TrainedOptions, Workplace, load_workplace
from fvlens.studies._study import Cell, Settings, Study, Value, every, plain
from fvlens.training import Settings as Training
from fvlens.vectors import random_vector_like

_EVERY = 14
"""By default a study takes every so many-th relation of the library."""


# --- training pairs ---


@dataclass(frozen=True, slots=True)
class SizeOptions(TrainedOptions):
    """Options of the study of training pairs.

    Attributes:
        n_seeds: trainings behind each point.
        sizes: numbers of training pairs; those that a relation has not are left out.
    """

    n_seeds: int = 5
    sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)

    def __post_init__(self) -> None:
        TrainedOptions.__post_init__(self)
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes: expected numbers of at least 1, got {_listed(self.sizes)}.")


SIZE_TRAIN = 0.7
"""Share of training pairs, larger than usual, as their number is what is studied."""


def size_cells(settings: Settings) -> list[Cell]:
    """A cell for each relation and number of training pairs.

    Raises:
        ValueError: a relation has none of these sizes.
    """
    options: SizeOptions = settings.chosen(SizeOptions)
    cells = []
    for name in every(_EVERY, settings):
        generator = torch.Generator().manual_seed(settings.seed)
        most = len(load_relation(name).split(generator, train=SIZE_TRAIN).train)
        sizes = [size for size in sorted(set(options.sizes)) if size <= most]
        if not sizes:
            raise ValueError(
                f"training-size: expected sizes in 1..{most}, the training pairs of {name}, got "
                f"{_listed(options.sizes)}."
            )
        cells += [settings.cell(name, options=plain(options, ("sizes",)), size=size) for size in sizes]
    return cells


def _size_rows(cell: Cell, place: Workplace) -> list[dict[str, Value]]:
    lab = place.lab(cell, SizeOptions, train=SIZE_TRAIN)
    return place.told(at_size(lab, int(cell["size"])))


def at_size(lab: Lab, size: int) -> list[dict[str, Value]]:
    """Top-1 on the training pairs and on unseen words, the over-fitting curve; from ``init`` and from zero.

    A seed's smaller training sets are parts of its larger ones. So that few pairs are not trained less, they get more
    epochs, as many steps as 20 pairs take. No validation pairs are used: the vector is that of the last epoch.
    """
    own = lab.training
    wanted = own.epochs * _steps(20, own)
    longer = dataclasses.replace(own, epochs=max(own.epochs, math.ceil(wanted / _steps(size, own))))
    rows = []
    for start, behind in ((lab.init, ""), (lab.zero, ", from zero")):
        vectors = list(lab.train([start] * lab.n_seeds, n_train=size, training=longer).vectors)
        seen = [lab.ask(pairs[:size], [vector]).mean() for pairs, vector in zip(lab.drawn, vectors, strict=True)]
        (unseen,) = lab.points([(f"test pairs{behind}", size, vectors)])
        rows += [unseen, lab.point(f"training pairs{behind}", size, torch.stack(seen), float(unseen["norm"]))]
    return rows


def _steps(n_pairs: int, training: Training) -> int:
    """Steps in an epoch."""
    return math.ceil(n_pairs / (training.batch_size or n_pairs))


# --- layer ---


@dataclass(frozen=True, slots=True)
class LayerOptions(FewPairsOptions):
    """Options of the study of layers.

    Attributes:
        layers: those that are studied; by default all.
    """

    layers: tuple[int, ...] = ()


def _layer_cells(settings: Settings) -> list[Cell]:
    options: LayerOptions = settings.chosen(LayerOptions)
    layers = sorted(set(options.layers)) or range(_n_layers(settings))
    own = plain(options, ("layers",))
    return [settings.cell(name, options=own, at=layer) for name in every(_EVERY, settings) for layer in layers]


def _n_layers(settings: Settings) -> int:
    return load_workplace(settings.cell("")).model.model.cfg.n_layers


def _layer_rows(cell: Cell, place: Workplace) -> list[dict[str, Value]]:
    return place.told(at_layer(place.lab(cell, LayerOptions), int(cell["at"])))


def at_layer(lab: Lab, layer: int) -> list[dict[str, Value]]:
    """The vector trained at a layer, and the untuned one added there.

    Test pairs are shown here; to choose a layer, use validation pairs: ``finetune(..., layer=[...], valid=...)``.
    """
    there = lab.init.at_layer(layer)
    vectors = list(lab.train([there] * lab.n_seeds).vectors)
    return lab.points([("fine-tuned", layer, vectors), ("untuned", layer, [there])])


# --- scale ---


@dataclass(frozen=True, slots=True)
class ScaleOptions(FewPairsOptions):
    """Options of the study of scales.

    Attributes:
        scales: factors on the vector.
    """

    scales: tuple[float, ...] = tuple(i / 4 for i in range(17))

    def __post_init__(self) -> None:
        FewPairsOptions.__post_init__(self)
        if not self.scales:
            raise ValueError("scales: expected at least one, got none.")


def _scale_cells(settings: Settings) -> list[Cell]:
    # one cell a relation: there is one training, and all its multiples are asked together
    options: ScaleOptions = settings.chosen(ScaleOptions)
    own = plain(options, ("scales",))
    scales = json.dumps(sorted(set(map(float, options.scales))))
    return [settings.cell(name, options=own, scales=scales) for name in every(_EVERY, settings)]


def _scale_rows(cell: Cell, place: Workplace) -> list[dict[str, Value]]:
    lab = place.lab(cell, ScaleOptions, scaled=False)
    return place.told(at_scales(lab, json.loads(str(cell["scales"]))))


def at_scales(lab: Lab, scales: Sequence[float]) -> list[dict[str, Value]]:
    """A factor on the vector when it is added, trained (at factor 1) and untuned; norms are those of what is added."""
    trained = list(lab.train([lab.init] * lab.n_seeds).vectors)
    lines = {"fine-tuned": trained, "untuned": [lab.init]}
    return lab.points(
        [(line, scale, [scale * vector for vector in vectors]) for scale in scales for line, vectors in lines.items()]
    )


# --- l2 ---


@dataclass(frozen=True, slots=True)
class L2Options(FewPairsOptions):
    """Options of the study of l2.

    Attributes:
        weights: of the squared distance of the vector from zero, and from its start.
    """

    weights: tuple[float, ...] = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

    def __post_init__(self) -> None:
        FewPairsOptions.__post_init__(self)
        if not self.weights or not min(self.weights) >= 0:
            raise ValueError(f"weights: expected numbers of at least 0, got {_listed(self.weights)}.")


def _l2_cells(settings: Settings) -> list[Cell]:
    options: L2Options = settings.chosen(L2Options)
    own, weights = plain(options, ("weights",)), sorted(set(map(float, options.weights)))
    return [settings.cell(name, options=own, l2=weight) for name in every(_EVERY, settings) for weight in weights]


def _l2_rows(cell: Cell, place: Workplace) -> list[dict[str, Value]]:
    return place.told(at_l2(place.lab(cell, L2Options), float(cell["l2"])))


def at_l2(lab: Lab, weight: float) -> list[dict[str, Value]]:
    """The weight of ``||v - anchor||^2``, with both anchors."""
    asked = []
    for anchor, line in (("zero", "to zero"), ("init", "to the start")):
        held = dataclasses.replace(lab.training, l2=weight, anchor=anchor)
        asked.append((line, weight, list(lab.train([lab.init] * lab.n_seeds, training=held).vectors)))
    return lab.points(asked)


# --- start ---

STARTS = ("function vector", "zero", "noise")


@dataclass(frozen=True, slots=True)
class InitOptions(FewPairsOptions):
    """Options of the study of starts.

    Attributes:
        n_seeds: trainings behind each curve.
    """

    n_seeds: int = 5


def _init_cells(settings: Settings) -> list[Cell]:
    own = plain(settings.chosen(InitOptions))
    return [settings.cell(name, options=own, start=start) for name in every(_EVERY, settings) for start in STARTS]


def _init_rows(cell: Cell, place: Workplace) -> list[dict[str, Value]]:
    return place.told(from_start(place.lab(cell, InitOptions), str(cell["start"])))


def from_start(lab: Lab, start: str) -> list[dict[str, Value]]:
    """Top-1 after every epoch from the function vector, zero, or noise of the function vector's norm.

    The trainings are the same for the validation and the test pairs, which are only measured. All starts see the same
    training pairs in the same order. A patience is not heeded. Intervals are over seeds.
    """
    noise = lab.fresh()
    vectors = {
        "function vector": [lab.init] * lab.n_seeds,
        "zero": [lab.zero] * lab.n_seeds,
        "noise": [random_vector_like(lab.init, noise) for _ in range(lab.n_seeds)],
    }[start]
    whole = dataclasses.replace(lab.training, patience=None)
    rows = []
    for watched, behind in ((lab.split.test, ""), (lab.split.valid, VALIDATION)):
        runs = lab.train(vectors, valid=watched, training=whole)
        top1 = torch.stack([run.history.valid_top1 for run in runs])
        norms = torch.stack([run.history.norm for run in runs]).mean(dim=0).tolist()
        rows += [lab.point(f"{start}{behind}", epoch, top1[:, epoch], norm) for epoch, norm in enumerate(norms)]
    return rows


# --- the studies ---


def _listed(values: Sequence[float | int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _study(
    axis: Axis,
    summary: str,
    options: type[TrainedOptions],
    cells: Callable[[Settings], list[Cell]],
    run: Callable[[Cell, Workplace], list[dict[str, Value]]],
) -> Study:
    return Study(
        name=axis.name, summary=summary, version=1, cells=cells, run=run, tables=axis.tables, markdown=axis.markdown,
        figures=axis.figures, load=load_workplace, options=options,
    )  # fmt: skip


def size_study(name: str, summary: str, options: type[SizeOptions], cells: Callable[[Settings], list[Cell]]) -> Study:
    """The study of training pairs, under this name and with these cells."""
    axis = Axis(
        name, "Number of training pairs", "Training pairs", log_x=True,
        over="test words, each word's mean over seeds (training pairs: over seeds)",
    )  # fmt: skip
    return _study(axis, summary, options, cells, _size_rows)


TRAINED = (
    size_study(
        "training-size", "fine-tuned vectors by the number of training pairs: top-1 on these and on unseen words",
        SizeOptions, size_cells,
    ),
    _study(
        Axis("layer", "Layer of the vector", "Added after layer", references=("bare",)),
        "fine-tuned and untuned vectors at every layer",
        LayerOptions, _layer_cells, _layer_rows,
    ),
    _study(
        Axis("scale", "Scale of the vector", "Factor on the vector", references=("bare",)),
        "a factor on fine-tuned and untuned vectors when they are added",
        ScaleOptions, _scale_cells, _scale_rows,
    ),
    _study(
        Axis("l2", "l2 on the vector", "Weight of l2", log_x=True),
        "fine-tuned vectors held near zero or near their start by l2",
        L2Options, _l2_cells, _l2_rows,
    ),
    _study(
        Axis("init", "Start of the training", "Epoch", over="seeds"),
        "fine-tuning from the function vector, zero or noise, after every epoch",
        InitOptions, _init_cells, _init_rows,
    ),
)  # fmt: skip
"""In the order in which they are listed."""
