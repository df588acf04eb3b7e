"""The tokenizer's policy: it stays as the checkpoint has it, and pads on the left; what stands in front of a prompt."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

Bos = Literal["tokenizer", "one", "none"]
BOS_POLICIES: tuple[Bos, ...] = get_args(Bos)
"""What stands in front of a prompt: what the tokenizer puts in front of a text that it encodes; exactly one BOS token,
where the tokenizer has one; nothing. Never two of them."""

DEFAULT_BOS: Bos = "one"
"""As fvlens 0.1 did it."""


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
    if tokenizer.pad_token is None and (tokenizer.eos_token or tokenizer.bos_token):
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        tokenizer.padding_side = "right"  # on the left TransformerLens would look for padding, of which there is none
    model.tokenizer = tokenizer
    first = tokenizer.encode("a")[:1]
    # else TransformerLens takes a BOS for padding where the two share a token
    model.cfg.default_prepend_bos = tokenizer.bos_token_id is not None
    model.cfg.tokenizer_prepends_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def bos_token_id(model: Any) -> int | None:
    """Id of the tokenizer's BOS token; None if the model's tokenizer has none."""
    return None if model.tokenizer is None else model.tokenizer.bos_token_id


def check_bos(policy: Any, what: str = "") -> Bos:
    """The policy itself.

    Raises:
        ValueError: it is none.
    """
    if policy not in BOS_POLICIES:
        raise ValueError(f"{what}bos={policy!r}; expected one of {', '.join(BOS_POLICIES)}.")
    found: Bos = policy
    return found


def in_front(model: Any, policy: Bos, ids: Sequence[int] = ()) -> list[int]:
    """The tokens that a policy puts in front of a prompt with these tokens.

    A prompt that begins with a BOS token of its own, as chat formats may write it, gets no second one.

    Raises:
        ValueError: no such policy.
    """
    check_bos(policy)
    bos = bos_token_id(model)
    front = (
        _own_front(model.tokenizer) if policy == "tokenizer" else [bos] if policy == "one" and bos is not None else []
    )
    # a post-processor beside a tokenizer's own rule may give two
    while bos is not None and front[-2:] == [bos, bos]:
        del front[-1]
    return front[:-1] if front and ids and front[-1] == ids[0] == bos else front


def _own_front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text; what it puts behind one, such as an end, a prompt does not hold."""
    if tokenizer is None:
        return []
    whole, plain = (list(tokenizer(_WORD, add_special_tokens=own)["input_ids"]) for own in (True, False))
    starts = [i for i in range(len(whole) - len(plain) + 1) if plain and whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


_WORD = "a"


def bos_differs(model: Any, one: Bos, other: Bos) -> bool:
    """Whether two policies put different tokens in front of this model's prompts."""
    return in_front(model, one) != in_front(model, other)
