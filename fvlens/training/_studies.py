"""What a trained vector depends on: training pairs, layer, scale, l2, start. One function a study, one result type.

All are measured on the split's test pairs. Trainings that differ in their seed alone are done in one batched run. A
seed draws both the training pairs and the order of the minibatches.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.evaluation import copied
from fvlens.find import finished
from fvlens.interruption import keeping, marked, titled
from fvlens.metrics import Interval, bootstrap_interval
from fvlens.prompts import build_prompts
from fvlens.relations import Pair, Relation, Split
from fvlens.scoring import score
from fvlens.training._finetune import FineTunedSet, finetune_many
from fvlens.training._settings import Anchor, Settings
from fvlens.vectors import FunctionVector, random_vector_like

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SIZES = (1, 2, 5, 10, 20, 50, 100)
SCALES = tuple(i / 4 for i in range(17))
WEIGHTS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
VALIDATION = ", validation"
"""Behind the name of a line that is measured on validation pairs."""
_Made = TypeVar("_Made")
_WORDS = "95% bootstrap over test words, each word's mean over seeds"


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of a study.

    Attributes:
        line: what was measured, such as ``"fine-tuned"``.
        x: where.
        top1: mean top-1 accuracy.
        interval: 95% bootstrap interval of ``top1``; over what, the study says.
        norm: mean Euclidean norm of the vectors.
    """

    line: str
    x: float | int
    top1: float
    interval: Interval
    norm: float


@dataclass(frozen=True, slots=True)
class Study:
    """Top-1 accuracy of trained vectors along one axis, as lines to compare.

    Attributes:
        name: the study's name.
        relation: the relation.
        title: what varies, in words.
        x_title: what the axis is.
        points: the measurements, line by line.
        references: top-1 on the test pairs of what the lines are compared with, by name.
        intervals: what the intervals are over.
        n_seeds: trainings behind each point.
        n_train: training pairs of each, where they are not what the study is about.
        n_test: test pairs.
        log_x: the axis is logarithmic in the figure.
        complete: False if the study was interrupted; the points are those that were finished.
    """

    name: str
    relation: str
    title: str
    x_title: str
    points: tuple[Point, ...]
    references: Mapping[str, float]
    intervals: str
    n_seeds: int
    n_train: int | None
    n_test: int
    log_x: bool = False
    complete: bool = True

    @property
    def lines(self) -> tuple[str, ...]:
        """Names of the lines, in order."""
        return tuple(dict.fromkeys(point.line for point in self.points))

    def line(self, name: str) -> tuple[Point, ...]:
        """The points of one line, by increasing x.

        Raises:
            ValueError: there is no line of that name.
        """
        found = tuple(sorted((point for point in self.points if point.line == name), key=lambda point: point.x))
        if not found:
            raise ValueError(f"no line {name!r} in this study; there are {', '.join(self.lines)}.")
        return found

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a point: ``study, relation, line, x, top1, low, high, norm, n_seeds``."""
        import pandas as pd

        table = pd.DataFrame(
            [
                {
                    "study": self.name,
                    "relation": self.relation,
                    "line": point.line,
                    "x": point.x,
                    "top1": point.top1,
                    "low": point.interval.low,
                    "high": point.interval.high,
                    "norm": point.norm,
                    "n_seeds": self.n_seeds,
                }
                for name in self.lines
                for point in self.line(name)
            ]
        )
        return marked(table, self.complete)

    def plot(self, lines: Sequence[str] | None = None) -> "go.Figure":
        """Lines with their intervals, and the references. On a logarithmic axis, x = 0 is left out.

        Args:
            lines: names of lines; by default all but those on validation pairs.
        """
        from fvlens import plots

        chosen = [name for name in self.lines if not name.endswith(VALIDATION)] if lines is None else list(lines)
        drawn = {name: [point for point in self.line(name) if point.x > 0 or not self.log_x] for name in chosen}
        seeds = "1 seed" if self.n_seeds == 1 else f"{self.n_seeds} seeds"
        return plots.curves(
            [point.x for point in drawn[chosen[0]]],
            {name: [point.top1 for point in points] for name, points in drawn.items()},
            {
                name: ([point.interval.low for point in points], [point.interval.high for point in points])
                for name, points in drawn.items()
            },
            x_title=self.x_title,
            y_title="Top-1",
            title=titled(f"{self.title}: {self.relation}" if self.relation else self.title, self.complete),
            note=f"{seeds}. Bands: {self.intervals}",
            references=self.references,
            log_x=self.log_x,
            y_range=(0, 1.03),
        )


def training_size_study(
    model: Any,
    pairs: Split | Relation,
    *,
    init: FunctionVector,
    sizes: Sequence[int] = SIZES,
    n_seeds: int = 5,
    settings: Settings | None = None,
    relation: str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Study:
    """Training-set size: top-1 on the training pairs and on unseen words, the over-fitting curve.

    A seed's smaller training sets are parts of its larger ones. Sizes that the relation has not are left out. So that
    few pairs are not trained less, they get more epochs, as many steps as 20 pairs take. No validation pairs are used:
    the vector is that of the last epoch. Beside ``init``, zero is trained.

    Args:
        model: the model.
        pairs: the split that ``init`` was made on, so that the test words are new to it too. A ``Relation`` is split
            here, with 70% of its pairs for training.
        init: what training starts from, at its layer.
        sizes: numbers of training pairs.
        n_seeds: trainings of each size.
        settings: how to train; by default as :func:`~fvlens.training.finetune` does.
        relation: the relation's name; by default that of ``pairs`` or ``init``.
        generator: source of randomness: split, training pairs, trainings, bootstrap.
        progress: show a progress bar. Interrupting returns what is finished, with a warning.

    Returns:
        :class:`Study` with the lines ``"test pairs"`` and ``"training pairs"``, and both again ``", from zero"``.

    Raises:
        ValueError: no sizes, or the smallest is not in the range of the training part; ``n_seeds`` is below 1; whatever
            :func:`~fvlens.training.finetune` refuses.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.training import Settings, training_size_study
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> start = fvlens.FunctionVector(torch.zeros(model.cfg.d_model), 1, (), "antonym", fvlens.fingerprint(model))
        >>> study = training_size_study(
        ...     model, fvlens.load_relation("antonym"), init=start, sizes=(1, 10), n_seeds=1,
        ...     settings=Settings(epochs=5), generator=torch.Generator().manual_seed(0), progress=False,
        ... )
        >>> few, more = study.line("test pairs")
        >>> few.top1 < more.top1
        True
    """
    lab = _Lab(model, pairs, init, None, n_seeds, settings, relation, generator, train=0.7)
    most = len(lab.split.train)
    chosen = [size for size in _axis("training_size_study", "sizes", sizes) if size <= most]
    if not chosen or chosen[0] < 1:
        raise ValueError(f"training_size_study: expected sizes in 1..{most}, the training pairs, got {list(sizes)}.")
    own = lab.settings
    wanted = own.epochs * _steps(20, own)

    def measure(size: int) -> list[Point]:
        longer = dataclasses.replace(own, epochs=max(own.epochs, math.ceil(wanted / _steps(size, own))))
        found = []
        for start, behind in ((init, ""), (lab.zero, ", from zero")):
            vectors = lab.train([start] * n_seeds, n_train=size, settings=longer).vectors
            seen = [lab.ask(pairs[:size], [vector]).mean() for pairs, vector in zip(lab.drawn, vectors, strict=True)]
            unseen = lab.point(f"test pairs{behind}", size, vectors)
            top1 = torch.stack(seen)
            interval = bootstrap_interval(top1, generator=generator)
            found += [unseen, Point(f"training pairs{behind}", size, float(top1.mean()), interval, unseen.norm)]
        return found

    points, complete = _each(measure, chosen, "training-set size", progress)
    over = f"{_WORDS} (training pairs: over seeds)"
    return lab.study(
        "training-size", "Number of training pairs", "Training pairs", points, complete, intervals=over, log_x=True
    )


def layer_study(
    model: Any,
    pairs: Split | Relation,
    *,
    init: FunctionVector,
    layers: Sequence[int] | None = None,
    n_train: int = 20,
    n_seeds: int = 3,
    settings: Settings | None = None,
    relation: str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Study:
    """The vector trained at every layer, and the untuned one added there.

    Test pairs are shown here; to choose a layer, use validation pairs: ``finetune(..., layer=[...], valid=...)``.

    Args:
        model, pairs, init, n_seeds, settings, relation, generator, progress: as for :func:`training_size_study`, but a
            ``Relation`` is split as usual, and the best epoch is chosen on the validation pairs.
        layers: the layers; by default all.
        n_train: training pairs of each seed.

    Returns:
        :class:`Study` with the lines ``"fine-tuned"`` and ``"untuned"``.

    Raises:
        ValueError: no layers, or one outside the model; as for :func:`training_size_study`.
    """
    lab = _Lab(model, pairs, init, n_train, n_seeds, settings, relation, generator)
    chosen = _axis("layer_study", "layers", range(model.cfg.n_layers) if layers is None else layers)

    def measure(layer: int) -> list[_Asked]:
        there = init.at_layer(layer)
        vectors = tuple(lab.train([there] * n_seeds).vectors)
        return [_Asked("fine-tuned", layer, vectors), _Asked("untuned", layer, (there,))]

    asked, complete = _each(measure, chosen, "layers", progress)
    points = lab.points(asked, generator=lab.apart)
    references = {"no vector": lab.references()["no vector"]}
    return lab.study("layer", "Layer of the vector", "Added after layer", points, complete, references=references)


def scale_study(
    model: Any,
    pairs: Split | Relation,
    *,
    init: FunctionVector,
    scales: Sequence[float | int] = SCALES,
    n_train: int = 20,
    n_seeds: int = 3,
    settings: Settings | None = None,
    relation: str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Study:
    """A factor on the vector when it is added, trained (at factor 1) and untuned.

    Args:
        model, pairs, init, n_train, n_seeds, settings, relation, generator, progress: as for :func:`layer_study`.
        scales: the factors.

    Returns:
        :class:`Study` with the lines ``"fine-tuned"`` and ``"untuned"``; its norms are those of what is added.

    Raises:
        ValueError: no scales; as for :func:`training_size_study`.
    """
    lab = _Lab(model, pairs, init, n_train, n_seeds, settings, relation, generator)
    chosen = _axis("scale_study", "scales", scales)
    trained = lab.train([init] * n_seeds, progress=progress).vectors
    lines = {"fine-tuned": tuple(trained), "untuned": (init,)}
    asked = [
        _Asked(line, scale, tuple(scale * vector for vector in vectors))
        for scale in chosen
        for line, vectors in lines.items()
    ]
    points = lab.points(asked, progress=progress)
    references = {"no vector": lab.references()["no vector"]}
    return lab.study("scale", "Scale of the vector", "Factor on the vector", points, True, references=references)


def l2_study(
    model: Any,
    pairs: Split | Relation,
    *,
    init: FunctionVector,
    weights: Sequence[float | int] = WEIGHTS,
    anchors: Sequence[Anchor] = ("zero", "init"),
    n_train: int = 20,
    n_seeds: int = 3,
    settings: Settings | None = None,
    relation: str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Study:
    """The weight of ``||v - anchor||^2``, with both anchors.

    Args:
        model, pairs, init, n_train, n_seeds, settings, relation, generator, progress: as for :func:`layer_study`.
        weights: values of ``l2``. The figure's axis is logarithmic and leaves 0 out.
        anchors: ``"zero"``, ``"init"``, or both.

    Returns:
        :class:`Study` with a line an anchor, ``"to zero"`` and ``"to the start"``.

    Raises:
        ValueError: no weights, or a negative one; as for :func:`training_size_study`.
    """
    lab = _Lab(model, pairs, init, n_train, n_seeds, settings, relation, generator)
    names = {"zero": "to zero", "init": "to the start"}

    def measure(l2: float | int) -> list[Point]:
        found = []
        for anchor in anchors:
            held = dataclasses.replace(lab.settings, l2=float(l2), anchor=anchor)
            found.append(lab.point(names[anchor], l2, lab.train([init] * n_seeds, settings=held).vectors))
        return found

    points, complete = _each(measure, _axis("l2_study", "weights", weights), "l2", progress)
    return lab.study("l2", "l2 on the vector", "Weight of l2", points, complete, log_x=True)


def init_study(
    model: Any,
    pairs: Split | Relation,
    *,
    init: FunctionVector,
    n_train: int = 20,
    n_seeds: int = 5,
    settings: Settings | None = None,
    relation: str | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Study:
    """The start: the function vector, zero, or noise of the function vector's norm; top-1 after every epoch.

    The trainings are the same for the validation and the test pairs, which are only measured. All starts see the same
    training pairs in the same order. A patience in ``settings`` is not heeded.

    Args:
        model, pairs, init, n_train, n_seeds, settings, relation, generator, progress: as for :func:`layer_study`.

    Returns:
        :class:`Study` with the lines ``"function vector"``, ``"zero"`` and ``"noise"`` on the test pairs, and those
        with ``", validation"`` behind their names. Intervals are over seeds.

    Raises:
        ValueError: as for :func:`training_size_study`.
    """
    lab = _Lab(model, pairs, init, n_train, n_seeds, settings, relation, generator)
    starts = {
        "function vector": [init] * n_seeds,
        "zero": [lab.zero] * n_seeds,
        "noise": [random_vector_like(init, generator) for _ in range(n_seeds)],
    }
    order = generator.get_state()
    whole = dataclasses.replace(lab.settings, patience=None)

    def measure(part: Literal["test", "validation"]) -> list[Point]:
        watched = lab.split.test if part == "test" else lab.split.valid
        found = []
        for name, vectors in starts.items():
            again = torch.Generator()
            again.set_state(order)
            runs = lab.train(vectors, valid=watched, settings=whole, generator=again)
            top1 = torch.stack([run.history.valid_top1 for run in runs])
            norms = torch.stack([run.history.norm for run in runs]).mean(dim=0)
            line = name if part == "test" else f"{name}{VALIDATION}"
            for epoch, values in enumerate(top1.T):
                interval = bootstrap_interval(values, generator=generator)
                found.append(Point(line, epoch, float(values.mean()), interval, float(norms[epoch])))
        return found

    parts: list[Literal["test", "validation"]] = ["test", "validation"]
    points, complete = _each(measure, parts, "starts", progress)
    return lab.study(
        "init", "Start of the training", "Epoch", points, complete, intervals="95% bootstrap over seeds, test pairs"
    )


STUDIES: dict[str, Callable[..., Study]] = {
    "training-size": training_size_study,
    "layer": layer_study,
    "scale": scale_study,
    "l2": l2_study,
    "init": init_study,
}
"""Name on the command line -> study."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What becomes a :class:`Point`: one vector a seed, or one for all."""

    line: str
    x: float | int
    vectors: tuple[FunctionVector, ...]


class _Lab:
    """What the studies share: the split, the training pairs of each seed, training and asking."""

    def __init__(
        self,
        model: Any,
        pairs: Split | Relation,
        init: FunctionVector,
        n_train: int | None,
        n_seeds: int,
        settings: Settings | None,
        relation: str | None,
        generator: torch.Generator,
        *,
        train: float = 0.45,
    ) -> None:
        if n_seeds < 1:
            raise ValueError(f"study: expected n_seeds of at least 1, got {n_seeds}.")
        self.model, self.init, self.n_seeds, self.generator = model, init, n_seeds, generator
        self.relation = relation or (pairs.name if isinstance(pairs, Relation) else init.relation)
        self.settings = settings or Settings(template=init.template or "qa")
        self.split = pairs.split(generator, train=train) if isinstance(pairs, Relation) else pairs
        if not self.split.train or not self.split.test:
            raise ValueError("study: expected a split with training and test pairs, got none of one of them.")
        self.n_train = None if n_train is None else min(n_train, len(self.split.train))
        self.zero = dataclasses.replace(init, vector=torch.zeros_like(init.vector), heads=(), kind="zero")
        self.drawn: list[tuple[Pair, ...]] = []
        for _ in range(n_seeds):
            order = torch.randperm(len(self.split.train), generator=generator).tolist()
            self.drawn.append(tuple(self.split.train[i] for i in order))
        # for intervals that are drawn when all trainings are done, or as many as there were before an interruption
        self.apart = copied(generator)

    def train(
        self,
        starts: Sequence[FunctionVector],
        *,
        n_train: int | None = None,
        valid: Sequence[Pair] | None = None,
        settings: Settings | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> FineTunedSet:
        """One training a seed, all in one run. With ``n_train`` given there are no validation pairs.

        Raises:
            KeyboardInterrupt: it was interrupted; a part of the epochs is not handed out as all of them.
        """
        n = n_train or self.n_train
        own = settings or self.settings
        watched = self.split.valid if valid is None and n_train is None else valid or ()
        splits = {f"seed {i}": Split(pairs[:n], tuple(watched), (), "input") for i, pairs in enumerate(self.drawn)}
        how = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* was interrupted")  # said once, by the study
            return finished(
                finetune_many(
                    self.model, splits, init=list(starts), n_train=None, generator=generator or self.generator,
                    progress=progress, **how,
                )
            )  # fmt: skip

    def ask(
        self, pairs: Sequence[Pair], vectors: Sequence[FunctionVector | None], *, progress: bool = False
    ) -> Float[Tensor, "vector pair"]:
        """Whether each pair's answer is the most likely one under each vector, as 0 and 1."""
        bare = build_prompts(self.model, pairs, n_shots=0, template=self.settings.template, generator=torch.Generator())
        return (score(self.model, bare, vectors, progress=progress, what="study").ranks == 0).float()

    def points(
        self, asked: Sequence[_Asked], *, generator: torch.Generator | None = None, progress: bool = False
    ) -> list[Point]:
        """Measurements on the test pairs, all vectors together."""
        vectors = [vector for one in asked for vector in one.vectors]
        parts = self.ask(self.split.test, vectors, progress=progress).split([len(one.vectors) for one in asked])
        found = []
        for one, right in zip(asked, parts, strict=True):
            words = right.mean(dim=0)
            norm = sum(vector.norm() for vector in one.vectors) / len(one.vectors)
            interval = bootstrap_interval(words, generator=generator or self.generator)
            found.append(Point(one.line, one.x, float(words.mean()), interval, norm))
        return found

    def point(self, line: str, x: float | int, vectors: Iterable[FunctionVector]) -> Point:
        """A measurement on the test pairs, of one vector a seed or of one for all."""
        (found,) = self.points([_Asked(line, x, tuple(vectors))])
        return found

    def references(self) -> dict[str, float]:
        """Top-1 on the test pairs with the untuned vector and with none."""
        untuned, bare = self.ask(self.split.test, [self.init, None]).mean(dim=1).tolist()
        return {"untuned vector": untuned, "no vector": bare}

    def study(
        self,
        name: str,
        title: str,
        x_title: str,
        points: Sequence[Point],
        complete: bool,
        *,
        intervals: str = _WORDS,
        references: Mapping[str, float] | None = None,
        log_x: bool = False,
    ) -> Study:
        return Study(
            name=name,
            relation=self.relation,
            title=title,
            x_title=x_title,
            points=tuple(points),
            references=self.references() if references is None else references,
            intervals=intervals,
            n_seeds=self.n_seeds,
            n_train=self.n_train,
            n_test=len(self.split.test),
            log_x=log_x,
            complete=complete,
        )


def _steps(n_pairs: int, settings: Settings) -> int:
    """Steps in an epoch."""
    return math.ceil(n_pairs / (settings.batch_size or n_pairs))


def _axis(function: str, name: str, values: Iterable[Any]) -> list[Any]:
    found = sorted(set(values))
    if not found:
        raise ValueError(f"{function}: expected at least one of {name}, got none.")
    return found


def _each(
    measure: Callable[[Any], list[_Made]], values: Sequence[Any], what: str, progress: bool
) -> tuple[list[_Made], bool]:
    """The measurements at each value, as far as it went without an interruption."""
    points: list[list[_Made]] = []
    with keeping(lambda: len(points), len(values), "the study", f"{what} are done", stacklevel=3) as loop:
        for value in tqdm(values, desc=what, disable=not progress, leave=False):
            points.append(measure(value))
    return [point for at_value in points for point in at_value], loop.complete
