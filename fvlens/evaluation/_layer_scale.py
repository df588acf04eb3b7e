"""Layer and scale together: where a vector works, and how strongly it is to be added there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.evaluation._evaluate import SHARE_AXIS, Evaluation
from fvlens.evaluation._prompting import Asked, Options, asked_prompts
from fvlens.evaluation._sweeps import LayerSweep, run_sweep, steering_by_layer, sweep_dataframe
from fvlens.interruption import titled
from fvlens.metrics import Interval
from fvlens.models import Fingerprint
from fvlens.results import Result
from fvlens.showing import as_said, number
from fvlens.types import Steering
from fvlens.vectors import FunctionVector

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Factors on the vector that :func:`layer_scale_sweep` visits by default."""


@dataclass(frozen=True, slots=True, repr=False)
class LayerScaleSweep(Result):
    """Scores with a vector added after each of several layers, times each of several factors, on the same prompts.

    Attributes:
        layers: the layers, in increasing order.
        scales: the factors, in increasing order.
        evaluations: the scores, ``[layer][scale]``.
        baseline: the scores without a vector on the same prompts.
        complete: False if the sweep was interrupted; the evaluations are then of the queries that were finished.
    """

    FORMAT: ClassVar[str] = "fvlens-layer-scale-sweep-1"

    layers: tuple[int, ...]
    scales: tuple[float, ...]
    evaluations: tuple[tuple[Evaluation, ...], ...]
    baseline: Evaluation
    complete: bool

    @property
    def top1(self) -> Float[Tensor, "layer scale"]:
        """Top-1 accuracy."""
        return torch.tensor([[one.top1 for one in row] for row in self.evaluations])

    @property
    def probability(self) -> Float[Tensor, "layer scale"]:
        """Mean probability of the answer's first token."""
        return torch.tensor([[one.probability for one in row] for row in self.evaluations])

    @property
    def intervals(self) -> tuple[tuple[Interval, ...], ...]:
        """95% bootstrap intervals of :attr:`top1`, ``[layer][scale]``."""
        return tuple(tuple(one.interval for one in row) for row in self.evaluations)

    @property
    def best_place(self) -> tuple[int, float]:
        """Layer and scale of the largest top-1.

        Ties go to the larger mean probability of the answer, then to the scale nearer to 1, then to the lower layer,
        then to the smaller scale.
        """
        return self._best_of(self.layers)

    def _best_of(self, layers: Sequence[int]) -> tuple[int, float]:
        def order(place: tuple[int, float]) -> tuple[float, float, float, int, float]:
            layer, scale = place
            found = self.at(layer, scale)
            return found.top1, found.probability, -abs(scale - 1), -layer, -scale

        return max(((layer, scale) for layer in layers for scale in self.scales), key=order)

    def best_scale_at(self, layer: int) -> float:
        """Scale of the largest top-1 at a layer; ties as for :attr:`best_place`.

        Raises:
            ValueError: the sweep did not visit that layer.
        """
        return self._best_of([layer])[1]

    @property
    def best_layer(self) -> int:
        """Layer of :attr:`best_place`."""
        return self.best_place[0]

    @property
    def best_scale(self) -> float:
        """Scale of :attr:`best_place`."""
        return self.best_place[1]

    @property
    def best(self) -> Evaluation:
        """The scores at :attr:`best_place`."""
        return self.at(*self.best_place)

    def at(self, layer: int, scale: float | int) -> Evaluation:
        """The scores at a layer and scale.

        Raises:
            ValueError: the sweep did not visit them.
        """
        if layer not in self.layers or scale not in self.scales:
            raise ValueError(
                f"the sweep visited layers {list(self.layers)} and scales {list(self.scales)}, not layer {layer} with "
                f"scale {scale}."
            )
        return self.evaluations[self.layers.index(layer)][self.scales.index(scale)]

    def at_scale(self, scale: float | int) -> LayerSweep:
        """The sweep over layers with one of the scales.

        Raises:
            ValueError: the sweep did not visit that scale.
        """
        found = tuple(self.at(layer, scale) for layer in self.layers)
        return LayerSweep(layers=self.layers, evaluations=found, baseline=self.baseline, complete=self.complete)

    def _made_on(self) -> Fingerprint | None:
        return self.evaluations[0][0].fingerprint

    def _check_loaded(self) -> None:
        if [len(row) for row in self.evaluations] != [len(self.scales)] * len(self.layers) or not self.evaluations:
            raise ValueError(f"expected {len(self.layers)} x {len(self.scales)} evaluations.")

    def _line(self) -> str:
        layer, scale = self.best_place
        part = "" if self.complete else ", interrupted"
        return (
            f"{self.baseline.name}, {self.baseline.setting}, n={self.baseline.n}, {len(self.layers)} layers x "
            f"{len(self.scales)} scales, best layer {layer} and scale {scale:g} with top1={self.best.top1:.3f}, "
            f"without {self.baseline.top1:.3f}{part}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        rows = zip(self.layers, self.evaluations, strict=True)
        return [
            ("layer", *(f"{scale:g} v" for scale in self.scales)),
            *((str(layer), *(number(one.top1) for one in row)) for layer, row in rows),
        ]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a layer and scale: ``layer, scale``, then the columns of :meth:`LayerSweep.to_dataframe`."""
        import pandas as pd

        parts = []
        for layer, row in zip(self.layers, self.evaluations, strict=True):
            part = sweep_dataframe("scale", self.scales, row, self.complete)
            part.insert(0, "layer", layer)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def plot(self) -> "Figure":
        """Top-1 over layers, a line a scale with its interval, and top-1 without a vector for comparison."""
        from fvlens import plots

        layer, scale = self.best_place
        rows = {f"{scale:g} v": self.at_scale(scale).evaluations for scale in self.scales}
        return plots.curves(
            list(self.layers),
            {name: [one.top1 for one in row] for name, row in rows.items()},
            {
                name: ([one.interval.low for one in row], [one.interval.high for one in row])
                for name, row in rows.items()
            },
            x_title="Injected after layer",
            y_title="Top-1",
            title=titled(
                f"Layer and scale, {self.baseline.name} ({as_said(self.baseline.setting)}, {self.baseline.n} queries)",
                self.complete,
            ),
            note=f"Best: {scale:g} v after layer {layer}. "
            f"Bands: {self.baseline.interval.level:.0%} bootstrap over queries",
            references={"no vector": self.baseline.top1},
            y_range=SHARE_AXIS,
        )


def layer_scale_sweep(
    model: Any,
    pairs: Asked,
    vector: FunctionVector | Mapping[int, Steering],
    *,
    layers: Sequence[int] | None = None,
    scales: Sequence[float | int] = SCALES,
    generator: torch.Generator,
    progress: bool = True,
    **options: Unpack[Options],
) -> LayerScaleSweep:
    """Where a vector works and how strongly it is added there: scores at each layer and scale.

    Choose both on validation pairs and report them on test pairs. Every cell sees the same prompts, and its numbers are
    those of :func:`evaluate` with ``vector.at_layer(layer)``, ``scale`` and a generator of the same seed.

    Args:
        model: the model.
        pairs: the pairs asked, or prompts that were built before.
        vector: one vector, moved from layer to layer, or one steering for each layer.
        layers: layers to visit; by default all of the model, or all that ``vector`` maps.
        scales: factors on the vector.
        generator: draws the demonstrations first, then the bootstrap.
        progress: show a progress bar. Interrupting returns the queries that are finished in all cells, with a warning.
        options: how pairs are asked and prompts are run, as for :func:`evaluate`.

    Returns:
        :class:`LayerScaleSweep`.

    Raises:
        ValueError: as for :func:`layer_sweep`; no scales, or one that is not finite.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.evaluation import layer_scale_sweep
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, split.train, n_prompts=8, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> vec = fvlens.function_vector(model, means, heads=[(1, 0), (1, 3)], layer=1)
        >>> sweep = layer_scale_sweep(model, split.valid, vec, scales=(1, 2), generator=g, progress=False)
        >>> tuple(sweep.top1.shape)
        (4, 2)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (accuracy by layer of injection); the scales are our choice.
    """
    check_arguments(layer_scale_sweep, locals(), runs=True)
    factors = sorted({float(scale) for scale in scales})
    if not factors or not all(map(math.isfinite, factors)):
        raise ValueError(f"layer_scale_sweep: expected at least one scale, all finite, got {list(scales)}.")
    by_layer = steering_by_layer("layer_scale_sweep", model, vector, layers)
    places = [(layer, factor) for layer in by_layer for factor in factors]
    prompts = asked_prompts("layer_scale_sweep", model, pairs, options, generator, next(iter(by_layer.values())))
    found, baseline, complete = run_sweep(
        model, prompts, [by_layer[layer] for layer, _ in places], "layer and scale sweep",
        [factor for _, factor in places], generator, progress, options,
    )  # fmt: skip
    n = len(factors)
    rows = tuple(found[i * n : (i + 1) * n] for i in range(len(by_layer)))
    return LayerScaleSweep(tuple(by_layer), tuple(factors), rows, baseline, complete)
