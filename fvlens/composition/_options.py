"""The keywords that fitting a map and fitting a gate share, once."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from fvlens.training import Execution, ExecutionOptions


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a map or a gate is trained, and how that runs.

    Attributes:
        l2: weight of what is to stay small; None for the default of what is trained.
        lr: learning rate of Adam; None for the default of what is trained.
        epochs: passes over the analogies.
        batch_size: analogies in a step.
        execution: paths, memory, and how to stop and go on.
    """

    l2: float | None = None
    lr: float | None = None
    epochs: int = 20
    batch_size: int = 128
    execution: Execution = field(default_factory=Execution)

    @property
    def kept(self) -> dict[str, Any]:
        """How prompts are kept: ``path`` and ``max_memory``."""
        return {"path": self.execution.path, "max_memory": self.execution.max_memory}

    @property
    def train(self) -> dict[str, Any]:
        """What :func:`fvlens.training.train` takes of it."""
        return {name: getattr(self.execution, name) for name in ("progress", "resume", "checkpoint")}


class FittingOptions(ExecutionOptions, total=False):
    """Fields of :class:`Fitting` and :class:`~fvlens.training.Execution` as keywords, for type checkers."""

    l2: float | None
    lr: float | None
    epochs: int
    batch_size: int


def fitting(function: str, options: FittingOptions) -> Fitting:
    """How to fit, from keywords.

    Args:
        function: whose keywords they are.
        options: the keywords.

    Raises:
        TypeError: a keyword is none of them.
        ValueError: a number out of range.
    """
    given: dict[str, Any] = dict(options)
    unknown = next((name for name in given if name not in FittingOptions.__annotations__), None)
    if unknown is not None:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown!r}")
    how = {name: given.pop(name) for name in ExecutionOptions.__annotations__ if name in given}
    for name, least in (("epochs", 0), ("batch_size", 1), ("l2", 0)):
        number = given.get(name)
        if number is not None and not (math.isfinite(number) and number >= least):
            raise ValueError(f"{function}: expected {name} of at least {least}, got {number}.")
    lr = given.get("lr")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"{function}: expected lr over 0, or None for the default, got {lr}.")
    return dataclasses.replace(Fitting(**given), execution=Execution(**how))
