"""Queries that are run once and then asked again under many vectors, and the scores of source pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.metrics import is_best
from fvlens.progress import tqdm
from fvlens.prompts import Template, render_prompts, template_or, warn_of_bos
from fvlens.relations import Pair, Pairs, named_pairs
from fvlens.showing import Shown, number
from fvlens.suffix import Route
from fvlens.training import SteerablePrompts, VectorSet, frozen

AnalogySetting = Literal["zero_shot", "one_shot"]
ANALOGY_SETTINGS: tuple[AnalogySetting, ...] = ("zero_shot", "one_shot")


def shown_pairs(sources: Sequence[Pair], setting: AnalogySetting) -> list[list[Pair]] | None:
    """The demonstrations of each analogy's prompt: its source pair in the one-shot prompt, none in the bare query."""
    return [[source] for source in sources] if setting == "one_shot" else None


class Queries(SteerablePrompts):
    """Pairs as prompts whose answers are scored with vectors added after one layer, at the prompt's last token.

    Args:
        model: the model.
        queries: the pairs asked.
        demonstrations: the pairs shown before each; none by default.
        layer: where vectors are added.
        template: how the prompts are written.
        path, max_memory: as for :func:`fvlens.finetune`.
    """

    def __init__(
        self,
        model: Any,
        queries: Sequence[Pair],
        demonstrations: Sequence[Sequence[Pair]] | None = None,
        *,
        layer: int,
        template: Template | str = "qa",
        path: Route | None = None,
        max_memory: int | None = None,
    ) -> None:
        shown = [()] * len(queries) if demonstrations is None else demonstrations
        prompts = render_prompts(model, queries, shown, template=template, n_shots=max(map(len, shown)))
        super().__init__(model, prompts, layer, path=path, max_memory=max_memory)
        self.n_tokens = prompts.answer_mask.sum(dim=1)

    def parts(self, rows: Int[Tensor, " row"]) -> list[Int[Tensor, " _row"]]:
        """``rows``, cut into slices that go through the model together."""
        return [rows[part] for part in self.portions(rows)]

    def right(self, first_logits: Float[Tensor, "row d_vocab"], rows: Int[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Whether the first token of each answer is the best one under such logits; on the CPU."""
        return is_best(first_logits, self.targets_of(rows)[:, 0].to(first_logits.device)).cpu()


@dataclass(frozen=True, slots=True, repr=False)
class SourceScores(Shown):
    """How likely each basis vector makes the source's answer.

    Attributes:
        log_probs: mean log-probability per token of B given A (nats), under each basis vector.
        unsteered: the same without any vector.
    """

    log_probs: Float[Tensor, "pair relation"]
    unsteered: Float[Tensor, " pair"]

    def _line(self) -> str:
        best = float(self.log_probs.max()) if self.log_probs.numel() else None
        return f"{self.log_probs.shape[0]} pairs, {self.log_probs.shape[1]} relations, best {number(best)} nats"


def source_scores(
    model: Any,
    basis: VectorSet,
    pairs: Pairs,
    *,
    template: Template | str | None = None,
    path: Route | None = None,
    max_memory: int | None = None,
    progress: bool = False,
) -> SourceScores:
    """Scores of source pairs under every basis vector: ``s_i = mean over tokens of log P(B | A; resid_l += v_i)``.

    Args:
        model: the model.
        basis: vectors v_1..v_n.
        pairs: source pairs (A, B); one that occurs several times is run once.
        template: how the bare query is written; by default as the basis was made with, else ``"qa"``.
        path, max_memory: as for :func:`fvlens.finetune`.
        progress: show a bar.

    Returns:
        :class:`SourceScores` in the order of ``pairs``, in nats, at most 0, on the CPU.

    Raises:
        ValueError: no pairs; a vector of another model.

    References:
        arXiv:2601.08169 [digest]: the paper takes the probability, and the mean log-probability for a B of several
        tokens.
    """
    basis.check(model)
    every, _ = named_pairs(pairs, what="source_scores: pairs", repeats=True)
    unique = list(dict.fromkeys(every))
    template = template_or(template, basis.template)
    warn_of_bos(model, basis.template, template, "the basis", stacklevel=2)
    queries = Queries(model, unique, layer=basis.layer, template=template, path=path, max_memory=max_memory)
    vectors = torch.cat([torch.zeros(1, basis.matrix.shape[1]), basis.matrix])

    def mean_log_prob(rows: Tensor, given: Tensor) -> Tensor:
        return queries.log_probs(rows, given).sum(dim=1).cpu().float() / queries.n_tokens[rows]

    found = _under_each(model, queries, vectors, mean_log_prob, progress)
    place = {pair: i for i, pair in enumerate(unique)}
    found = found[[place[pair] for pair in every]]
    return SourceScores(found[:, 1:].clone(), found[:, 0].clone())


def given_or_scored(
    given: SourceScores | None, model: Any, basis: VectorSet, pairs: Sequence[Pair], *, whose: str, **options: Any
) -> SourceScores:
    """The given scores, or :func:`source_scores` with these options where there are none.

    Raises:
        ValueError: they are not of so many pairs under so many vectors.
    """
    if given is None:
        return source_scores(model, basis, pairs, **options)
    if given.log_probs.shape != (len(pairs), len(basis)):
        raise ValueError(
            f"{whose}: expected sources of {len(pairs)} analogies under {len(basis)} vectors, got "
            f"{list(given.log_probs.shape)}."
        )
    return given


def answer_scores(
    model: Any, basis: VectorSet, words: Sequence[str], tokens: Int[Tensor, "word answer"], **options: Any
) -> Float[Tensor, "word answer relation"]:
    """Log-probability (nats) of single tokens after the bare query of each word, under each basis vector.

    Args:
        model: the model.
        basis: vectors v_1..v_n.
        words: what is asked.
        tokens: the answers to each.
        options: ``template``, ``path`` and ``max_memory`` of :class:`Queries`.
    """
    queries = Queries(model, [Pair(word, word) for word in words], layer=basis.layer, **options)  # answers are ignored

    def chosen(rows: Tensor, vectors: Tensor) -> Tensor:
        logs = queries.first_logits(rows, vectors).float().log_softmax(dim=-1)
        return logs.gather(1, tokens[rows].to(logs.device)).cpu()

    return _under_each(model, queries, basis.matrix, chosen, progress=False).transpose(1, 2)


def _under_each(
    model: Any, queries: Queries, vectors: Float[Tensor, "relation d_model"], read: Callable[[Tensor, Tensor], Tensor],
    progress: bool,
) -> Float[Tensor, "query relation *value"]:  # fmt: skip
    """What ``read`` (rows, a vector for each) finds of every query under every vector, without gradients."""
    n = len(vectors)
    rows = torch.arange(len(queries)).repeat_interleave(n)
    whose = torch.arange(n).repeat(len(queries))
    parts = []
    with torch.no_grad(), frozen(model), tqdm(total=len(rows), disable=not progress, desc="source pairs") as bar:
        for part in queries.portions(rows):
            parts.append(read(rows[part], vectors[whose[part]]))
            bar.update(part.stop - part.start)
    return torch.cat(parts).unflatten(0, (len(queries), n))
