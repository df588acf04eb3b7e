"""Refusing batches whose last position is not each prompt's last token: padded on the right, or with an end behind."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def refuse_right_padding(
    model: Any,
    caller: str,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    pads_left: bool = False,
) -> None:
    """ValueError if these arguments of a forward or generating method hold a batch that is padded on the right.

    Or strings that the tokenizer puts a token of its own behind, such as an end.

    Strings are looked at as they will be padded, tokens by their mask. Tokens without a mask are refused where some
    rows, but not all, end with padding tokens behind others: only such a batch can have been padded on the right.

    Args:
        model: the model.
        caller: the function that opened the block, for messages.
        method: the method that gets the arguments.
        args: its arguments.
        kwargs: its arguments by name.
        pads_left: the method pads strings on the left, whatever the tokenizer does.
    """
    try:
        given = inspect.signature(method).bind_partial(*args, **kwargs).arguments
    except TypeError:  # not its arguments: it says so itself
        return
    given = {**given, **given.get("kwargs", {}), **given.get("generation_kwargs", {})}
    value = given.get("input")
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
        _refuse_ends(model, caller)
    if isinstance(value, list) and len(value) > 1 and not pads_left:
        side = given.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
        if side == "right":
            _refuse_strings(model, caller, value, given.get("prepend_bos"))
    mask = given.get("attention_mask")
    if mask is None:
        mask = given.get("one_zero_attention_mask")
    if isinstance(mask, Tensor):
        if mask.ndim == 2 and not bool((mask[:, -1] != 0).all()):
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise ValueError(
                f"{caller}: attention_mask is 0 at the last position of prompt {row}: the batch is padded on the "
                f"right, and the last position is what is changed; pad on the left (padding_side='left')."
            )
    elif isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
        _refuse_tokens(model, caller, value)


def _refuse_ends(model: Any, caller: str) -> None:
    """What the model makes of a text must end as the text does."""
    if model.tokenizer is None:  # the model says so itself
        return
    plain = model.tokenizer(_WORD, add_special_tokens=False)["input_ids"]
    behind = int(model.to_tokens(_WORD)[0, -1])
    if plain and behind != plain[-1]:
        token = model.tokenizer.convert_ids_to_tokens(behind)
        raise ValueError(
            f"{caller}: the tokenizer puts {token!r} behind every text, and the last position is what is changed; give "
            "tokens without it, such as those of fvlens.build_prompts."
        )


_WORD = "a"


def _refuse_strings(model: Any, caller: str, texts: list[str], prepend_bos: bool | None) -> None:
    lengths = [model.to_tokens(text, prepend_bos=prepend_bos).shape[-1] for text in texts]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{caller}: the texts have {min(lengths)} to {max(lengths)} tokens and would be padded on the right, but "
            "the last position is what is changed; pass padding_side='left', or set model.tokenizer.padding_side = "
            "'left'."
        )


def _refuse_tokens(model: Any, caller: str, tokens: Tensor) -> None:
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if pad is None or len(tokens) < 2:
        return
    padding = tokens == pad
    ends = padding[:, -1]
    suspect = ends & ~padding.all(dim=1)
    if bool(suspect.any()) and not bool(ends.all()):
        raise ValueError(
            f"{caller}: prompt {int(suspect.nonzero()[0])} ends with the padding token {pad}, and others do not: is "
            "the batch padded on the right? The last position is what is changed; pad on the left "
            "(padding_side='left'). If that token belongs to the prompt, say so by attention_mask, or run it alone."
        )
