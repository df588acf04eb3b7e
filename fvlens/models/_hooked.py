"""A HookedTransformer of settings and weights, as they are."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor


@contextlib.contextmanager
def quiet_deprecation() -> Iterator[None]:
    """Silence TransformerLens' notice that HookedTransformer will go in 4.0, at our own calls only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer", category=DeprecationWarning)
        yield


def lens(name: str) -> Any:
    """A class of TransformerLens that not every release has."""
    return getattr(importlib.import_module("transformer_lens"), name)


def hooked_transformer(cfg: Any, state: dict[str, Float[Tensor, "*axes"]]) -> Any:
    """A HookedTransformer of these settings on the CPU, with these weights and none of TransformerLens' processing.

    Its own loader goes through all modules once a tensor, which is 574 times for 30 layers. Here a block takes its
    weights at once, and what it took is let go.
    """
    with quiet_deprecation():
        model = lens("HookedTransformer")(cfg, move_to_device=False)
    state = model.fill_missing_keys(state)  # masks and the like, which no checkpoint holds
    parts: dict[str, list[str]] = {}
    for name in state:
        parts.setdefault(".".join(name.split(".")[:2]) if name.startswith("blocks.") else "", []).append(name)
    for prefix, names in parts.items():
        module = model.get_submodule(prefix)
        own = {name.removeprefix(f"{prefix}."): state.pop(name) for name in names}
        module.load_state_dict(own, strict=False)
    return model
