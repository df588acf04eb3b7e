"""Shared vocabulary of the package: heads, the axis legend and the two protocols.

Axis legend (jaxtyping names used in every signature)
    ``prompt``     one prompt of a set           ``batch``   prompts run together
    ``pos``        token position (left-padded, the last token is at index -1)
    ``layer``      transformer block, 0 at the bottom
    ``head``       attention head inside a block ``d_head``  width of one head
    ``d_model``    width of the residual stream  ``d_vocab`` number of tokens
    ``answer_pos`` token position inside an answer
    ``variant``    one patched copy of a prompt  ``suffix``  positions that are run again
"""

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


class Head(NamedTuple):
    """One attention head, addressed as (layer, head)."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


HeadLike = Head | tuple[int, int] | list[int] | str
"""A head as it may be given: a :class:`Head`, a pair (layer, head), or its name, such as ``"L1H2"``."""


@runtime_checkable
class HookedModel(Protocol):
    """What fvlens asks of a model; TransformerLens' ``HookedTransformer`` and ``TransformerBridge`` satisfy it.

    Attributes:
        cfg: shape and kind of the model, under TransformerLens' names.
        tokenizer: a fast Hugging Face tokenizer, or None.
        hook_dict: hook name -> hook point; both classes name a block's residual stream and heads alike.
        blocks: the decoder blocks, each with ``attn.W_O [head d_head d_model]``.
    """

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> Any: ...

    @property
    def blocks(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Any: ...


def is_bridge(model: Any) -> bool:
    """Whether a model wraps a Hugging Face model (``TransformerBridge``) instead of having blocks of its own."""
    return hasattr(model, "original_model")


@runtime_checkable
class Steering(Protocol):
    """What :func:`fvlens.inject` takes: something that is added to activations at one token."""

    def additions(self) -> Mapping[str, Float[Tensor, "*axes"]]:
        """Hook name -> the tensor added there (``[d_model]`` or ``[head d_head]``; a leading batch axis is allowed)."""
        ...

    def check(self, model: Any) -> None:
        """Raise ``ValueError`` if this steering was not made for ``model``."""
        ...


def as_whole(value: Any, what: str, least: int = 0, most: int | None = None) -> int:
    """A whole number in a range. A truth value is none, nor is a float or a text that could be read as one.

    Raises:
        ValueError: something else, or a number out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{what}: expected a whole number, got {value!r}.")
    number = int(value)
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"{least}..{most}"
        raise ValueError(f"{what}: expected {wanted}, got {number}.")
    return number


def as_number(value: Any, what: str) -> float:
    """A finite number; neither a truth value nor a text.

    Raises:
        ValueError: something else, NaN or infinity.
    """
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # a whole number that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what}: expected a finite number, got {value!r}.")
    return number


def as_flag(value: Any, what: str) -> bool:
    """A truth value; no number or text that could be read as one.

    Raises:
        ValueError: something else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{what}: expected true or false, got {value!r}.")
    return value


def as_text(value: Any, what: str) -> str:
    """A text.

    Raises:
        ValueError: something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what}: expected a text, got {value!r}.")
    return value


def as_list(values: Any, what: str) -> list[Any]:
    """What a list or a tuple holds; a text or an object, which could be gone through as well, is none.

    Raises:
        ValueError: something else.
    """
    if not isinstance(values, list | tuple):
        raise ValueError(f"{what}: expected a list, got {values!r}.")
    return list(values)


def as_texts(values: Any, what: str) -> tuple[str, ...]:
    """Texts, out of a list or a tuple; a single text is none.

    Raises:
        ValueError: something else.
    """
    return tuple(as_text(value, what) for value in as_list(values, what))


_NAME = re.compile(r"\s*L(\d{1,6})\s*H(\d{1,6})\s*", re.ASCII | re.IGNORECASE)


def named_heads(text: str) -> list[Head] | None:
    """The heads of a text such as ``"L1H2, L3H4"``; None if it is no list of such names.

    Example:
        >>> named_heads("L1H2,L3H4")
        [Head(layer=1, head=2), Head(layer=3, head=4)]
    """
    found = [_NAME.fullmatch(name) for name in text.split(",")]
    return [Head(int(one[1]), int(one[2])) for one in found if one] if all(found) else None


def as_heads(heads: Iterable[HeadLike], n_layers: int, n_heads: int, what: str = "heads") -> list[Head]:
    """Turn ``Head``s, ``(layer, head)`` pairs or names such as ``"L1H2"`` into checked ``Head``s.

    ``what`` they are is for messages.

    Raises:
        ValueError: an entry is neither a pair of integers nor such a name, lies outside the model, or occurs twice.

    Example:
        >>> as_heads("L1H2, L0H3", n_layers=2, n_heads=4)
        [Head(layer=1, head=2), Head(layer=0, head=3)]
    """
    result: list[Head] = []
    for entry in heads.split(",") if isinstance(heads, str) else heads:
        named = named_heads(entry) if isinstance(entry, str) else None
        if named is not None and len(named) == 1:
            entry = named[0]
        if not isinstance(entry, tuple | list) or len(entry) != 2 or not all(map(_is_index, entry)):
            raise ValueError(
                f"{what}: expected (layer, head) pairs of integers, got {entry!r}; by name a head is 'L1H2'."
            )
        head = Head(int(entry[0]), int(entry[1]))
        if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
            raise ValueError(
                f"{what}: {head} does not exist: the model has layers 0..{n_layers - 1} and heads 0..{n_heads - 1}."
            )
        if head in result:
            raise ValueError(f"{what}: {head} is listed twice; give each head once.")
        result.append(head)
    return result


def _is_index(value: Any) -> bool:
    """Whether a value is a whole number of any kind, a tensor's too; True and False are none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Integral) and not isinstance(value, bool)
