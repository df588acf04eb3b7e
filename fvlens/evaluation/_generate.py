"""Whole answers, generated greedily."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.evaluation._answered import Answered, asked
from fvlens.evaluation._prompting import Asked, Prompting, asked_prompts, copied
from fvlens.metrics import Interval, best_token, bootstrap_interval, exact_match, token_f1
from fvlens.prompts import Prompts, Template
from fvlens.scoring import Batch, changed, context_batches, note_other_bos
from fvlens.showing import span
from fvlens.suffix import halving
from fvlens.types import Steering

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class GeneratedAnswers(Answered):
    """Generated answers against the expected ones, one entry a query, in the order of the pairs.

    Attributes:
        texts: the generated answers, cut where the template ends an answer, without white space around them.
        raw_texts: everything that was generated.
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
        """One row a query: ``query, answer, text, exact_match, f1`` and the setting."""
        return self._table(text=list(self.texts), exact_match=self.matches.numpy(), f1=self.f1_scores.numpy())

    def plot(self) -> "go.Figure":
        """Exact match and F1 as bars with their intervals."""
        from fvlens import plots

        intervals = (self.interval, self.f1_interval)
        return plots.bars(
            ["exact match", "F1 of words"],
            [self.exact_match, self.f1],
            [interval.low for interval in intervals],
            [interval.high for interval in intervals],
            x_title="Mean over queries",
            title=f"Generated answers, {self.name} ({self.setting}, {self.n} queries)",
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

    The answer is cut at the text that follows ``{output}`` in the template's demonstrations (for a line break: at the
    first one) and at the end-of-text token. The vector is added at the prompt's last token. The embedded model was
    trained on answers of one token and not on what follows them: give it ``max_new_tokens=1``.

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
    ids = _generate(model, prompts, vector, scale, batch_size, max_new_tokens, every_new_token)
    end, eos = _end_of_answer(prompts.template), model.tokenizer.eos_token_id
    kept = [row[: row.index(eos)] if eos in row else row for row in ids.tolist()]
    raw = tuple(model.tokenizer.batch_decode(kept))
    texts = tuple((text.split(end)[0] if end else text).strip() for text in raw)
    expected = [pair.output for pair in prompts.queries]
    matches = torch.tensor([exact_match(ours, theirs) for ours, theirs in zip(texts, expected, strict=True)])
    scores = torch.tensor([token_f1(ours, theirs) for ours, theirs in zip(texts, expected, strict=True)])
    return GeneratedAnswers(
        texts=texts,
        raw_texts=raw,
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
) -> Int[Tensor, "prompt new"]:
    """Greedy continuation of each prompt. The model's own ``generate`` guesses where padding is; we know it."""
    extra = torch.full((len(prompts),), max_new_tokens - 1)

    def run(rows: slice, _: int) -> Tensor:
        batch = Batch.of(model, prompts, rows, keep=max_new_tokens > 1)
        with contextlib.ExitStack() as block:
            block.enter_context(changed(model, vector, scale, rows, len(prompts)))
            new = [best_token(batch.first())[:, None]]
            if not every_new_token:
                block.close()
            for _ in range(max_new_tokens - 1):
                logits = batch.reader.read(new[-1], torch.ones_like(new[-1]), n_read=1)[:, -1]
                new.append(best_token(logits)[:, None])
        return torch.cat(new, dim=1).cpu()

    with torch.no_grad():
        return torch.cat(
            list(halving(run, context_batches(model, prompts, extra, batch_size), what="generate_answers"))
        )


def _end_of_answer(template: Template) -> str | None:
    """Text that ends an answer in this template's demonstrations; None if nothing visible follows it."""
    after = template.demonstration.split("{output}")[1].split("{input}")[0]
    if after.startswith("\n"):
        return "\n"
    return after if after.strip() else None
