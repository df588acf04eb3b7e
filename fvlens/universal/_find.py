"""From relations to the heads that carry them."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.evaluation import evaluate
from fvlens.find import RANKINGS, Ranking, relation_effects
from fvlens.interruption import keeping
from fvlens.models import Fingerprint, fingerprint
from fvlens.progress import tqdm
from fvlens.prompts import Template, render_prompts, template_for
from fvlens.relations import Relation, Split, as_relations
from fvlens.showing import Shown
from fvlens.universal._set import UniversalHeads, check_number


def majority_baseline(pool: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Accuracy of always giving the commonest answer of a pool.

    ``max over y among the commonest of pool of [share of wanted equal to y]``. Where several answers are equally
    common, the one that scores best counts, so the baseline does not depend on their order and is never too low
    [our choice].

    Args:
        pool: the answers that demonstrations show.
        wanted: the answers of the queries.

    Returns:
        A share, 0..1.

    Raises:
        ValueError: one of the two is empty.

    Example:
        >>> majority_baseline(["dog", "dog", "cat"], ["dog", "cat", "cow", "dog"])
        0.5
    """
    if not pool or not wanted:
        raise ValueError(
            f"majority_baseline: expected at least one answer in each, got {len(pool)} in pool, {len(wanted)} wanted."
        )
    counts = Counter(pool)
    most = max(counts.values())
    asked = Counter(wanted)
    return max(asked[answer] for answer, count in counts.items() if count == most) / len(wanted)


def universal_heads(
    model: Any,
    relations: Sequence[str | Path | Relation] | str | Path,
    n: int,
    *,
    n_shots: int = 10,
    n_prompts: int = 100,
    n_corrupted: int = 25,
    labels: Ranking = "permuted",
    template: Template | str = "qa",
    generator: torch.Generator,
    progress: bool = True,
) -> UniversalHeads:
    """The heads with the largest indirect effect on average over relations that the model can do.

    ``mean(l, h) = mean over relations t that count of AIE_t(l, h)``; a relation counts if the model's top-1 with
    ``n_shots`` clean demonstrations is above the majority-label baseline [paper]. Both are measured on the validation
    queries by the answer's first token; the baseline is the commonest first token among the train pairs' answers, see
    :func:`majority_baseline` [our choice]. Above means a larger number; the interval of the top-1 is kept beside it.

    Args:
        model: the model.
        relations: names of library relations, files, ``Relation``s; or a folder of files.
        n: number of heads in the set.
        n_shots: demonstrations in a prompt.
        n_prompts: clean prompts behind each relation's task means.
        n_corrupted: corrupted prompts behind each relation's effects.
        labels: how they are corrupted, ``"permuted"`` or ``"random"``.
        template: how prompts are written.
        generator: draws all splits first, then the prompts of one relation after the other.
        progress: show progress bars. Interrupting returns the relations that are finished, with a warning.

    Returns:
        :class:`UniversalHeads`; ``.heads`` is the set, best first. Relations that do not count have their effects too.

    Raises:
        ValueError: no relations, an unknown one or one given twice; a relation too small to split or for ``n_shots``;
            ``n`` outside the model; ``n_corrupted`` below 2; unknown ``labels`` or ``template``; or no relation on
            which the model beats the baseline.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> found = fvlens.universal_heads(
        ...     model, ["antonym", "plural"], 3, n_prompts=8, n_corrupted=4, generator=g, progress=False
        ... )
        >>> len(found.heads), found.kept.tolist()
        (3, [True, True])

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3 (universal set of causal heads).
    """
    check_arguments(universal_heads, locals(), runs=True)
    check_number(n, model.cfg.n_layers * model.cfg.n_heads)
    if labels not in RANKINGS:
        raise ValueError(f"universal_heads: labels={labels!r}; expected one of {', '.join(RANKINGS)}.")
    for name, value, least in (("n_shots", n_shots, 1), ("n_prompts", n_prompts, 1), ("n_corrupted", n_corrupted, 2)):
        if value < least:
            raise ValueError(f"universal_heads: {name}: expected at least {least}, got {value}.")
    template = template_for(model, template)
    chosen = as_relations(relations, what="universal_heads")
    splits = [relation.split(generator) for relation in chosen]
    for relation, split in zip(chosen, splits, strict=True):
        if len(split.train) < n_shots:
            raise ValueError(
                f"universal_heads: relation {relation.name!r} is too small: {n_shots} demonstrations wanted, but only "
                f"{len(split.train)} of its {len(relation)} pairs are for training; leave it out or use fewer shots."
            )
    how: dict[str, Any] = {
        "n_shots": n_shots, "n_prompts": n_prompts, "n_corrupted": n_corrupted, "labels": labels, "template": template,
    }  # fmt: skip
    rows: list[Carried] = []
    with keeping(lambda: len(rows), len(chosen), "universal_heads", "relations are finished", stacklevel=2) as loop:
        bar = tqdm(chosen, desc="relations", disable=not progress, leave=False)
        for relation, split in zip(bar, splits, strict=True):
            rows.append(carried(model, split, relation=relation.name, generator=generator, progress=progress, **how))
    part = chosen[: len(rows)]
    return heads_of(
        rows, n, relations=[one.name for one in part], data_hashes=[one.data_hash for one in part],
        complete=loop.complete, fingerprint=fingerprint(model), **how,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Carried(Shown):
    """What one relation says of every head.

    Attributes:
        aie, prompt_stderr, icl_top1, icl_interval, majority, path: as in :class:`UniversalHeads`, of this relation.
    """

    aie: Float[Tensor, "layer head"]
    prompt_stderr: Float[Tensor, "layer head"]
    icl_top1: float
    icl_interval: tuple[float, float]
    majority: float
    path: str

    def _line(self) -> str:
        return f"{self.aie.shape[0]} layers x {self.aie.shape[1]} heads"


def carried(
    model: Any,
    split: Split,
    *,
    relation: str,
    n_shots: int = 10,
    n_prompts: int = 100,
    n_corrupted: int = 25,
    labels: Ranking = "permuted",
    template: Template | str = "qa",
    generator: torch.Generator,
    progress: bool = True,
) -> Carried:
    """One relation's part of :func:`universal_heads`: effects of the heads, and whether the model can do it at all.

    Args:
        model, n_shots, n_prompts, n_corrupted, labels, template, progress: as there.
        split: the relation's pairs; those of the test part take no part.
        relation: its name.
        generator: draws the prompts.

    Raises:
        ValueError: whatever the steps refuse.
        KeyboardInterrupt: it was interrupted; a part is not handed out as the whole.
    """
    common: dict[str, Any] = {
        "n_shots": n_shots, "template": template, "relation": relation, "generator": generator,
    }  # fmt: skip
    icl = evaluate(model, split.valid, setting="icl", demonstrations=split.train, **common)
    _, found = relation_effects(
        model, split, n_prompts=n_prompts, n_corrupted=n_corrupted, labels=labels, progress=progress, **common
    )
    pool, wanted = (
        render_prompts(model, part, [()] * len(part), template=template, n_shots=0).first_answer_token.tolist()
        for part in (split.train, split.valid)
    )
    return Carried(
        found.aie,
        found.stderr,
        icl.top1,
        (icl.interval.low, icl.interval.high),
        majority_baseline(pool, wanted),
        found.path,
    )


def heads_of(
    rows: Sequence[Carried],
    n: int,
    *,
    relations: Sequence[str],
    data_hashes: Sequence[str],
    complete: bool,
    fingerprint: Fingerprint,
    **prompts: Any,
) -> UniversalHeads:
    """The set of ``n`` heads that follows from what the relations say.

    Args:
        rows: one a relation.
        n: number of heads in the set.
        relations, data_hashes, complete, fingerprint: as in :class:`UniversalHeads`.
        prompts: its fields about the prompts: ``labels, n_shots, n_prompts, n_corrupted, template``.

    Raises:
        ValueError: as :class:`UniversalHeads`.
    """
    return UniversalHeads(
        n=n,
        relations=tuple(relations),
        data_hashes=tuple(data_hashes),
        aie=torch.stack([row.aie for row in rows]),
        prompt_stderr=torch.stack([row.prompt_stderr for row in rows]),
        icl_top1=torch.tensor([row.icl_top1 for row in rows]),
        icl_interval=torch.tensor([row.icl_interval for row in rows]),
        majority=torch.tensor([row.majority for row in rows]),
        path=", ".join(sorted({row.path for row in rows})),
        complete=complete,
        fingerprint=fingerprint,
        **prompts,
    )
