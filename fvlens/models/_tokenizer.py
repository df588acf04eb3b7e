"""The tokenizer's policy: it stays as the checkpoint has it, pads on the left, and may have one BOS token."""

from typing import Any


def beyond_embedding(tokenizer: Any, d_vocab: int, name: str) -> list[str]:
    """What to say of a tokenizer that knows more tokens than the model has embeddings for.

    Added tokens, such as one for padding, do no harm as long as no prompt holds them; padding is then done with
    another token.

    Raises:
        ValueError: words of the vocabulary itself have no embedding, or the BOS token has none.
    """
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= d_vocab}
    if not beyond:
        return []
    words = sorted(set(beyond) - set(tokenizer.get_added_vocab()))
    bos = tokenizer.bos_token_id
    if words or (bos is not None and bos >= d_vocab):
        example = words[0] if words else tokenizer.bos_token
        raise ValueError(
            f"load_model: the tokenizer of {name} has {len(beyond)} tokens that the model has no embedding for, such "
            f"as {example!r}; expected ids below {d_vocab}. Take the tokenizer that belongs to the model."
        )
    first = min(beyond, key=beyond.__getitem__)
    return [
        f"{len(beyond)} added tokens of the tokenizer have no embedding (such as {first!r}, {beyond[first]} of "
        f"{d_vocab}); no prompt may hold them"
    ]


def give_tokenizer(model: Any, tokenizer: Any) -> None:
    """Set the tokenizer as it is; TransformerLens' own setters would load it again with settings of theirs."""
    if tokenizer is None:
        return
    if tokenizer.pad_token is not None and tokenizer.pad_token_id >= model.cfg.d_vocab:
        tokenizer.pad_token = None  # it has no embedding
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
