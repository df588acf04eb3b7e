"""Sweeps: where a vector works, and how many heads it needs. All changes of a sweep go up together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.activations import HeadMeans
from fvlens.arguments import check_arguments
from fvlens.evaluation._evaluate import SHARE_AXIS, Evaluation, evaluations
from fvlens.evaluation._prompting import Asked, Options, asked_prompts, running
from fvlens.interruption import marked, titled
from fvlens.metrics import Interval
from fvlens.models import Fingerprint
from fvlens.prompts import Prompts
from fvlens.results import Result
from fvlens.scoring import score
from fvlens.showing import as_said, number, span
from fvlens.types import Head, HeadLike, Steering, as_heads
from fvlens.vectors import FunctionVector, function_vector

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

COUNTS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50)
"""Head counts that :func:`head_count_sweep` visits by default, as far as the ranking goes."""


def run_sweep(
    model: Any,
    prompts: Prompts,
    vectors: Sequence[Steering],
    what: str,
    scales: Sequence[float | int] | float | int,
    generator: torch.Generator,
    progress: bool,
    options: Options,
) -> tuple[tuple[Evaluation, ...], Evaluation, bool]:
    """Each vector's evaluation, that without a vector, and whether all queries are finished."""
    changes = [*vectors, None]
    each = [*scales, 1.0] if isinstance(scales, Sequence) else [scales] * len(changes)
    scores = score(
        model, prompts, changes, scales=each, interruptible=True, progress=progress, what=what, **running(options)
    )
    *found, baseline = evaluations(model, prompts, changes, each, scores, generator, options.get("compute"))
    return tuple(found), baseline, scores.complete


def best_of(evaluations: Sequence[Evaluation]) -> int:
    """Index of the largest top-1; ties go to the larger mean probability of the answer, then to the first."""
    return max(range(len(evaluations)), key=lambda i: (evaluations[i].top1, evaluations[i].probability, -i))


def sweep_dataframe(
    name: str, coordinates: Sequence[int | float], evaluations: Sequence[Evaluation], complete: bool
) -> "pd.DataFrame":
    """One row a coordinate, named ``name``, with its scores; of a part it says so."""
    import pandas as pd

    rows = [
        {
            name: coordinate,
            "top1": one.top1,
            "low": one.interval.low,
            "high": one.interval.high,
            "top5": one.top5,
            "mean_rank": one.mean_rank,
            "probability": one.probability,
            "log_probability": one.answer_log_probability,
            "n": one.n,
            "exact": one.exact,
        }
        for coordinate, one in zip(coordinates, evaluations, strict=True)
    ]
    return marked(pd.DataFrame(rows), complete)


class _Sweep(Result):
    """What sweeps over one coordinate share: scores at each of its values, in increasing order."""

    __slots__ = ()
    evaluations: tuple[Evaluation, ...]
    baseline: Evaluation
    complete: bool

    @property
    def top1(self) -> Float[Tensor, " coordinate"]:
        """Top-1 accuracy at each value."""
        return torch.tensor([one.top1 for one in self.evaluations])

    @property
    def probability(self) -> Float[Tensor, " coordinate"]:
        """Mean probability of the answer's first token at each value."""
        return torch.tensor([one.probability for one in self.evaluations])

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """95% bootstrap interval of :attr:`top1` at each value."""
        return tuple(one.interval for one in self.evaluations)

    def _made_on(self) -> Fingerprint | None:
        return self.evaluations[0].fingerprint

    def _check_loaded(self) -> None:
        if not self.evaluations or len(self._coordinates()) != len(self.evaluations):
            raise ValueError(
                f"expected {len(self._coordinates())} evaluations, at least one; got {len(self.evaluations)}."
            )

    def _coordinates(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _swept(self, best: int, name: str) -> str:
        part = "" if self.complete else ", interrupted"
        return (
            f"{self.baseline.name}, {self.baseline.setting}, n={self.baseline.n}, {len(self.evaluations)} {name}, best "
            f"{best} with top1={max(one.top1 for one in self.evaluations):.3f}, without {self.baseline.top1:.3f}{part}"
        )

    def _scores(self, name: str) -> list[tuple[str, ...]]:
        pairs = [("no vector", self.baseline), *zip(self._coordinates(), self.evaluations, strict=True)]
        return [(name, "top-1", "interval"), *((str(x), number(e.top1), span(*e.interval[:2])) for x, e in pairs)]

    def _plot(self, coordinates: Sequence[int], marked: int, x_title: str, what: str) -> "Figure":
        """Top-1 over the values with its interval, one of them marked, and top-1 without a vector for comparison."""
        from fvlens import plots

        return plots.line_sweep(
            list(coordinates),
            [one.top1 for one in self.evaluations],
            [one.interval.low for one in self.evaluations],
            [one.interval.high for one in self.evaluations],
            x_title=x_title,
            y_title="Top-1",
            title=titled(
                f"{what}, {self.baseline.name} ({as_said(self.baseline.setting)}, {self.baseline.n} queries)",
                self.complete,
            ),
            level=self.baseline.interval.level,
            references={"no vector": self.baseline.top1},
            marked=marked,
            y_range=SHARE_AXIS,
        )


@dataclass(frozen=True, slots=True, repr=False)
class LayerSweep(_Sweep):
    """Scores with a vector added after each of several layers, all on the same prompts.

    Attributes:
        layers: the layers, in increasing order.
        evaluations: the scores at each layer.
        baseline: the scores without a vector on the same prompts.
        complete: False if the sweep was interrupted; the evaluations are then of the queries that were finished.
    """

    FORMAT: ClassVar[str] = "fvlens-layer-sweep-1"

    layers: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    baseline: Evaluation
    complete: bool

    @property
    def best_layer(self) -> int:
        """Layer of the largest top-1; ties go to the larger mean probability of the answer, then to the lower layer."""
        return self.layers[best_of(self.evaluations)]

    def _coordinates(self) -> tuple[int, ...]:
        return self.layers

    def _line(self) -> str:
        return self._swept(self.best_layer, "layers")

    def _cells(self) -> list[tuple[str, ...]]:
        return self._scores("layer")

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a layer: ``layer, top1, low, high, top5, mean_rank, probability, log_probability, n,
        exact``."""
        return sweep_dataframe("layer", self.layers, self.evaluations, self.complete)

    def plot(self) -> "Figure":
        """Top-1 over layers with its interval, the best layer marked, and top-1 without a vector for comparison."""
        return self._plot(self.layers, self.best_layer, "Injected after layer", "Layer sweep")


def layer_sweep(
    model: Any,
    pairs: Asked,
    vector: FunctionVector | Mapping[int, Steering],
    *,
    layers: Sequence[int] | None = None,
    scale: float | int = 1.0,
    generator: torch.Generator,
    progress: bool = True,
    **options: Unpack[Options],
) -> LayerSweep:
    """Where a vector works: scores with the vector added after each layer.

    Choose the layer on validation pairs and report it on test pairs. Every layer sees the same prompts, and its numbers
    are those of :func:`evaluate` with ``vector.at_layer(layer)`` and a generator of the same seed.

    Args:
        model: the model.
        pairs: the pairs asked, or prompts that were built before.
        vector: one vector, moved from layer to layer, or one steering for each layer.
        layers: layers to visit; by default all of the model, or all that ``vector`` maps.
        scale: factor on the vector.
        generator: draws the demonstrations first, then the bootstrap.
        progress: show a progress bar. Interrupting returns the queries that are finished at all layers, with a warning.
        options: how pairs are asked and prompts are run, as for :func:`evaluate`.

    Returns:
        :class:`LayerSweep`.

    Raises:
        ValueError: as for :func:`evaluate`; no layers; a layer that the model does not have or that ``vector`` does not
            map; a vector that cannot be moved (a distributed one), given without a map.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, split.train, n_prompts=8, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> vec = fvlens.function_vector(model, means, heads=[(1, 0), (1, 3)], layer=1)
        >>> sweep = fvlens.layer_sweep(model, split.valid, vec, generator=g, progress=False)
        >>> sweep.best_layer in sweep.layers
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (accuracy by layer of injection).
    """
    check_arguments(layer_sweep, locals(), runs=True)
    by_layer = steering_by_layer("layer_sweep", model, vector, layers)
    vectors = list(by_layer.values())
    prompts = asked_prompts("layer_sweep", model, pairs, options, generator, vectors[0])
    found, baseline, complete = run_sweep(
        model, prompts, vectors, "layer sweep", scale, generator, progress, options,
    )  # fmt: skip
    return LayerSweep(layers=tuple(by_layer), evaluations=found, baseline=baseline, complete=complete)


def steering_by_layer(
    function: str, model: Any, vector: FunctionVector | Mapping[int, Steering], layers: Sequence[int] | None
) -> dict[int, Steering]:
    """The steering of each layer that a sweep visits, in increasing order of layers."""
    if isinstance(vector, Mapping):
        every = {int(layer): steering for layer, steering in vector.items()}
    elif hasattr(vector, "at_layer"):
        every = {layer: vector.at_layer(layer) for layer in range(model.cfg.n_layers)}
    else:
        raise ValueError(
            f"{function}: expected a vector with at_layer(), or a map from layer to vector, got "
            f"{type(vector).__name__}."
        )
    chosen = sorted(every if layers is None else set(layers))
    if not chosen:
        raise ValueError(f"{function}: expected at least one layer, got none.")
    outside = [layer for layer in chosen if layer not in every or not 0 <= layer < model.cfg.n_layers]
    if outside:
        raise ValueError(
            f"{function}: no vector for layer {outside[0]}; the model has layers 0..{model.cfg.n_layers - 1}, and "
            f"there are vectors for {sorted(every)}."
        )
    return {layer: every[layer] for layer in chosen}


@dataclass(frozen=True, slots=True, repr=False)
class HeadCountSweep(_Sweep):
    """Scores with the vector of the first n heads of a ranking, for several n, all on the same prompts.

    Attributes:
        counts: the numbers of heads, in increasing order.
        evaluations: the scores with that many heads.
        baseline: the scores without a vector on the same prompts.
        ranking: the heads, best first.
        layer: the vectors were added after this layer.
        complete: False if the sweep was interrupted; the evaluations are then of the queries that were finished.
    """

    FORMAT: ClassVar[str] = "fvlens-head-count-sweep-1"

    counts: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    baseline: Evaluation
    ranking: tuple[Head, ...]
    layer: int
    complete: bool

    @property
    def best_count(self) -> int:
        """Number of heads with the largest top-1; ties go to the larger mean probability, then to fewer heads."""
        return self.counts[best_of(self.evaluations)]

    def _coordinates(self) -> tuple[int, ...]:
        return self.counts

    def _line(self) -> str:
        return self._swept(self.best_count, "counts of heads")

    def _cells(self) -> list[tuple[str, ...]]:
        return self._scores("heads")

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a count: ``n_heads, top1, low, high, top5, mean_rank, probability, log_probability, n,
        exact``."""
        return sweep_dataframe("n_heads", self.counts, self.evaluations, self.complete)

    def plot(self) -> "Figure":
        """Top-1 over the number of heads with its interval, the best marked, and top-1 without a vector."""
        return self._plot(self.counts, self.best_count, "Heads in the vector", "Head-count sweep")


def head_count_sweep(
    model: Any,
    pairs: Asked,
    means: HeadMeans,
    ranking: Sequence[HeadLike],
    layer: int,
    *,
    counts: Sequence[int] | None = None,
    scale: float | int = 1.0,
    generator: torch.Generator,
    progress: bool = True,
    **options: Unpack[Options],
) -> HeadCountSweep:
    """How many heads a vector needs: scores with the vector of the first n heads of a ranking.

    ``v_n = sum over the first n heads of mean z_{l,h} @ W_O[l,h]``, added after ``layer``.

    Args:
        model: the model.
        pairs: the pairs asked, or prompts that were built before.
        means: task means at the last token.
        ranking: heads, best first, such as ``effects.top(20)``.
        layer: the vectors are added after this layer.
        counts: numbers of heads; by default 1, 2, 3, 5, 8, 10, 15, 20, 30, 50 as far as the ranking goes.
        scale: factor on the vector.
        generator: draws the demonstrations first, then the bootstrap.
        progress: show a progress bar. Interrupting returns the queries that are finished at all counts, with a warning.
        options: how pairs are asked and prompts are run, as for :func:`evaluate`.

    Returns:
        :class:`HeadCountSweep`.

    Raises:
        ValueError: as for :func:`evaluate` and :func:`~fvlens.function_vector`; an empty ranking; no counts, or a count
            below 1 or beyond the ranking.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, split.train, n_prompts=8, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> ranking = [(1, 0), (1, 3), (2, 1)]
        >>> fvlens.head_count_sweep(model, split.valid, means, ranking, 1, generator=g, progress=False).counts
        (1, 2, 3)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3 (the number of heads in the set A).
    """
    check_arguments(head_count_sweep, locals(), runs=True)
    heads = as_heads(ranking, model.cfg.n_layers, model.cfg.n_heads, "head_count_sweep: ranking")
    if not heads:
        raise ValueError("head_count_sweep: expected a ranking of at least one head, got none.")
    chosen = sorted({count for count in COUNTS if count <= len(heads)} if counts is None else set(counts))
    if not chosen or chosen[0] < 1 or chosen[-1] > len(heads):
        raise ValueError(
            f"head_count_sweep: expected counts in 1..{len(heads)} (the ranking's length), got {list(counts or ())}."
        )
    vectors = [function_vector(model, means, heads=heads[:count], layer=layer) for count in chosen]
    prompts = asked_prompts("head_count_sweep", model, pairs, options, generator, means)
    found, baseline, complete = run_sweep(
        model, prompts, vectors, "head-count sweep", scale, generator, progress, options,
    )  # fmt: skip
    return HeadCountSweep(
        counts=tuple(chosen),
        evaluations=found,
        baseline=baseline,
        ranking=tuple(heads),
        layer=layer,
        complete=complete,
    )
