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

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


class Head(NamedTuple):
    """One attention head, addressed as (layer, head)."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


HeadLike = Head | tuple[int, int] | list[int]


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


def as_heads(heads: Iterable[HeadLike], n_layers: int, n_heads: int) -> list[Head]:
    """Turn ``Head``s or ``(layer, head)`` pairs into checked ``Head``s.

    Raises:
        ValueError: an entry is not a pair of integers, lies outside the model, or occurs twice.
    """
    result: list[Head] = []
    for entry in heads:
        if not isinstance(entry, tuple | list) or len(entry) != 2 or not all(hasattr(i, "__index__") for i in entry):
            raise ValueError(f"heads: expected (layer, head) pairs of integers, got {entry!r}.")
        head = Head(int(entry[0]), int(entry[1]))
        if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
            raise ValueError(
                f"heads: {head} does not exist: the model has layers 0..{n_layers - 1} and heads 0..{n_heads - 1}."
            )
        if head in result:
            raise ValueError(f"heads: {head} is listed twice; give each head once.")
        result.append(head)
    return result
