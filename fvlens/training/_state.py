"""What a training needs to go on: kept on disk, or for a moment in case it is interrupted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fvlens.files import read_tensors, write_tensors
from fvlens.prompts import TEMPLATES

STATE_FORMAT = "fvlens-training-1"
_OLD_METHODS = {
    "VectorAdapter": "VectorChange",
    "DistributedAdapter": "DistributedChange",
}
"""Names that version 0.1 gave to what is trained."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that training needs to go on as if it had never stopped.

    Attributes:
        tensors: parameters, Adam's moments, best vectors, curves, and the state of each generator.
        header: epoch, settings, and what was trained, on which model.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]

    def save(self, path: str | FilePath) -> FilePath:
        """Write the state to one safetensors file, at once."""
        return write_tensors(FilePath(path), self.tensors, self.header, STATE_FORMAT)

    @classmethod
    def load(cls, path: str | FilePath) -> "TrainingState":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: no such file, or not a training state.
        """
        return cls(*read_tensors(FilePath(path), STATE_FORMAT))

    def check(self, identity: Mapping[str, Any], whose: str) -> None:
        """Raise ``ValueError`` if this is of a training with another identity; ``whose`` is who asks."""
        for name, ours in identity.items():
            theirs = self.header.get(name)
            if name == "settings":
                theirs = _with_whole_template(theirs)
            elif name == "method":
                theirs = _OLD_METHODS.get(theirs, theirs) if isinstance(theirs, str) else theirs
            if theirs != ours and not (name == "fingerprint" and _same_model(ours, theirs)):
                raise ValueError(f"{whose}: the saved training has {name} {theirs!r}, this one {ours!r}.")


def _with_whole_template(settings: Any) -> Any:
    """Settings as they are now: version 0.1 wrote the name of the template alone."""
    if not isinstance(settings, dict) or not isinstance(settings.get("template"), str):
        return settings
    known = TEMPLATES.get(settings["template"])
    return settings if known is None else settings | {"template": known.to_json()}


def _same_model(ours: Mapping[str, Any], theirs: Any) -> bool:
    informative = ("name", "revision")
    return isinstance(theirs, Mapping) and all(theirs.get(k) == v for k, v in ours.items() if k not in informative)


@dataclass(frozen=True, slots=True)
class Moment:
    """What the steps of an epoch overwrite, as it was before them; it stays on the parameters' device.

    Attributes:
        values: of each relation's parameters.
        memory: the optimiser's, of each of these; empty before its first step.
        orders: the generators' states.
        lengths: of the curves.
        best, best_epochs, stopped: of each relation.
    """

    values: list[list[Float[Tensor, "..."]]]
    memory: list[list[dict[str, Tensor]]]
    orders: list[Tensor]
    lengths: list[int]
    best: list[Float[Tensor, " _number"]]
    best_epochs: list[int]
    stopped: list[bool]


def copies(parameters: Sequence[nn.Parameter]) -> list[Float[Tensor, "..."]]:
    """Of the parameters' values."""
    return [parameter.detach().clone() for parameter in parameters]


def memory_of(optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[dict[str, Tensor]]:
    """Copies of what the optimiser keeps of each parameter."""
    return [
        {name: value.detach().clone() for name, value in optimiser.state.get(parameter, {}).items()}
        for parameter in parameters
    ]


def remember(optimiser: torch.optim.Optimizer, parameter: nn.Parameter, memory: Mapping[str, Tensor]) -> None:
    """Give the optimiser copies of what it is to keep of a parameter."""
    optimiser.state.pop(parameter, None)
    if memory:
        optimiser.state[parameter] = {
            # Adam's count of steps stays where it is
            name: value.clone() if name == "step" else value.to(parameter, copy=True)
            for name, value in memory.items()
        }
