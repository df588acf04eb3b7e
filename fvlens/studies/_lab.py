"""What the studies of trained vectors share: where a relation's trainings start, training, asking, table and figure.

All are measured on the split's test pairs. Trainings that differ in their seed alone are done in one batched run. A
seed draws both the training pairs and the order of the minibatches; both are the same in every cell of a relation, so
that nothing differs from cell to cell but what is studied.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.evaluation import copied
from fvlens.find import find_vector, finished
from fvlens.metrics import bootstrap_interval
from fvlens.prompts import build_prompts
from fvlens.relations import Pair, Split, load_relation
from fvlens.report import RecipeOptions
from fvlens.scoring import score
from fvlens.studies._study import Cell, Loaded, Row, Value, at_least, named
from fvlens.studies._tables import grid, in_brackets, own_or_means, standing
from fvlens.training import FineTunedSet, finetune_many
from fvlens.training import Settings as Training
from fvlens.vectors import FunctionVector

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

VALIDATION = ", validation"
"""Behind the name of a line that is measured on validation pairs."""

REFERENCES = {"untuned": "untuned vector", "bare": "no vector"}
"""Column -> what the lines are compared with on the test pairs."""


@dataclass(frozen=True, slots=True)
class StartOptions(RecipeOptions):
    """The vector that trainings start from, and how long they are.

    Attributes:
        layer: of the vector; by default the best one on the validation pairs.
        epochs: passes over the training pairs.
    """

    layer: int | None = None
    epochs: int = 20

    def __post_init__(self) -> None:
        RecipeOptions.__post_init__(self)
        at_least(self, epochs=1)


@dataclass(frozen=True, slots=True)
class TrainedOptions(StartOptions):
    """The same, of trainings of which there are several.

    Attributes:
        n_seeds: trainings behind each point.
    """

    n_seeds: int = 3

    def __post_init__(self) -> None:
        StartOptions.__post_init__(self)
        at_least(self, n_seeds=1)


@dataclass(frozen=True, slots=True)
class FewPairsOptions(TrainedOptions):
    """The same, of a study whose trainings have the same number of pairs.

    Attributes:
        n_train: training pairs of each seed, or all that there are.
    """

    n_train: int = 20

    def __post_init__(self) -> None:
        TrainedOptions.__post_init__(self)
        at_least(self, n_train=1)


class Lab:
    """One relation's trainings.

    Args:
        model: the model.
        split: the pairs that ``init`` was made on, so that the test words are new to it too.
        init: what training starts from, at its layer.
        n_seeds: trainings of each kind.
        n_train: training pairs of each; None where that is what is studied.
        training: how to train.
        generator: draws the training pairs of each seed, then the order of the minibatches.
        seed: of the intervals.

    Raises:
        ValueError: a split without training or test pairs.
    """

    def __init__(
        self,
        model: Any,
        split: Split,
        init: FunctionVector,
        *,
        n_seeds: int,
        n_train: int | None = None,
        training: Training,
        generator: torch.Generator,
        seed: int = 0,
    ) -> None:
        if not split.train or not split.test:
            raise ValueError("study: expected a split with training and test pairs, got none of one of them.")
        self.model, self.split, self.init, self.n_seeds, self.training = model, split, init, n_seeds, training
        self.n_train = None if n_train is None else min(n_train, len(split.train))
        self.zero = dataclasses.replace(init, vector=torch.zeros_like(init.vector), heads=(), kind="zero")
        self.drawn: list[tuple[Pair, ...]] = []
        for _ in range(n_seeds):
            order = torch.randperm(len(split.train), generator=generator).tolist()
            self.drawn.append(tuple(split.train[i] for i in order))
        self._order, self._seed = copied(generator), seed
        untuned, bare = self.ask(split.test, [init, None]).mean(dim=1).tolist()
        self.references: dict[str, Value] = {"untuned": untuned, "bare": bare}

    def fresh(self) -> torch.Generator:
        """The generator as it was before the first training."""
        return copied(self._order)

    def train(
        self,
        starts: Sequence[FunctionVector],
        *,
        n_train: int | None = None,
        valid: Sequence[Pair] | None = None,
        training: Training | None = None,
    ) -> FineTunedSet:
        """One training a seed, all in one run. With ``n_train`` given there are no validation pairs.

        Raises:
            KeyboardInterrupt: it was interrupted; a part of the epochs is not handed out as all of them.
        """
        n = n_train or self.n_train
        watched = self.split.valid if valid is None and n_train is None else valid or ()
        splits = {f"seed {i}": Split(pairs[:n], tuple(watched), (), "input") for i, pairs in enumerate(self.drawn)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* was interrupted")  # said once, by the study
            return finished(
                finetune_many(
                    self.model, splits, init=list(starts), n_train=None, settings=training or self.training,
                    generator=self.fresh(), progress=False,
                )
            )  # fmt: skip

    def ask(self, pairs: Sequence[Pair], vectors: Sequence[FunctionVector | None]) -> Float[Tensor, "vector pair"]:
        """Whether each pair's answer is the most likely one under each vector, as 0 and 1."""
        bare = build_prompts(self.model, pairs, n_shots=0, template=self.training.template, generator=torch.Generator())
        return (score(self.model, bare, vectors, progress=False, what="study").ranks == 0).float()

    def points(self, asked: Sequence[tuple[str, float | int, Sequence[FunctionVector]]]) -> list[dict[str, Value]]:
        """Measurements on the test pairs, all vectors together.

        Args:
            asked: the line, the place on the axis, and one vector a seed or one for all.
        """
        vectors = [vector for _, _, some in asked for vector in some]
        parts = self.ask(self.split.test, vectors).split([len(some) for _, _, some in asked])
        return [
            self.point(line, x, right.mean(dim=0), sum(vector.norm() for vector in some) / len(some))
            for (line, x, some), right in zip(asked, parts, strict=True)
        ]

    def point(self, line: str, x: float | int, top1: Float[Tensor, " one"], norm: float) -> dict[str, Value]:
        """A row: the mean of words or seeds with its interval over them, and what it is to be compared with."""
        interval = bootstrap_interval(top1, generator=torch.Generator().manual_seed(self._seed))
        found: dict[str, Value] = {
            "line": line, "x": x, "top1": float(top1.mean()), "top1_low": interval.low, "top1_high": interval.high,
            "norm": norm,
        }  # fmt: skip
        return found | self.references | {"n_seeds": self.n_seeds, "n_test": len(self.split.test)}


class Workplace:
    """A model, and the lab of the relation that was studied last: cells of one relation share their start."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._what: Any = None
        self._lab: Lab | None = None
        self._told: dict[str, Value] = {}

    def lab(self, cell: Cell, kind: Callable[..., Any], *, train: float = 0.45, scaled: bool = True) -> Lab:
        """The relation's lab.

        Args:
            cell: relation, seed and options.
            kind: the study's options.
            train: share of the pairs that are for training.
            scaled: trainings start from the best multiple of the vector, not from the vector itself.
        """
        what = (cell.relation, cell.seed, cell.threads, cell.options, train, scaled)
        if self._lab is None or what != self._what:
            options = cell.chosen(kind)
            generator = torch.Generator().manual_seed(cell.seed)
            split = load_relation(cell.relation).split(generator, train=train)
            found = find_vector(
                self.model, split, labels=options.labels, n_heads=options.n_heads, n_shots=options.n_shots,
                n_prompts=options.n_prompts, n_corrupted=options.n_corrupted,
                layers=None if options.layer is None else [options.layer], template=options.template,
                relation=cell.relation, seed=cell.seed, generator=generator, progress=False,
            )  # fmt: skip
            self._lab = Lab(
                self.model, split, found.vector if scaled else found.unscaled, n_seeds=options.n_seeds,
                n_train=getattr(options, "n_train", None),
                training=Training(epochs=options.epochs, template=options.template), generator=generator,
                seed=cell.seed,
            )  # fmt: skip
            self._what = what
            self._told = {
                "start_layer": found.vector.layer, "start_scale": found.scale, "caution": " ".join(found.cautions),
            }  # fmt: skip
        return self._lab

    def told(self, rows: list[dict[str, Value]]) -> list[dict[str, Value]]:
        """Rows of the last lab, each with where its trainings started."""
        return [row | self._told for row in rows]


def load_workplace(cell: Cell) -> Loaded:
    """The cell's model, in float32 on the CPU unless the user says otherwise."""
    model = cell.load(device="cpu", dtype="float32")
    return named(Workplace(model), model)


# --- table and figure ---


@dataclass(frozen=True, slots=True)
class Axis:
    """What varies in a study, in words.

    Attributes:
        name: of the study, and of its table and figure.
        title: what varies.
        x_title: what the axis is.
        over: what a relation's intervals are over.
        references: those of :data:`REFERENCES` that the figure shows.
        log_x: the axis is logarithmic in the figure.
    """

    name: str
    title: str
    x_title: str
    over: str = "test words, each word's mean over seeds"
    references: tuple[str, ...] = ("untuned", "bare")
    log_x: bool = False

    def tables(self, rows: Sequence[Row]) -> "dict[str, pd.DataFrame]":
        """A line for each line of the figure and place on the axis."""
        scores, others = ("top1",), ("norm", *REFERENCES, "n_seeds", "n_test")
        frame = own_or_means(rows, ("line", "x"), scores, others, ("caution",))
        # by lines, and along the axis within each
        order = {name: i for i, name in enumerate(dict.fromkeys(frame["line"]))}
        places = sorted(range(len(frame)), key=lambda i: (order[frame["line"][i]], frame["x"][i]))
        return {self.name: frame.iloc[places].reset_index(drop=True)}

    def markdown(self, tables: "Mapping[str, pd.DataFrame]") -> str:
        """A row for each place on the axis, with intervals where there is room for them."""
        frame = tables[self.name]
        at = {(row["line"], row["x"]): row for row in frame.to_dict("records")}
        lines = list(dict.fromkeys(frame["line"]))

        def shown(row: dict[Any, Any] | None) -> str:
            if row is None:
                return ""
            top1 = (row["top1"], row["top1_low"], row["top1_high"])
            return in_brackets(top1[0], top1[1], top1[2], ".3f") if len(lines) < 3 else f"{top1[0]:.3f}"

        body = [[f"{x:g}", *(shown(at.get((line, x))) for line in lines)] for x in sorted(set(frame["x"]))]
        first: Any = frame.iloc[0]
        compared = ", ".join(f"{REFERENCES[name]} {first[name]:.3f}" for name in self.references)
        below = " ".join(
            filter(None, [f"Top-1; {compared}. Intervals: {self.band(int(first['n_relations']))}.", first["caution"]])
        )
        return "\n\n".join([grid([self.x_title, *lines], body), below, standing(frame)])

    def band(self, n: int) -> str:
        """What the intervals of ``n`` relations are over."""
        return f"95% bootstrap over {self.over if n == 1 else f'{n} relations'}"

    def figures(self, rows: Sequence[Row]) -> "dict[str, go.Figure]":
        """Lines with their intervals, and the references. On a logarithmic axis, x = 0 is left out."""
        from fvlens import plots

        frame = self.tables(rows)[self.name]
        drawn = {
            line: part[part["x"] > 0] if self.log_x else part
            for line, part in frame.groupby("line", sort=False)
            if not str(line).endswith(VALIDATION)
        }
        drawn = {str(line): part for line, part in drawn.items() if len(part)}
        if not drawn:
            return {}
        first: Any = frame.iloc[0]
        names = list(dict.fromkeys(str(row["relation"]) for row in rows))
        seeds = "1 seed" if first["n_seeds"] == 1 else f"{first['n_seeds']:.0f} seeds"
        figure = plots.curves(
            next(iter(drawn.values()))["x"].tolist(),
            {line: part["top1"].tolist() for line, part in drawn.items()},
            {line: (part["top1_low"].tolist(), part["top1_high"].tolist()) for line, part in drawn.items()},
            x_title=self.x_title,
            y_title="Top-1",
            title=f"{self.title}: {names[0] if len(names) == 1 else f'{len(names)} relations'}",
            note=f"{seeds}. Bands: {self.band(int(first['n_relations']))}",
            references={REFERENCES[name]: float(first[name]) for name in self.references},
            log_x=self.log_x,
            y_range=(0, 1.03),
        )
        return {self.name: figure}
