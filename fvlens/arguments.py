"""What the public functions are given, checked against their own annotations.

A wrong argument deep inside a computation becomes an error of a backend that names neither function nor argument. So
each public function begins with ``check_arguments(itself, locals())``: every argument must be of a kind that its
annotation says, and the message names it. Ranges that depend on the model or on other arguments are the function's own;
so are pairs, which have a reader (:func:`fvlens.relations.as_relation`).
"""

import functools
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, Unpack, get_args, get_origin

import torch
from jaxtyping import AbstractArray
from torch import Tensor

MOST = 1_000_000
"""Prompts, demonstrations, epochs, ... that are believed to be meant."""
_COUNTS = ("n_prompts", "n_shots", "n_corrupted", "n_random", "n_steps", "n_train", "epochs", "max_new_tokens")


def check_arguments(
    function: Callable[..., Any], given: Mapping[str, Any], *, runs: bool = False, trains: bool = False
) -> None:
    """Refuse arguments of another kind than a function's annotations say, and states of torch that make numbers wrong.

    Args:
        function: the function, for its name and annotations.
        given: its arguments by name, ``locals()`` in its first line; keywords that were collected in one are looked
            into.
        runs: it runs the model as it is, so that a model that drops out activations is refused.
        trains: it takes gradients, which ``torch.inference_mode`` forbids.

    Raises:
        ValueError: an argument is of another kind, a number is not finite, a count is beyond :data:`MOST`, a generator
            is not on the CPU, or ``model`` is no model of TransformerLens; torch's default precision is not float32;
            the model is in train mode and has dropout; inference mode where gradients are taken.
    """
    name = function.__name__
    _check_state(name, trains)
    check_kinds(name, function, given)
    if runs and getattr(given["model"], "training", False):
        _refuse_dropout(name, given["model"])
    if trains and any(parameter.is_inference() for parameter in given["model"].parameters()):
        raise ValueError(
            f"{name}: the model was loaded or changed under torch.inference_mode(), so that no gradient can be taken "
            "through it; load it outside."
        )


def check_kinds(name: str, annotated: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse values of another kind than the annotations of a function, or of a class' fields, say.

    Raises:
        ValueError: as for :func:`check_arguments`, but for the state of torch and of the model.
    """
    for argument, hint in _hints(annotated).items():
        if argument not in given:
            continue
        value = given[argument]
        if get_origin(hint) is Unpack:
            inner = typing.get_type_hints(get_args(hint)[0])
            for key, one in value.items():
                if key in inner:
                    _check(f"{name}: {key}", key, inner[key], one)
        else:
            _check(f"{name}: {argument}", argument, hint, value)


def _check_state(name: str, trains: bool) -> None:
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(
            f"{name}: torch's default precision is {torch.get_default_dtype()}, in which numbers would be made that "
            "should be float32; call torch.set_default_dtype(torch.float32). A model's own precision is that of "
            "load_model(dtype=)."
        )
    if trains and torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: gradients cannot be taken under torch.inference_mode(); leave the block. torch.no_grad() is no "
            "hindrance."
        )


def _refuse_dropout(name: str, model: Any) -> None:
    """Refuse a model in train mode if a part of it drops out activations."""
    whole = [model, model.original_model] if hasattr(model, "original_model") else [model]
    for part in (part for one in whole for part in one.modules()):
        rates = [
            value
            for key, value in vars(part).items()
            if "drop" in key or (key == "p" and "Drop" in type(part).__name__)
        ]
        if part.training and any(isinstance(rate, float) and rate > 0 for rate in rates):
            raise ValueError(
                f"{name}: the model is in train mode and drops out activations at random ({type(part).__name__}), so "
                "that its numbers change from call to call; call model.eval()."
            )


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _check(what: str, name: str, hint: Any, value: Any) -> None:
    if name == "model":
        if value is not None or NoneType not in get_args(hint):
            _check_model(what, value)
        return
    if not _fits(hint, value):
        remedy = "; put them into a list" if isinstance(value, str) and " a list" in f" {_said(hint)}" else ""
        raise ValueError(f"{what}: expected {_said(hint)}, got {_shown(value)}{remedy}.")
    if name in _COUNTS and isinstance(value, Integral) and int(value) > MOST:
        raise ValueError(f"{what}: expected at most {MOST}, got {value}.")
    if isinstance(value, torch.Generator) and value.device.type != "cpu":
        raise ValueError(f"{what}: expected a generator on the CPU, torch.Generator(), got one on {value.device}.")


def _check_model(what: str, value: Any) -> None:
    if hasattr(value, "cfg"):  # what else is needed of it, the function knows
        return
    if hasattr(value, "config") and hasattr(value, "save_pretrained"):
        raise ValueError(
            f"{what}: expected a model of TransformerLens, got {_shown(value)}, a plain Hugging Face model; save it "
            "with save_pretrained(folder), its tokenizer too, and take fvlens.load_model(folder)."
        )
    raise ValueError(f"{what}: expected a model, such as fvlens.load_model('rel-small') gives, got {_shown(value)}.")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a kind; what is not told apart here fits."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(one, value) for one in inner)
    if hint in (NoneType, None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
    if origin is Literal:
        return isinstance(value, str)  # which one, the function says
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return isinstance(value, Tensor)
    if origin in (Sequence, Iterable, list, tuple):
        return _fits_many(inner, value)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    if isinstance(hint, type):
        return isinstance(value, hint) and not (issubclass(hint, tuple) and isinstance(value, str))
    return True


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _fits_many(inner: tuple[Any, ...], value: Any) -> bool:
    if inner[:1] == (Any,):
        return True  # pairs: their reader knows better
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return False
    if isinstance(value, Tensor) and not value.ndim:
        return False
    kinds = get_args(inner[0]) or inner[:1]
    if isinstance(value, Iterator) or any(not isinstance(kind, type) or issubclass(kind, tuple) for kind in kinds):
        return True  # going through it would use it up, or its entries have a reader
    return all(_fits(inner[0], one) for one in value)


_NAMES = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", NoneType: "None",
    torch.dtype: "a precision of torch, such as torch.bfloat16",
}  # fmt: skip


def _said(hint: Any) -> str:
    """A kind in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        # one word for int and float together, and for texts of several kinds
        words = list(dict.fromkeys(_said(one) for one in inner if not (one is int and float in inner)))
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if hint in _NAMES:
        return _NAMES[hint]
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return f"a tensor [{hint.dim_str.strip()}]"
    if origin in (Sequence, Iterable, list, tuple):
        each = {int: "whole numbers", str: "texts", float: "finite numbers"}
        kind = next(iter(get_args(inner[0])), inner[0]) if inner else None
        return f"a list of {each.get(kind, kind.__name__)}" if isinstance(kind, type) else "a list"
    if origin in (Mapping, dict):
        return "a mapping"
    return f"a {getattr(hint, '__name__', hint)}"


def _shown(value: Any) -> str:
    """A value for a message: short ones as they are, others by their class."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:80]
    if isinstance(value, list | tuple) and all(
        one is None or isinstance(one, bool | int | float | str) for one in value
    ):
        return repr(list(value))[:80]
    return f"a {type(value).__name__}"
