"""What is kept of a model's weights, and how it is noticed that they are no longer those.

Whatever is derived from all weights (a fingerprint, the engine's laid-out copy) is made once a model and goes with it.
Before it is used again the parameters and buffers are looked at: the objects, where their numbers lie, their
``_version`` and 64 entries of each, spread evenly. Only a change that all of this misses needs :func:`refresh`.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

N_SEEN = 64
"""Entries of every tensor that are compared."""


class Looks:
    """How a model's parameters and buffers look: which objects, where their numbers lie, versions, 64 entries of each.

    Args:
        model: the model.
        hold: keep the entries as views, which show what the storage holds whenever they are read: faster, but tensors
            that the model no longer has stay until the next look.
    """

    def __init__(self, model: Any, *, hold: bool) -> None:
        tensors = _tensors(model)
        self.places = [_place(tensor) for tensor in tensors]
        views = [spread(tensor.detach()) for tensor in tensors]
        self.entries = _read(views)
        self.views = views if hold else None

    def still(self, model: Any) -> bool:
        """Whether the model looks the same."""
        tensors = _tensors(model)
        if [_place(tensor) for tensor in tensors] != self.places:
            return False
        views = [spread(tensor.detach()) for tensor in tensors] if self.views is None else self.views
        return all(torch.equal(now, then) for now, then in zip(_read(views), self.entries, strict=True))


def _read(views: list[Tensor]) -> list[Tensor]:
    """What the views show now, those of one precision and device together."""
    kinds: dict[Any, list[Tensor]] = {}
    for view in views:
        kinds.setdefault((view.dtype, view.device), []).append(view)
    return [torch.cat(some).cpu() for some in kinds.values()]


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def spread(numbers: Tensor) -> Tensor:
    """At most 64 of a tensor's entries, evenly spread, as a view."""
    if not numbers.is_contiguous():  # transposed, for the most part: put its axes in the order they lie in
        numbers = numbers.permute(sorted(range(numbers.ndim), key=numbers.stride, reverse=True))
    if numbers.is_contiguous():
        flat = numbers.view(-1)
    else:
        flat = numbers
        while flat.ndim > 1:
            flat = flat.diagonal()
    return flat[:: max(1, len(flat) // N_SEEN)][:N_SEEN]


_kept: "weakref.WeakKeyDictionary[Any, dict[str, tuple[Looks, Any]]]" = weakref.WeakKeyDictionary()


def of_weights(model: Any, name: str, make: Callable[[], Any], *, hold: bool = False) -> Any:
    """What was made of a model's weights under a name, if they still look the same; else it is made anew.

    Args:
        model: the model.
        name: what is made.
        make: makes it. What it gives must not hold the model, or both would stay for good.
        hold: it holds the model's tensors anyway, so that these may be held to look at them.
    """
    kept = _kept.setdefault(model, {})
    known = kept.get(name)
    if known is not None and known[0].still(model):
        return known[1]
    known = None
    kept.pop(name, None)  # the old one goes before the new one is made
    with torch.inference_mode(False), torch.no_grad():
        looks = Looks(model, hold=hold)
        made = make()
    kept[name] = looks, made
    return made


def is_kept(model: Any, name: str) -> bool:
    """Whether something of this name was made of the model's weights, current or not."""
    return name in _kept.get(model, {})


def refresh(model: Any) -> None:
    """Forget what was kept of a model's weights: its fingerprint, and the copy that exact effects and scores run over.

    Call it after a change of the weights that nothing else notices. Noticed are, at each use, whatever torch counts (an
    optimiser's step, ``load_state_dict``, an operation in place), other tensors or another precision in their place,
    and assignments through ``.data`` or shared memory that change any of 64 entries of a parameter, spread evenly. Not
    noticed is an assignment through ``.data`` or shared memory to other entries alone.

    Args:
        model: the model, of either class.

    Example:
        >>> import fvlens
        >>> from fvlens.models import refresh
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> model.unembed.W_U.data[3, 4] += 1.0
        >>> refresh(model)
    """
    _kept.pop(model, None)
