"""Notes that TransformerBridge keeps on the model while a forward runs, made the running thread's own.

How many rows the batch has, for the positions, and the cache of a generation stand in attributes of the model. Of two
threads that run one bridge, each would read the other's: an error of shapes, or a text continued from another prompt.
"""

import threading
import weakref
from typing import Any


class _OwnOfThread:
    """An attribute that each thread sets, reads and deletes for itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept = threading.local()

    def _values(self) -> Any:
        return self.kept.__dict__.setdefault("values", weakref.WeakKeyDictionary())

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None:
            return self
        try:
            return self._values()[owner]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, owner: Any, value: Any) -> None:
        self._values()[owner] = value

    def __delete__(self, owner: Any) -> None:
        if self._values().pop(owner, self) is self:
            raise AttributeError(self.name)


def part_threads(model: Any) -> None:
    """Make those attributes of a bridge thread-owned, for all bridges of its class; does nothing when done already."""
    notes = (
        (model, "_capture_hf_cache"),
        (model, "_last_hf_cache"),
        (getattr(model, "pos_embed", None), "_current_batch_size"),
    )
    for part, name in notes:
        kind = type(part)
        if kind.__module__.startswith("transformer_lens.") and not hasattr(kind, name):
            setattr(kind, name, _OwnOfThread(name))
