"""What both kinds of vectors are made of: checked numbers, and the heads that were chosen."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fvlens.activations import HeadMeans
from fvlens.models import check_model
from fvlens.types import Head, HeadLike, as_heads

INTERRUPTED = "a training that was interrupted, the best of the epochs that were finished"
"""What is said of a vector that is not complete."""


def as_float32(values: Shaped[Tensor, "*axes"], what: str) -> Float[Tensor, "*axes"]:
    """Numbers of a result: float32, on the CPU, apart from whatever computed them.

    Raises:
        ValueError: they are not of a floating precision, or one of them is NaN or infinite, if only in float32.
    """
    if not values.is_floating_point():
        raise ValueError(f"{what}: expected numbers of a floating precision, got {values.dtype}.")
    # what is so already stays itself, so that results that share it compare equal
    found = (values.detach() if values.requires_grad else values).float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{what} holds NaN or infinite values.")
    return found


def chosen_heads(model: Any, means: HeadMeans, heads: Iterable[HeadLike]) -> tuple[list[Head], Tensor]:
    """The heads of a vector, checked, and the means that it takes of them."""
    chosen = as_heads(heads, model.cfg.n_layers, model.cfg.n_heads)
    if not chosen:
        raise ValueError("heads: expected at least one head, got none.")
    if means.positions != "last":
        raise ValueError(f"expected means of the last token, got means at {means.positions!r}.")
    check_model(means.fingerprint, model, "the means of the heads")
    return chosen, means.z
