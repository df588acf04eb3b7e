"""Telling the forwards of one ``generate`` call from separate forwards, and asking both about their padding."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal

from fvlens.interventions._context import Method
from fvlens.interventions._padding import refuse_right_padding
from fvlens.types import is_bridge

Positions = Literal["last", "every_new", "all"]

_under_way: contextvars.ContextVar[tuple[tuple[Any, dict[object, int]], ...]] = contextvars.ContextVar(
    "fvlens_generations", default=()
)
"""The ``generate`` calls of this context: the model, and the length of the prompt as each hook saw it first."""


def generation_of(model: Any) -> dict[object, int] | None:
    """Prompt lengths of the innermost ``generate`` call of this model that is under way here; None outside."""
    return next((lengths for owner, lengths in reversed(_under_way.get()) if owner is model), None)


def touched(model: Any, key: object, length: int, positions: Positions) -> slice | None:
    """Positions of an activation of this length that the hook ``key`` edits; None for none of them."""
    if positions == "all":
        return slice(None)
    prompt_lengths = generation_of(model)
    if prompt_lengths is None:  # a forward of its own
        return slice(length - 1, length)
    if key not in prompt_lengths:  # the prompt of this generate call
        prompt_lengths[key] = length
        return slice(length - 1, length)
    last = prompt_lengths[key] - 1
    if length == 1:  # a new token with a cache (without one, the length grows beyond the prompt's)
        return slice(0, 1) if positions == "every_new" else None
    return slice(last, None if positions == "every_new" else last + 1)


@contextlib.contextmanager
def _generating(model: Any, prompt_lengths: dict[object, int]) -> Iterator[None]:
    """Forwards of the model in this block belong to one ``generate`` call."""
    token = _under_way.set((*_under_way.get(), (model, prompt_lengths)))
    try:
        yield
    finally:
        _under_way.reset(token)


def watching(model: Any, caller: str) -> dict[tuple[Any, str], Method]:
    """What is put around a model's own methods while a block that acts at the last position is open."""

    def forward(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if generation_of(model) is None:  # a generate call is asked about its prompts only
            refuse_right_padding(model, caller, plain, args, kwargs)
        return plain(*args, **kwargs)

    def whole(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        refuse_right_padding(model, caller, generate, args, kwargs, pads_left=True)
        with _generating(model, {}):
            return generate(*args, **kwargs)

    def stream(generate_stream: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any) -> Iterator[Any]:
        refuse_right_padding(model, caller, generate_stream, args, kwargs, pads_left=is_bridge(model))
        prompt_lengths: dict[object, int] = {}
        items = generate_stream(*args, **kwargs)
        while True:
            with _generating(model, prompt_lengths):  # not between the items: the caller may run the model there
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    methods = {"forward": forward, "generate": whole, "hf_generate": whole, "generate_stream": stream}
    if is_bridge(model):
        methods["run_with_cache"] = forward  # gives the tokens of a text to Hugging Face's forward
    return {(model, name): method for name, method in methods.items() if getattr(model, name, None) is not None}
