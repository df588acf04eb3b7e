"""What pairs are worth: how many are kept, how they split, and what their answers are to a tokenizer."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fvlens.prompts._prompts import Prompts, render_prompts
from fvlens.prompts._templates import Template, get_template
from fvlens.relations import Dropped, Pairs, Reading, Relation, Split, reading_of
from fvlens.showing import Shown, named

if TYPE_CHECKING:
    import pandas as pd

_TRAINED = 20
"""Pairs that trainings take by default."""


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """The different answers of some prompts, to the tokenizer.

    Attributes:
        n: different answers.
        n_one_token: those of one token.
        n_first_tokens: different first tokens.
        n_sharing: answers that share their first token with another answer.
    """

    n: int
    n_one_token: int
    n_first_tokens: int
    n_sharing: int

    @classmethod
    def of(cls, prompts: Prompts) -> "AnswerTokens":
        """Counted over the prompts' answers, as they are scored."""
        rows = {tuple(token for token in row if token >= 0) for row in prompts.answer_tokens.tolist()}
        first = Counter(row[0] for row in rows)
        return cls(
            n=len(rows),
            n_one_token=sum(len(row) == 1 for row in rows),
            n_first_tokens=len(first),
            n_sharing=sum(count for count in first.values() if count > 1),
        )

    @property
    def caution(self) -> str:
        """What must be said of top-1 on first tokens; empty if nothing."""
        if not self.n_sharing:
            return ""
        return (
            f"{self.n_sharing} of {self.n} different answers share their first token with another, so top-1, which "
            "looks at first tokens, counts wrong answers as right; look at exact, the whole answer, instead."
        )


@dataclass(frozen=True, slots=True, repr=False)
class PairsCheck(Shown):
    """What pairs are worth, before anything is run on them.

    Attributes:
        relation: the pairs that are used.
        dropped: pairs that are not, with place and reason.
        notes: what else reading them changed.
        n_in_input: answers that stand in their own input already.
        split: the parts that training, choosing and testing would get; None where it cannot be split.
        no_split: why not; empty if it can.
        answers: the answers to the model's tokenizer; None without a model.
        model_name: the model's name in its configuration; empty without one.
        template: how the prompts were written.
    """

    relation: Relation
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]
    n_in_input: int
    split: Split | None
    no_split: str
    answers: AnswerTokens | None
    model_name: str
    template: Template

    @property
    def trainable(self) -> bool:
        """Whether twenty pairs can be trained on, beside some for choosing and testing."""
        return self.split is not None and len(self.split.train) >= _TRAINED

    @property
    def cautions(self) -> tuple[str, ...]:
        """What must be said of results on these pairs; empty if nothing."""
        said = [self.no_split]
        if self.split is not None:
            n = len(self.split.train)
            if not self.trainable:
                said.append(
                    f"only {n} pairs are left for training, where {_TRAINED} are usual; a relation of {2 * _TRAINED} "
                    "pairs or more leaves so many."
                )
            if self.split.disjoint == "input":
                said.append(
                    "outputs recur too often to be kept apart: answers of the test part were seen with other inputs."
                )
        if self.n_in_input:
            said.append(f"{self.n_in_input} answers stand in their own input, so that copying gives them.")
        said.append(self.answers.caution if self.answers is not None else "")
        return tuple(text for text in said if text)

    def rows(self) -> list[tuple[str, str]]:
        """The table: what was counted, and the number, with that of which it is a part."""
        n = len(self.relation)
        twice = sum(one.why == "stands twice" for one in self.dropped)
        told = [
            ("pairs kept", f"{n}"),
            ("dropped, stand twice", f"{twice}"),
            ("dropped, another output before", f"{len(self.dropped) - twice}"),
            ("answers in their own input", f"{self.n_in_input} of {n}"),
        ]
        if self.answers is not None:
            of = f" of {self.answers.n} different"
            told += [
                ("answers of one token", f"{self.answers.n_one_token}{of}"),
                ("answers that share their first token", f"{self.answers.n_sharing}{of}"),
                ("different first tokens", f"{self.answers.n_first_tokens}"),
            ]
        split = self.split
        parts = ("-", "-", "-") if split is None else (len(split.train), len(split.valid), len(split.test))
        apart = {None: "-", "both": "inputs and outputs", "input": "inputs only"}
        return [
            *told,
            ("train, valid, test pairs", ", ".join(map(str, parts))),
            ("kept apart between them", apart[None if split is None else split.disjoint]),
            (f"{_TRAINED} pairs to train on", "yes" if self.trainable else "no"),
        ]

    def _line(self) -> str:
        n, left = len(self.relation), len(self.dropped)
        shared = "" if self.answers is None else f", {self.answers.n_first_tokens} different first tokens"
        return f"{named(self.relation.name)}: {n} pairs kept, {left} dropped{shared}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [("what", "number"), *self.rows()]

    def to_dataframe(self) -> "pd.DataFrame":
        """The table of :meth:`rows`: ``what, number``."""
        import pandas as pd

        return pd.DataFrame(self.rows(), columns=["what", "number"])


def check_pairs(
    pairs: Pairs, model: Any = None, *, template: str | Template = "qa", generator: torch.Generator
) -> PairsCheck:
    """What pairs are worth, before anything is run on them: a small table, and what must be said.

    Args:
        pairs: in any shape, see :func:`fvlens.relations.as_relation`.
        model: the model whose tokenizer is asked; without one nothing is said of tokens.
        template: how prompts are written, which decides where an answer's tokens begin.
        generator: draws the split.

    Returns:
        :class:`PairsCheck`: ``.rows()``, ``.cautions``, ``.dropped``, ``.split``, ``.answers``.

    Raises:
        ValueError: pairs that cannot be read; whatever :func:`~fvlens.prompts.render_prompts` refuses.

    Example:
        >>> import torch
        >>> from fvlens.prompts import check_pairs
        >>> pairs = [("hot", "cold"), ("big", "small"), ("hot", "cool")]
        >>> found = check_pairs(pairs, generator=torch.Generator().manual_seed(0))
        >>> len(found.relation), found.dropped[0].why, found.trainable
        (2, "another output, 'cold', stands before it", False)
    """
    return checked(reading_of(pairs, what="check_pairs"), model, template=template, generator=generator)


def checked(
    reading: Reading, model: Any = None, *, template: str | Template = "qa", generator: torch.Generator
) -> PairsCheck:
    """:func:`check_pairs` of pairs that were read already."""
    relation = reading.relation
    template = get_template(template)
    split, no_split = None, ""
    try:
        split = relation.split(generator)
    except ValueError as error:
        no_split = str(error)
    answers = None
    if model is not None:
        bare = render_prompts(model, relation.pairs, [()] * len(relation), template=template, n_shots=0)
        answers, template = AnswerTokens.of(bare), bare.template
    return PairsCheck(
        relation=relation,
        dropped=reading.dropped,
        notes=reading.notes,
        n_in_input=sum(pair.output.casefold() in pair.input.casefold() for pair in relation.pairs),
        split=split,
        no_split=no_split,
        answers=answers,
        model_name="" if model is None else str(model.cfg.model_name),
        template=template,
    )
