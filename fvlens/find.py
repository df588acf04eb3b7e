"""The recipe, once: from word pairs to the function vector that does their task.

1. *Split*: train pairs for demonstrations, validation pairs for queries and choices, test pairs for nobody here.
2. *Means*: every head's mean output over clean prompts.
3. *Heads*: every head's indirect effect on prompts with corrupted demonstrations, of the one corruption asked for.
4. *Vector*: the sum of the best heads' mean outputs.
5. *Place*: the layer after which, and the scale with which, it does best on the bare validation queries.

:func:`find_vector` takes all steps; :func:`relation_effects` (2 and 3) and :func:`best_place` (4 and 5) are its halves,
for those who need one alone.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, get_args, runtime_checkable

import torch

from fvlens.activations import HeadMeans, mean_head_activations
from fvlens.arguments import check_arguments
from fvlens.attribution import IndirectEffects, Method, indirect_effects
from fvlens.evaluation import SCALES, Evaluation, LayerScaleSweep, copied, layer_scale_sweep
from fvlens.models import Fingerprint
from fvlens.prompts import LABELS, Labels, Template, build_prompts, template_for, template_or
from fvlens.relations import Pair, Pairs, Split, as_relation
from fvlens.results import Result
from fvlens.showing import named
from fvlens.suffix import Route
from fvlens.types import Head, HeadLike, as_heads
from fvlens.vectors import FunctionVector, function_vector

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

Ranking = Literal["permuted", "random"]
"""The corruption on which heads are ranked, of those that the commands offer."""
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)


@runtime_checkable
class _Interruptible(Protocol):
    @property
    def complete(self) -> bool: ...


_Part = TypeVar("_Part", bound=_Interruptible)


def finished(part: _Part) -> _Part:
    """The part, unless it was interrupted: a result must not pass off some of its prompts or layers as all of them."""
    if not part.complete:
        raise KeyboardInterrupt
    return part


@dataclass(frozen=True, slots=True, repr=False)
class Found(Result):
    """A function vector, and all that led to it.

    Attributes:
        split: the pairs. Those of the test part took no part.
        means: every head's mean output over clean prompts of the train and validation pairs.
        effects: every head's indirect effect; None if the heads were given.
        sweep: scores on the bare validation queries at each layer and scale.
        unscaled: the vector at the chosen layer, before it was scaled.
        vector: the vector at the chosen layer, with the chosen scale in it.
        cautions: what must be said of the choice; empty if nothing.
    """

    FORMAT: ClassVar[str] = "fvlens-found-1"

    split: Split
    means: HeadMeans
    effects: IndirectEffects | None
    sweep: LayerScaleSweep
    unscaled: FunctionVector
    vector: FunctionVector
    cautions: tuple[str, ...]

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads in the vector, best first."""
        return self.vector.heads

    @property
    def layer(self) -> int:
        """The chosen layer."""
        return self.sweep.best_layer

    @property
    def scale(self) -> float:
        """The chosen scale, which :attr:`vector` has in it."""
        return self.sweep.best_scale

    @property
    def valid(self) -> Evaluation:
        """Scores of the vector on the validation pairs. It was chosen on them: its scores on test pairs are lower."""
        return self.sweep.best

    @property
    def at_scale_one(self) -> Evaluation | None:
        """Scores on the validation pairs at scale 1, at the best layer for that; None if 1 was not among the scales."""
        if 1 not in self.sweep.scales:
            return None
        found = self.sweep.at_scale(1)
        return self.sweep.at(found.best_layer, 1)

    @property
    def vector_at_scale_one(self) -> FunctionVector | None:
        """The vector as it is, at the best layer for that; None if 1 was not among the scales."""
        if 1 not in self.sweep.scales:
            return None
        return self.unscaled.at_layer(self.sweep.at_scale(1).best_layer)

    def _made_on(self) -> Fingerprint | None:
        return self.vector.fingerprint

    def _line(self) -> str:
        one = self.at_scale_one
        beside = "" if one is None else f"; at scale 1 {one.top1:.3f}"
        return (
            f"{named(self.vector.relation)}: {len(self.heads)} heads, layer {self.layer}, scale {self.scale:g}, top1 "
            f"on {self.valid.n} validation queries {self.valid.top1:.3f}{beside}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return self.sweep._cells()

    def to_dataframe(self) -> "pd.DataFrame":
        """The sweep's: one row a layer and scale."""
        return self.sweep.to_dataframe()

    def plot(self) -> "Figure":
        """The sweep's: top-1 over layers, a line a scale."""
        return self.sweep.plot()


def find_vector(
    model: Any,
    pairs: Pairs | Split,
    *,
    labels: Labels = "permuted",
    n_heads: int = 10,
    heads: Iterable[HeadLike] | None = None,
    n_shots: int = 10,
    n_prompts: int = 100,
    n_corrupted: int = 25,
    method: Method = "exact",
    recheck: int | None = None,
    layers: Sequence[int] | None = None,
    scales: Sequence[float | int] = SCALES,
    template: str | Template | None = None,
    relation: str | None = None,
    means: HeadMeans | None = None,
    path: Route | None = None,
    max_memory: int | None = None,
    seed: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Found:
    """The function vector of a task, from its word pairs alone.

    ``v = scale * sum over the heads of mean z_{l,h} @ W_O[l,h]``, of the heads with the largest average indirect effect
    [paper]. Layer and scale are those of the largest top-1 on the bare validation queries; ties go to the larger mean
    probability of the answer, then to the scale nearer to 1, then to the lower layer. The source takes the layer a
    third of the way up and no scale; both choices are ours. Test pairs are not looked at.

    Args:
        model: the model.
        pairs: pairs in any shape, the name of a library relation or a file (:func:`fvlens.relations.as_relation`),
            split here; or a :class:`~fvlens.relations.Split`, used as it is.
        labels: the one corruption that heads are ranked on: ``"permuted"``, ``"deranged"`` or ``"random"``.
        n_heads: heads in the vector.
        heads: take these heads and rank none.
        n_shots: demonstrations in a prompt.
        n_prompts: clean prompts behind the task means.
        n_corrupted: corrupted prompts behind the indirect effects.
        method: ``"exact"``, or a screen, as for :func:`~fvlens.indirect_effects`.
        recheck: best heads of a screen that are run again exactly; by default twice ``n_heads``.
        layers: layers to choose from; by default all.
        scales: factors to choose from.
        template: how prompts are written; by default that of ``means`` if given, else ``"qa"``.
        relation: the task's name, for the record; by default that of ``pairs``.
        means: task means that are there already; no clean prompts are drawn then.
        path, max_memory: of effects and scores, as for :func:`~fvlens.indirect_effects` and :func:`~fvlens.evaluate`.
        seed: recorded with the vector.
        generator: draws the split, the clean prompts and the corrupted prompts, in this order. The intervals are drawn
            from a copy of it, and move nothing that is drawn later.
        progress: show progress bars.

    Returns:
        :class:`Found`: ``.vector`` (its scale in it), ``.scale``, ``.layer``, ``.heads``, ``.means``, ``.effects``,
        ``.sweep``, ``.split``, ``.valid`` and ``.at_scale_one`` (scores on the validation pairs), ``.cautions``.

    Raises:
        ValueError: pairs that cannot be read or split, no train or validation pairs; ``labels="true"``; more heads than
            the model has; ``method`` or ``recheck`` beside ``heads``; no layers or scales, or such as the model does
            not have; whatever the steps refuse.
        KeyboardInterrupt: the computation was interrupted; a part is not handed out as the whole.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> found = fvlens.find_vector(model, "antonym", n_prompts=20, n_corrupted=5, generator=g, progress=False)
        >>> score = fvlens.evaluate(model, found.split.test, vector=found.vector, generator=g)
        >>> score.top1 > 0.5
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3.
    """
    check_arguments(find_vector, locals(), runs=True)
    total = model.cfg.n_layers * model.cfg.n_heads
    chosen = None if heads is None else as_heads(heads, model.cfg.n_layers, model.cfg.n_heads)
    if chosen is not None and (method != "exact" or recheck):
        raise ValueError(
            f"find_vector: method={method!r} and recheck={recheck} say how to rank heads, but heads= gives them; leave "
            "one of them out."
        )
    if chosen is None and not 1 <= n_heads <= total:
        raise ValueError(f"find_vector: expected n_heads between 1 and {total} (all heads), got {n_heads}.")
    if labels == "true" or labels not in LABELS:
        corruptions = ", ".join(name for name in LABELS if name != "true")
        raise ValueError(f"find_vector: labels={labels!r}; expected a corruption, one of {corruptions}.")
    if n_corrupted < 1 or n_shots < 1:
        raise ValueError(
            f"find_vector: expected n_corrupted and n_shots of at least 1, got {n_corrupted} and {n_shots}."
        )
    split, name = _split_of(pairs, relation, generator)
    written = template_for(model, template_or(template, None if means is None else means.template))
    shared: dict[str, Any] = {"path": path, "max_memory": max_memory, "progress": progress}

    effects = None
    if chosen is None:
        if method != "exact" and recheck is None:
            recheck = min(2 * n_heads, total)
        means, effects = relation_effects(
            model, split, relation=name, labels=labels, n_shots=n_shots, n_prompts=n_prompts, n_corrupted=n_corrupted,
            template=written, means=means, method=method, recheck=recheck or 0, generator=generator, **shared,
        )  # fmt: skip
        chosen = effects.ranking[:n_heads]
    elif means is None:
        means = task_means(
            model, split, relation=name, n_shots=n_shots, n_prompts=n_prompts, template=written, generator=generator,
            progress=progress,
        )  # fmt: skip

    unscaled, sweep = best_place(
        model, means, chosen, split.valid, layers=layers, scales=scales, template=written, relation=name, seed=seed,
        generator=copied(generator), **shared,
    )  # fmt: skip
    caution = "" if effects is None else effects.caution(n_heads)
    return Found(
        split=split,
        means=means,
        effects=effects,
        sweep=sweep,
        unscaled=unscaled,
        vector=unscaled * sweep.best_scale,
        cautions=(caution,) if caution else (),
    )


def _split_of(
    pairs: Pairs | Split,
    relation: str | None,
    generator: torch.Generator,
) -> tuple[Split, str]:
    """The split of whatever was given, and the task's name."""
    if isinstance(pairs, Split):
        split, name = pairs, pairs.name
    else:
        whole = as_relation(pairs, what="find_vector")
        split, name = whole.split(generator), whole.name
    if not split.train or not split.valid:
        raise ValueError(
            f"find_vector: expected a split with train and validation pairs, got {len(split.train)} and "
            f"{len(split.valid)}."
        )
    return split, name if relation is None else relation


def task_means(
    model: Any,
    split: Split,
    *,
    relation: str,
    n_shots: int = 10,
    n_prompts: int = 100,
    template: Template | str = "qa",
    generator: torch.Generator,
    progress: bool = True,
) -> HeadMeans:
    """Every head's mean output over clean prompts: demonstrations of the train pairs, queries of the validation pairs.

    Args:
        model: the model.
        split: the relation's pairs.
        relation: the relation's name, for the record.
        n_shots: demonstrations in a prompt.
        n_prompts: the prompts.
        template: how they are written.
        generator: draws them.
        progress: show a progress bar.
    """
    clean = build_prompts(
        model, split.train, queries=split.valid, n_prompts=n_prompts, n_shots=n_shots, template=template,
        relation=relation, generator=generator,
    )  # fmt: skip
    return mean_head_activations(model, clean, progress=progress)


def relation_effects(
    model: Any,
    split: Split,
    *,
    relation: str,
    labels: Labels = "permuted",
    n_shots: int = 10,
    n_prompts: int = 100,
    n_corrupted: int = 25,
    template: Template | str = "qa",
    means: HeadMeans | None = None,
    generator: torch.Generator,
    progress: bool = True,
    **how: Any,
) -> tuple[HeadMeans, IndirectEffects]:
    """Task means over clean prompts, and the indirect effects under one corruption.

    Demonstrations come from the train pairs, queries from the validation pairs; test pairs take no part.

    Args:
        model: the model.
        split: the relation's pairs.
        relation: the relation's name, for the record.
        labels: the corruption.
        n_shots: demonstrations in a prompt.
        n_prompts: clean prompts behind the task means.
        n_corrupted: corrupted prompts behind each indirect effect.
        template: how prompts are written.
        means: task means that are there already; no clean prompts are drawn then.
        generator: draws the clean prompts, then the corrupted ones.
        progress: show progress bars.
        how: passed on to :func:`~fvlens.indirect_effects`, such as ``method``.

    Returns:
        The means, and the :class:`~fvlens.attribution.IndirectEffects`.

    Raises:
        KeyboardInterrupt: the computation was interrupted; a part of the prompts is not handed out as all of them.
    """
    if means is None:
        means = task_means(
            model, split, relation=relation, n_shots=n_shots, n_prompts=n_prompts, template=template,
            generator=generator, progress=progress,
        )  # fmt: skip
    corrupted = build_prompts(
        model, split.train, queries=split.valid, n_prompts=n_corrupted, n_shots=n_shots, labels=labels,
        template=template, relation=relation, generator=generator,
    )  # fmt: skip
    return means, finished(indirect_effects(model, corrupted, means, progress=progress, **how))


def best_place(
    model: Any,
    means: HeadMeans,
    heads: Iterable[HeadLike],
    valid: Sequence[Pair],
    *,
    layers: Sequence[int] | None = None,
    scales: Sequence[float | int] = SCALES,
    template: Template | str | None = None,
    relation: str | None = None,
    seed: int | None = None,
    generator: torch.Generator,
    **how: Any,
) -> tuple[FunctionVector, LayerScaleSweep]:
    """The vector of some heads at the layer where, with the best scale, it does best on validation pairs.

    Args:
        model: the model.
        means: task means at the last token.
        heads: the heads.
        valid: the pairs, asked as bare queries.
        layers, scales: to choose from; see :attr:`LayerScaleSweep.best_place` for the choice.
        template: how queries are written; by default that of ``means``.
        relation: the relation's name, for the record.
        seed: recorded with the vector.
        generator: draws the intervals.
        how: passed on to :func:`~fvlens.evaluation.layer_scale_sweep`, such as ``path``.

    Returns:
        The vector at the best layer, not scaled, and the sweep, whose ``.best_scale`` is the scale.

    Raises:
        ValueError: as for :func:`~fvlens.function_vector` and :func:`~fvlens.evaluation.layer_scale_sweep`.
        KeyboardInterrupt: the sweep was interrupted.
    """
    # summed once, at a layer that the sweep visits; the sweep moves it to the others, and refuses what is no layer
    first = next((layer for layer in layers or () if 0 <= layer < model.cfg.n_layers), 0)
    vector = function_vector(model, means, heads=heads, layer=first, seed=seed)
    if relation:
        vector = dataclasses.replace(vector, relation=relation)
    sweep = layer_scale_sweep(
        model, valid, vector, layers=layers, scales=scales, template=template, relation=relation, generator=generator,
        **how,
    )  # fmt: skip
    return vector.at_layer(finished(sweep).best_layer), sweep
