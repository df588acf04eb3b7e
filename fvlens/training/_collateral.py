"""What a method gains, and what it disturbs."""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.evaluation import Evaluation, evaluations
from fvlens.metrics import Interval, best_token, bootstrap_interval, is_best, kl_divergence, log_probability, rank
from fvlens.prompts import Prompts, Template, build_prompts, render_prompts, template_or
from fvlens.relations import Pairs, Relation, list_relations, load_relation
from fvlens.results import Result
from fvlens.scoring import Scores, note_other_bos, score
from fvlens.showing import span
from fvlens.training._adaptations import Adaptation, Demonstrations, Steered, Unchanged, read_prompts
from fvlens.training._adapted import Adapted, as_adaptation
from fvlens.types import Steering

# --- what a method gains ---


def _template_of(adapted: Any) -> Template | str | None:
    """The template that a method was trained with, or that of its vector; None if it knows of none."""
    settings = getattr(adapted, "settings", None)
    if settings is not None:
        return settings.template
    steering = getattr(getattr(adapted, "change", adapted), "steering", adapted)
    return getattr(steering, "template", None)


def evaluate_adapted(
    model: Any,
    pairs: Pairs,
    adapted: Adapted | Steering | Adaptation | None,
    *,
    template: Template | str | None = None,
    relation: str | None = None,
    batch_size: int | None = None,
    check: bool = True,
    generator: torch.Generator,
) -> Evaluation:
    """How well the model answers bare queries under any method; of a vector the numbers of :func:`fvlens.evaluate`.

    Low-rank updates and soft prompts act on the whole prompt and on an answer's tokens, a vector at the prompt's last
    token only.

    Args:
        model: the model.
        pairs: the pairs asked, one query each.
        adapted: what a baseline or ``finetune`` gave, a vector, or None for the model as it is.
        template: how queries are written; by default as ``adapted`` was made with, else ``"qa"``.
        relation: name recorded in the result; by default that of ``pairs``.
        batch_size: prompts run together; by default chosen from what memory is free.
        check: ask ``adapted`` whether it was made on this model.
        generator: draws the bootstrap.

    Returns:
        :class:`~fvlens.evaluation.Evaluation`, whose setting is ``"icl"`` where the method is demonstrations.

    Raises:
        ValueError: no pairs; ``adapted`` is nothing of the kind, or of another model; ``batch_size`` below 1.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.training import evaluate_adapted, few_shot
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> shown = evaluate_adapted(model, split.test, few_shot(split.train, generator=g), generator=g)
        >>> shown.top1 > evaluate_adapted(model, split.test, None, generator=g).top1
        True
    """
    change = as_adaptation(adapted)
    if check:
        change.check(model)
    template = template_or(template, _template_of(adapted))
    bare = build_prompts(model, pairs, n_shots=0, template=template, relation=relation, generator=generator)
    prompts = change.on(model, bare)
    steering = change.steering if isinstance(change, Steered) else None
    if isinstance(change, Steered | Unchanged | Demonstrations):
        scores = score(model, prompts, [steering], batch_size=batch_size, check=check, what="evaluate_adapted")
    else:
        note_other_bos(model, prompts, [change], stacklevel=3)
        scores = _read_scores(model, change, prompts, batch_size)
    (found,) = evaluations(model, prompts, [steering], [1.0], scores, generator)
    if steering is not None:
        return found
    kind = None if isinstance(change, Unchanged | Demonstrations) else type(change).__name__
    return replaced(found, vector_kind=kind, fingerprint=getattr(change, "fingerprint", None))


def _read_scores(model: Any, change: Adaptation, prompts: Prompts, batch_size: int | None) -> Scores:
    """Scores under a change that acts on whole prompts, by whole passes."""
    ranks, logs, best, exact = [], [], [], []
    largest = 0
    with torch.no_grad():
        for rows, logits in read_prompts(
            model, change, prompts, n_answer=prompts.answer_tokens.shape[1], batch_size=batch_size,
            what="evaluate_adapted",
        ):  # fmt: skip
            wanted = prompts.answer_tokens[rows].to(logits.device)
            ranks.append(rank(logits[:, 0], wanted[:, 0]).cpu())
            logs.append(log_probability(logits, wanted.clamp(min=0)).masked_fill(wanted < 0, 0.0).cpu())
            best.append(best_token(logits[:, 0]).cpu())
            exact.append((is_best(logits, wanted) | (wanted < 0)).all(dim=1).cpu())
            largest = max(largest, len(wanted))
    every = torch.cat(logs)
    first, rest = every[None, :, 0], every[None, :, 1:].sum(dim=-1)
    columns = torch.arange(len(prompts))
    return Scores(
        torch.cat(ranks)[None], first, rest, torch.cat(best)[None], torch.cat(exact)[None], columns, "naive", largest
    )


# --- what it disturbs ---


@dataclass(frozen=True, slots=True, repr=False)
class Collateral(Result):
    """How far a method changes predictions that it should leave alone.

    Attributes:
        divergences: ``KL(P_plain || P_adapted)`` of the next token after each prompt, in nats.
        interval: 95% bootstrap interval of their mean.
    """

    FORMAT: ClassVar[str] = "fvlens-collateral-1"

    divergences: Float[Tensor, " prompt"]
    interval: Interval

    @property
    def mean(self) -> float:
        """Mean divergence in nats; 0 where nothing changes."""
        return self.divergences.double().mean().item()

    def _line(self) -> str:
        return f"{len(self.divergences)} prompts, KL {self.mean:.4f} nats {span(*self.interval[:2])}"


def unrelated_prompts(
    model: Any,
    relation: Relation,
    *,
    n: int = 200,
    n_shots: int = 2,
    template: Template | str = "qa",
    generator: torch.Generator,
) -> Prompts:
    """Prompts that have nothing to do with a relation: other library relations, asked after demonstrations of them.

    Each prompt draws a relation, other than this one and of another family, and from it the query and the
    demonstrations, all of them pairs neither of whose words is a word of this relation [our choice].

    Args:
        model: the model.
        relation: the relation to stay away from.
        n: number of prompts.
        n_shots: demonstrations in each; they say what is asked, so that there is something to disturb.
        template: how prompts are written.
        generator: draws everything.

    Returns:
        :class:`~fvlens.prompts.Prompts`.

    Raises:
        ValueError: ``n`` below 1; ``n_shots`` below 0; no other relation has that many pairs left.
    """
    if n < 1 or n_shots < 0:
        raise ValueError(f"unrelated_prompts: expected n >= 1 and n_shots >= 0, got {n} and {n_shots}.")
    words = {*relation.inputs, *relation.outputs}
    pools = []
    for name in list_relations():
        other = load_relation(name)
        if name == relation.name or (relation.family and other.family == relation.family):
            continue
        by_input = {pair.input: pair for pair in other.pairs if not words & {*pair}}
        if len(by_input) > n_shots:
            pools.append(list(by_input.values()))
    if not pools:
        raise ValueError(
            f"unrelated_prompts: no library relation has {n_shots + 1} pairs without a word of {relation.name!r}; use "
            "fewer shots."
        )
    queries, shown = [], []
    for _ in range(n):
        pool = pools[int(torch.randint(len(pools), (1,), generator=generator))]
        picked = [pool[i] for i in torch.randperm(len(pool), generator=generator)[: n_shots + 1].tolist()]
        queries.append(picked[0])
        shown.append(picked[1:])
    return render_prompts(model, queries, shown, template=template, n_shots=n_shots)


def collateral_change(
    model: Any,
    adapted: Adapted | Steering | Adaptation | None,
    prompts: Prompts,
    *,
    batch_size: int | None = None,
    check: bool = True,
    generator: torch.Generator,
) -> Collateral:
    """How far a method changes the next token after prompts that it was not made for.

    ``KL(P_plain || P_adapted)`` in nats. The method acts as on its own queries: a vector at the last token, soft tokens
    behind BOS, demonstrations in front of what the prompt shows itself, low-rank updates everywhere.

    Args:
        model: the model.
        adapted: what a baseline or ``finetune`` gave, a vector, or None for the model as it is.
        prompts: the prompts, such as :func:`unrelated_prompts`.
        batch_size: prompts run together; by default chosen from what memory is free.
        check: ask ``adapted`` whether it was made on this model.
        generator: draws the bootstrap.

    Returns:
        :class:`Collateral`.

    Raises:
        ValueError: ``adapted`` is nothing of the kind, or of another model; ``batch_size`` below 1; a prompt is too
            long for the context with what the method adds to it.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.training import collateral_change, unrelated_prompts
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = unrelated_prompts(model, fvlens.load_relation("antonym"), n=4, generator=g)
        >>> collateral_change(model, None, prompts, generator=g).mean
        0.0
    """
    change = as_adaptation(adapted)
    if check:
        change.check(model)
    note_other_bos(model, prompts, [change.steering if isinstance(change, Steered) else change], stacklevel=3)

    def logits(of: Adaptation, asked: Prompts) -> Iterator[Tensor]:
        parts = read_prompts(model, of, asked, n_answer=1, batch_size=batch_size, what="collateral_change")
        return (part[:, 0].cpu() for _, part in parts)

    with torch.no_grad():
        plain = torch.cat(list(logits(Unchanged(), prompts)))
        found, at = [], 0
        for part in logits(change, change.on(model, prompts)):
            found.append(kl_divergence(plain[at : at + len(part)], part).float())
            at += len(part)
    divergences = torch.cat(found)
    return Collateral(divergences, bootstrap_interval(divergences, generator=generator))
