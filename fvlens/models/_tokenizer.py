"""The tokenizer's policy: it stays as the checkpoint has it, pads on the left, and may have one BOS token."""

from typing import Any


def give_tokenizer(model: Any, tokenizer: Any) -> None:
    """Set the tokenizer as it is; TransformerLens' own setters would load it again with settings of theirs."""
    if tokenizer is None:
        return
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    model.tokenizer = tokenizer
    first = tokenizer.encode("a")[:1]
    # else TransformerLens takes a BOS for padding where the two share a token
    model.cfg.default_prepend_bos = tokenizer.bos_token_id is not None
    model.cfg.tokenizer_prepends_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def bos_token_id(model: Any) -> int | None:
    """Id of the one BOS token that prompts start with; None if the model's tokenizer has none."""
    return None if model.tokenizer is None else model.tokenizer.bos_token_id
