"""Whole answers, generated greedily."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.evaluation._answered import Answered, asked
from fvlens.evaluation._prompting import Asked, Prompting, asked_prompts, copied
from fvlens.metrics import Interval, best_token, bootstrap_interval, exact_match, token_f1
from fvlens.prompts import AnswerEnd, Prompts
from fvlens.scoring import Batch, changed, context_batches, note_other_bos
from fvlens.showing import as_said, span
from fvlens.suffix import halving
from fvlens.types import Steering

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class GeneratedAnswers(Answered):
    """Generated answers against the expected ones, one entry a query, in the order of the pairs.

    Attributes:
        texts: the generated answers: what stands before the end, without white space around it.
        raw_texts: everything that was generated, with the separator but without an end token.
        ended: True where the answer ended, at the template's separator or an end token; False where it was as long as
            allowed.
        matches: True where the answer equals the expected one (case, punctuation and articles aside).
        f1_scores: F1 of the words that both share.
        interval: 95% bootstrap interval of :attr:`exact_match`.
        f1_interval: 95% bootstrap interval of :attr:`f1`.
        max_new_tokens: tokens generated at most.

    What was asked is in the fields of :class:`Answered`.
    """

    FORMAT: ClassVar[str] = "fvlens-generated-answers-1"

    texts: tuple[str, ...]
    raw_texts: tuple[str, ...]
    ended: Bool[Tensor, " prompt"]
    matches: Bool[Tensor, " prompt"]
    f1_scores: Float[Tensor, " prompt"]
    interval: Interval
    f1_interval: Interval
    max_new_tokens: int

    @property
    def exact_match(self) -> float:
        """Share of queries whose generated answer equals the expected one."""
        return self.matches.double().mean().item()

    @property
    def f1(self) -> float:
        """Mean F1 of the words of generated and expected answer."""
        return self.f1_scores.double().mean().item()

    def _line(self) -> str:
        return (
            f"{self.name}, {self.setting}, n={self.n}, exact_match={self.exact_match:.3f} {span(*self.interval[:2])}, "
            f"f1={self.f1:.3f}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        columns = zip(self.queries, self.texts, self.matches.tolist(), strict=True)
        return [
            ("query", "answer", "text", "right"),
            *((pair.input, pair.output, text, "yes" if right else "no") for pair, text, right in columns),
        ]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a query: ``query, answer, text, ended, exact_match, f1`` and the setting."""
        return self._table(
            text=list(self.texts),
            ended=self.ended.numpy(),
            exact_match=self.matches.numpy(),
            f1=self.f1_scores.numpy(),
        )

    def plot(self) -> "Figure":
        """Exact match and F1 as bars with their intervals."""
        from fvlens import plots

        intervals = (self.interval, self.f1_interval)
        return plots.bars(
            ["exact match", "F1 of words"],
            [self.exact_match, self.f1],
            [interval.low for interval in intervals],
            [interval.high for interval in intervals],
            x_title="Mean over queries",
            level=self.interval.level,
            title=f"Generated answers, {self.name} ({as_said(self.setting)}, {self.n} queries)",
        )


def generate_answers(
    model: Any,
    pairs: Asked,
    *,
    vector: Steering | None = None,
    scale: float | int = 1.0,
    batch_size: int | None = None,
    max_new_tokens: int = 4,
    every_new_token: bool = False,
    generator: torch.Generator,
    **prompting: Unpack[Prompting],
) -> GeneratedAnswers:
    """Whole answers: exact match and F1 of what the model writes, greedily, after the prompt.

    An answer ends at the template's separator, which is the text that follows ``{output}`` in its demonstrations (where
    that begins with a line break: at the first one), at an end token (the tokenizer's, and a chat format's end of
    turn), or where it is as long as allowed. Nothing more is generated then, and what stands before the end is compared
    with the expected answer.

    The vector is added at the prompt's last token alone, as where whole answers are scored (``exact``,
    ``log_probabilities``) and trained on, so that all three are about one model. It has chosen the answer there; added
    at each new token too (``every_new_token``), it asks for an answer again where the separator should stand, which
    some relations do not withstand.
    ``exact`` asks that the expected tokens are the likeliest ones and not whether anything follows them, so it may be
    larger than ``exact_match``: ``New York`` starts with ``New``.

    Args:
        model: the model.
        pairs, vector, scale, batch_size: as for :func:`evaluate`.
        max_new_tokens: tokens generated at most; a longer expected answer cannot be matched.
        every_new_token: add the vector at each generated token too.
        generator: draws the demonstrations first, then the bootstrap. Generation itself is greedy.
        prompting: how pairs are asked, as for :func:`evaluate`.

    Returns:
        :class:`GeneratedAnswers`, scores in 0..1.

    Raises:
        ValueError: as for :func:`evaluate`; ``max_new_tokens`` below 1, or too many for the model's context.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> answers = fvlens.generate_answers(
        ...     model, split.test, setting="icl", demonstrations=split.train, max_new_tokens=1, generator=g
        ... )
        >>> answers.exact_match > 0.5
        True

    References:
        arXiv:1606.05250, section 6.1 (exact match and F1).
    """
    check_arguments(generate_answers, locals(), runs=True)
    if max_new_tokens < 1:
        raise ValueError(f"generate_answers: expected max_new_tokens of at least 1, got {max_new_tokens}.")
    prompts = asked_prompts(
        "generate_answers", model, pairs, prompting, generator, vector, Prompting.__annotations__, first_tokens=False
    )
    note_other_bos(model, prompts, [vector], stacklevel=3)
    longest = int(prompts.attention_mask.sum(dim=1).max())
    if longest + max_new_tokens - 1 > model.cfg.n_ctx:
        raise ValueError(
            f"generate_answers: a prompt is {longest} tokens long, and with max_new_tokens={max_new_tokens} it does "
            f"not fit the model's context of {model.cfg.n_ctx}; generate fewer tokens or use fewer shots."
        )
    end = AnswerEnd.of(model.tokenizer, prompts.template)
    written = _generate(model, prompts, vector, scale, batch_size, max_new_tokens, every_new_token, end)
    texts = tuple(end.answer(row) for row in written)
    expected = [pair.output for pair in prompts.queries]
    matches = torch.tensor([exact_match(ours, theirs) for ours, theirs in zip(texts, expected, strict=True)])
    scores = torch.tensor([token_f1(ours, theirs) for ours, theirs in zip(texts, expected, strict=True)])
    return GeneratedAnswers(
        texts=texts,
        raw_texts=tuple(end.written(row) for row in written),
        ended=torch.tensor([end.reached(row) for row in written]),
        matches=matches,
        f1_scores=scores,
        interval=bootstrap_interval(matches, generator=copied(generator)),
        f1_interval=bootstrap_interval(scores, generator=generator),
        max_new_tokens=max_new_tokens,
        **asked(model, prompts, vector, scale),
    )


def _generate(
    model: Any,
    prompts: Prompts,
    vector: Steering | None,
    scale: float | int,
    batch_size: int | None,
    max_new_tokens: int,
    every_new_token: bool,
    end: AnswerEnd,
) -> list[list[int]]:
    """Greedy continuation of each prompt until its answer ends. The model's own ``generate`` guesses where padding is;
    we know it."""
    extra = torch.full((len(prompts),), max_new_tokens - 1)

    def run(rows: slice, _: int) -> list[list[int]]:
        batch = Batch.of(model, prompts, rows, keep=max_new_tokens > 1)
        with contextlib.ExitStack() as block:
            block.enter_context(changed(model, vector, scale, rows, len(prompts)))
            new = best_token(batch.first())
            written = [[token] for token in new.tolist()]
            if not every_new_token:
                block.close()
            for _ in range(max_new_tokens - 1):
                waiting = [not end.reached(row) for row in written]
                if not any(waiting):
                    break
                # rows that have ended go on beside the others, and what they write is dropped
                new = best_token(batch.reader.read(new[:, None], torch.ones_like(new[:, None]), n_read=1)[:, -1])
                for row, token, goes_on in zip(written, new.tolist(), waiting, strict=True):
                    if goes_on:
                        row.append(token)
        return written

    with torch.no_grad():
        parts = halving(run, context_batches(model, prompts, extra, batch_size), what="generate_answers")
        return [row for part in parts for row in part]
