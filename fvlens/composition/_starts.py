"""What the vectors of a basis are trained from: function vectors of many relations, at the cost of a few.

1. *Heads*: ranked once, by their indirect effect averaged over a few of the relations.
2. *Means*: every relation's own, over a few clean prompts.
3. *Layer*: the one at which the vectors of those few relations do best together on their validation pairs.
4. *Scale*: every relation's own at that layer, likewise.

:func:`fvlens.find_vector` on every relation alone takes heads, layer and scale for each, which costs far more than
training from there.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fvlens.activations import HeadMeans
from fvlens.evaluation import LayerScaleSweep, copied
from fvlens.find import best_place, relation_effects, task_means
from fvlens.progress import tqdm
from fvlens.prompts import Template
from fvlens.relations import Split
from fvlens.types import Head
from fvlens.vectors import FunctionVector

N_RANKED = 8
"""Relations, spread over the basis, on which heads are ranked and the layer is chosen."""
N_HEADS = 10
"""As many as :func:`fvlens.find_vector` takes."""
N_SHOTS = 10
"""Demonstrations in a prompt, where there are so many pairs."""
N_PROMPTS, N_CORRUPTED = 20, 10
"""Prompts of each relation behind its means, and behind the effects of heads."""


def basis_starts(
    model: Any,
    splits: Mapping[str, Split],
    *,
    layer: int | None = None,
    template: Template | str = "qa",
    generator: torch.Generator,
    progress: bool = True,
) -> dict[str, FunctionVector]:
    """A function vector of each relation, with its best scale, all of the same heads and at the same layer.

    Args:
        model: the model.
        splits: pairs by relation: demonstrations of the train part, queries and choices of the validation part.
        layer: where all are; by default the best for :data:`N_RANKED` relations together, in mean top-1, then in mean
            probability of the answer, each with its best scale there.
        template: how prompts are written.
        generator: draws the prompts.
        progress: show a bar.

    Raises:
        KeyboardInterrupt: interrupted; there is no start of a part.
    """
    ranked = list(splits)[:: -(-len(splits) // N_RANKED)]
    n_shots = {name: min(N_SHOTS, len(split.train)) for name, split in splits.items()}
    drawn: dict[str, Any] = dict(n_prompts=N_PROMPTS, template=template, generator=generator, progress=False)
    means: dict[str, HeadMeans] = {}
    effects = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    with tqdm(total=len(splits) + len(ranked), desc="function vectors", disable=not progress, leave=False) as bar:
        for name in ranked:
            means[name], found = relation_effects(
                model, splits[name], relation=name, n_shots=n_shots[name], n_corrupted=N_CORRUPTED, **drawn
            )
            effects += found.aie
            bar.update()
        order = effects.flatten().argsort(descending=True, stable=True)[:N_HEADS].tolist()
        heads = [Head(*divmod(i, model.cfg.n_heads)) for i in order]

        def placed(name: str, layers: list[int] | None) -> tuple[FunctionVector, LayerScaleSweep]:
            return best_place(
                model, means[name], heads, splits[name].valid, layers=layers, relation=name,
                generator=copied(generator), progress=False,
            )  # fmt: skip

        tried = {name: placed(name, None if layer is None else [layer]) for name in ranked}
        if layer is None:
            layer = _best_together([sweep for _, sweep in tried.values()])
        starts = {}
        for name, split in splits.items():
            if name not in tried:
                means[name] = task_means(model, split, relation=name, n_shots=n_shots[name], **drawn)
                tried[name] = placed(name, [layer])
            vector, sweep = tried[name]
            starts[name] = vector.at_layer(layer) * sweep.best_scale_at(layer)
            bar.update()
    return starts


def _best_together(sweeps: list[LayerScaleSweep]) -> int:
    """The layer of the best mean top-1, each relation with its best scale there; of equals by probability."""

    def together(at: int) -> tuple[float, float]:
        best = [sweep.at(at, sweep.best_scale_at(at)) for sweep in sweeps]
        return sum(one.top1 for one in best) / len(best), sum(one.probability for one in best) / len(best)

    return max(sweeps[0].layers, key=together)  # of equals the lowest
