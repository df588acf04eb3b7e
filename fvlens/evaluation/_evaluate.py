"""One evaluation: how well prompts are answered, with or without a vector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.evaluation._answered import Answered, asked
from fvlens.evaluation._prompting import Asked, Options, asked_prompts, copied, running
from fvlens.metrics import Interval, bootstrap_interval, top_k_accuracy
from fvlens.prompts import AnswerTokens, Prompts
from fvlens.results import check_counts
from fvlens.scoring import Scores, score
from fvlens.showing import as_said, number, span
from fvlens.suffix import Route, Weights, named_precision
from fvlens.types import Steering

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

SHARE_AXIS = (0.0, 1.08)
"""Range of an axis that shows shares, with room for the markers at 1."""


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Evaluation(Answered):
    """Scores of one setting, one entry a query, in the order of the pairs.

    Attributes:
        predictions: the most likely next token of each prompt, as text without its leading space.
        ranks: number of tokens before the answer's first token, in order of falling logit and rising id; 0 is right.
        probabilities: probability of the answer's first token.
        log_probabilities: teacher-forced log-probability of the whole answer, in nats, summed over its tokens.
        whole: True where every token of the answer has rank 0, given those before: the model writes the whole answer
            greedily, with the vector at the prompt's last token.
        answers: the different answers asked for, to the tokenizer; ``.n_first_tokens`` are their first tokens.
        interval: 95% bootstrap interval of :attr:`top1`.
        path: ``"weights"``, ``"kv"`` or ``"naive"``: how they were computed.
        batch_size: prompts that ran together at most.
        weights: how they were held on the path ``"weights"``: ``"copied"``, or ``"laid out at each call"`` where a
            second copy does not fit the memory; None on other paths.
        compute: precision of the products, where it is not the model's own.

    What was asked is in the fields of :class:`Answered`.
    """

    FORMAT: ClassVar[str] = "fvlens-evaluation-1"

    predictions: tuple[str, ...]
    ranks: Int[Tensor, " prompt"]
    probabilities: Float[Tensor, " prompt"]
    log_probabilities: Float[Tensor, " prompt"]
    whole: Bool[Tensor, " prompt"]
    answers: AnswerTokens
    interval: Interval
    path: Route
    batch_size: int
    weights: Weights | None
    compute: str | None

    @property
    def correct(self) -> Bool[Tensor, " prompt"]:
        """True where the answer's first token is the most likely one."""
        return self.ranks == 0

    @property
    def top1(self) -> float:
        """Share of queries whose answer's first token is the most likely one."""
        return top_k_accuracy(self.ranks, 1)

    @property
    def exact(self) -> float:
        """Share of queries whose whole answer is right; :attr:`top1` where all answers are of one token."""
        return self.whole.double().mean().item()

    @property
    def n_first_tokens(self) -> int:
        """Number of different first tokens of the answers; fewer than answers, and top-1 takes some for others."""
        return self.answers.n_first_tokens

    @property
    def caution(self) -> str:
        """What must be said of :attr:`top1`: that answers share first tokens; empty if nothing."""
        return self.answers.caution

    @property
    def top5(self) -> float:
        """Share of queries whose answer's first token is among the five most likely."""
        return top_k_accuracy(self.ranks, 5)

    @property
    def mean_rank(self) -> float:
        """Mean rank of the answer's first token, 0 at best."""
        return self.ranks.double().mean().item()

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank, ``mean of 1 / (rank + 1)``."""
        return (1 / (self.ranks.double() + 1)).mean().item()

    @property
    def probability(self) -> float:
        """Mean probability of the answer's first token."""
        return self.probabilities.double().mean().item()

    @property
    def answer_log_probability(self) -> float:
        """Mean log-probability of the whole answer, in nats."""
        return self.log_probabilities.double().mean().item()

    def _exact(self) -> str:
        return "" if self.exact == self.top1 else f"exact={self.exact:.3f}, "

    def _check_loaded(self) -> None:
        check_counts(self, self.n)
        if bool((self.ranks < 0).any()):
            raise ValueError(f"ranks: expected numbers of at least 0, got {int(self.ranks.min())}.")
        if bool((self.probabilities < 0).any() or (self.probabilities > 1.001).any()):
            raise ValueError("probabilities: expected shares between 0 and 1.")

    def _line(self) -> str:
        vector = "no vector" if self.vector_kind is None else f"{self.vector_kind} vector x {self.scale:g}"
        return (
            f"{self.name}, {self.setting}, {vector}, n={self.n}, top1={self.top1:.3f} {span(*self.interval[:2])}, "
            f"{self._exact()}probability={self.probability:.3f}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        columns = zip(self.queries, self.predictions, self.ranks.tolist(), self.probabilities.tolist(), strict=True)
        return [
            ("query", "answer", "prediction", "rank", "probability"),
            *((pair.input, pair.output, said, str(rank), number(p)) for pair, said, rank, p in columns),
        ]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a query: its words, ``prediction, correct, rank, probability, log_probability, exact``, and the
        setting."""
        return self._table(
            prediction=list(self.predictions),
            correct=self.correct.numpy(),
            rank=self.ranks.numpy(),
            probability=self.probabilities.numpy(),
            log_probability=self.log_probabilities.numpy(),
            exact=self.whole.numpy(),
        )

    def plot(self, *, k: int = 10) -> "Figure":
        """Share of answers among the ``k`` most likely tokens, for 1 to ``k`` tokens."""
        from fvlens import plots

        counts = list(range(1, max(2, k) + 1))
        return plots.line_sweep(
            counts,
            [top_k_accuracy(self.ranks, count) for count in counts],
            x_title="Tokens counted",
            y_title="Share of answers among them",
            title=f"Rank of the answer, {self.name} ({as_said(self.setting)}, {self.n} queries)",
            marked=1,
            marked_label="top-1",
            y_range=SHARE_AXIS,
        )


def evaluate(
    model: Any,
    pairs: Asked,
    *,
    vector: Steering | None = None,
    scale: float | int = 1.0,
    generator: torch.Generator,
    **options: Unpack[Options],
) -> Evaluation:
    """How well the model answers word-pair queries, with or without an injected vector.

    ``top1 = mean over pairs (x, y) of [the first token of y has rank 0]`` after the prompt that asks for x [paper; the
    order of tokens with equal logits is ours]. The whole answer is scored too: ``sum over its tokens of log P(y_i |
    prompt, y_<i)``, with the vector added at the prompt's last token only. ``exact = mean over pairs of [every token of
    y has rank 0 given those before]``: that is when greedy decoding writes y, so nothing is generated for it.

    Args:
        model: the model.
        pairs: the pairs asked, one query each, in any shape (:func:`fvlens.relations.as_relation`); or prompts that
            were built before.
        vector: what is injected, such as a ``FunctionVector``. A tensor in it may have a leading batch axis, one row a
            pair.
        scale: factor on the vector.
        generator: draws the demonstrations first, then the bootstrap.
        options: how pairs are asked, see :class:`~fvlens.evaluation.Prompting` (``setting, demonstrations, n_shots,
            template, labels, pool, relation``), and how prompts are run, see :class:`~fvlens.evaluation.Running`
            (``batch_size, path, max_memory, compute``).

    Returns:
        :class:`Evaluation`: rank, probability (0..1) and log-probability (nats, at most 0) of each query, and their
        means; tensors on the CPU. A warning says where answers share first tokens, so that ``top1`` overrates.

    Raises:
        ValueError: pairs that cannot be read; unknown ``setting`` or ``labels``; ``icl`` or ``shuffled`` without
            ``demonstrations`` or with ``n_shots`` below 1; ``labels`` in another setting than ``shuffled``; any of
            these beside prompts; ``batch_size`` below 1; a batch axis in the vector that is not one row a pair;
            whatever :func:`~fvlens.build_prompts` and :func:`~fvlens.inject` refuse, such as a vector of another model.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> bare = fvlens.evaluate(model, split.test, generator=g)
        >>> shown = fvlens.evaluate(model, split.test, setting="icl", demonstrations=split.train, generator=g)
        >>> shown.top1 > bare.top1
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (zero-shot and shuffled-label evaluation).
    """
    check_arguments(evaluate, locals(), runs=True)
    prompts = asked_prompts("evaluate", model, pairs, options, generator, vector)
    scores = score(model, prompts, [vector], scales=scale, what="evaluate", **running(options))
    (found,) = evaluations(model, prompts, [vector], [scale], scores, generator, options.get("compute"))
    return found


def evaluations(
    model: Any,
    prompts: Prompts,
    vectors: Sequence[Steering | None],
    scales: Sequence[float | int],
    scores: Scores,
    generator: torch.Generator,
    compute: torch.dtype | None = None,
) -> tuple[Evaluation, ...]:
    """Scores of several vectors on the same prompts, as one evaluation each.

    Each interval starts from the generator's state, which ends as after the first of them: an evaluation equals, to the
    bit, what :func:`evaluate` alone gives with a generator of the same seed.
    """
    if not scores.complete:
        prompts = prompts.select(scores.prompts.tolist())
    shared = {
        "path": scores.path,
        "batch_size": scores.batch_size,
        "weights": scores.weights,
        "compute": named_precision(compute),
    }
    texts, answers = _texts(model, scores.best), AnswerTokens.of(prompts)
    start = copied(generator)
    found = []
    for i, (vector, scale) in enumerate(zip(vectors, scales, strict=True)):
        own = generator if i == 0 else copied(start)
        found.append(
            Evaluation(
                predictions=texts[i],
                ranks=scores.ranks[i],
                probabilities=scores.first[i].exp(),
                log_probabilities=scores.whole[i],
                whole=scores.exact[i],
                answers=answers,
                interval=bootstrap_interval(scores.ranks[i] == 0, generator=own),
                **asked(model, prompts, vector, scale),
                **shared,
            )
        )
    return tuple(found)


def _texts(model: Any, tokens: Int[Tensor, "change prompt"]) -> list[tuple[str, ...]]:
    """Tokens as text without their leading space; each different one is decoded once."""
    distinct = sorted(set(tokens.flatten().tolist()))
    decoded = model.tokenizer.batch_decode([[token] for token in distinct])
    text = dict(zip(distinct, (one.removeprefix(" ") for one in decoded), strict=True))
    return [tuple(text[token] for token in row) for row in tokens.tolist()]
