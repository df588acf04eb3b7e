"""What prompts are refused for: too many tokens, tokens without an embedding, words unknown to the tokenizer."""

from collections.abc import Sequence
from typing import Any

from fvlens.prompts._templates import Template
from fvlens.relations import Pair

_NAMED = 5
"""Words that a message lists."""


def check_length(model: Any, n_tokens: int, n_shots: int, template: Template, text: str) -> None:
    """Refuse a prompt that is too long for the context together with its answer."""
    if n_tokens <= model.cfg.n_ctx:
        return
    remedy = f"use fewer shots (got {n_shots})" if n_shots else "leave this pair out"
    raise ValueError(
        f"a prompt with its answer is {n_tokens} tokens long, but the model's context holds {model.cfg.n_ctx}; "
        f"{remedy} or a shorter template (got {template.name!r}): {text[:60]!r}..."
    )


def check_embedded(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Refuse tokens that the model has no embedding for: a tokenizer may have been given more than the model."""
    largest = max(max(row, default=0) for row in rows)
    d_vocab = getattr(model.cfg, "d_vocab", None)  # prompts may be made for something that only has a tokenizer
    if d_vocab is not None and largest >= d_vocab:
        raise ValueError(
            f"a prompt or an answer holds the token {model.tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), "
            f"but the model has embeddings for ids below {d_vocab} only; leave the word out."
        )


def check_known(
    tokenizer: Any,
    template: Template,
    texts: Sequence[str],
    rows: Sequence[Sequence[int]],
    queries: Sequence[Pair],
    demonstrations: Sequence[Sequence[Pair]],
) -> None:
    """Refuse words that the tokenizer has no tokens for, and would all write as the same unknown one.

    Args:
        tokenizer: the tokenizer.
        template: how prompts are written.
        texts: prompts with their answers.
        rows: their tokens.
        queries, demonstrations: their words.
    """
    unknown = tokenizer.unk_token_id
    # the token may also stand in a text as it is written
    if unknown is None or not any(
        unknown in row and tokenizer.unk_token not in text for text, row in zip(texts, rows, strict=True)
    ):
        return
    words = dict.fromkeys(
        word for pair in [*queries, *(pair for own in demonstrations for pair in own)] for word in pair
    )
    found = [
        word for word in words if unknown in tokenizer(template.asked(word), add_special_tokens=False)["input_ids"]
    ]
    if not found:
        raise ValueError(
            f"the tokenizer does not know some of the template's text and writes it as {tokenizer.unk_token!r}; use "
            f"another template: {texts[0][:60]!r}..."
        )
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise ValueError(
        f"the tokenizer does not know {', '.join(map(repr, found[:_NAMED]))}{more} and writes {tokenizer.unk_token!r} "
        "in their place; leave these pairs out."
    )
