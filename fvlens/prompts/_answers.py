"""Answers: their tokens behind a prompt, and where one that a model writes ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fvlens.prompts._templates import Template


def answers_behind(
    tokenizer: Any, template: Template, texts: Sequence[str], ids: Sequence[Sequence[int]], answers: Sequence[str]
) -> list[list[int]]:
    """Tokens of answers, each as it continues the text of its prompt, whose tokens are ``ids``.

    This is the one place where an answer becomes tokens. Where the tokenizer merges across the border of prompt and
    answer, they are those of the answer by itself.
    """
    said = [template.answered(answer) for answer in answers]
    whole = tokenizer([text + own for text, own in zip(texts, said, strict=True)], add_special_tokens=False)
    found: list[list[int]] = []
    for own, before, continued in zip(said, ids, whole["input_ids"], strict=True):
        n = len(before)
        merged = list(continued[:n]) != list(before) or len(continued) == n
        found.append(list(tokenizer(own, add_special_tokens=False)["input_ids"] if merged else continued[n:]))
    return found


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """Where an answer that a model writes ends: at the template's separator, or at an end token.

    The separator is the text that follows ``{output}`` in the template's demonstrations; where it begins with a line
    break, the first one ends the answer. Where it begins with a token of the tokenizer's own, such as a chat format's
    end of turn, this token does.

    Attributes:
        tokenizer: the model's.
        text: the separator; None if nothing visible follows an answer, or a token does.
        tokens: the tokens that end an answer: the tokenizer's end token, and that of the template.
    """

    tokenizer: Any
    text: str | None
    tokens: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, template: Template) -> "AnswerEnd":
        """Where answers in this template end."""
        after = template.demonstration.split("{output}")[1].split("{input}")[0]
        ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
        if after.startswith("\n"):
            return cls(tokenizer, "\n", frozenset(ends))
        if not after.strip():
            return cls(tokenizer, None, frozenset(ends))
        begins = int(tokenizer(after.strip(), add_special_tokens=False)["input_ids"][0])
        if begins in tokenizer.get_added_vocab().values():
            return cls(tokenizer, None, frozenset(ends | {begins}))
        return cls(tokenizer, after, frozenset(ends))

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether these tokens, all that the model wrote so far, end the answer."""
        if ids and ids[-1] in self.tokens:
            return True
        return self.text is not None and self.text in self.written(ids)

    def until(self, ids: Sequence[int]) -> list[int]:
        """The first of these tokens that end the answer; all of them if it does not end."""
        return list(next((ids[:n] for n in range(1, len(ids)) if self.reached(ids[:n])), ids))

    def written(self, ids: Sequence[int]) -> str:
        """These tokens as text, without an end token behind them."""
        kept = ids[:-1] if ids and ids[-1] in self.tokens else ids
        return self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)

    def answer(self, ids: Sequence[int]) -> str:
        """What stands before the end, without white space around it."""
        text = self.written(ids)
        return (text if self.text is None else text.split(self.text)[0]).strip()
