"""What a training needs to go on: kept on disk, or for a moment in case it is interrupted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from fvlens.files import read_tensors, write_tensors
from fvlens.models import INFORMATIVE
from fvlens.prompts import TEMPLATES
from fvlens.showing import Shown, shortened
from fvlens.training._settings import CURVES
from fvlens.types import as_flag, as_list, as_number, as_texts, as_whole

STATE_FORMAT = "fvlens-training-1"
VECTORS = ("value", "start", "best")
"""What a state keeps of each relation's numbers: as they are, as they began, and at the best epoch."""
_OLD_METHODS = {
    "VectorAdapter": "VectorChange",
    "DistributedAdapter": "DistributedChange",
}
"""Names that version 0.1 gave to what is trained."""


@dataclass(frozen=True, slots=True, repr=False)
class TrainingState(Shown):
    """All that training needs to go on as if it had never stopped.

    Attributes:
        tensors: parameters, Adam's moments, best vectors, curves, and the state of each generator.
        header: epoch, settings, and what was trained, on which model.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]

    def _line(self) -> str:
        names = shortened(", ".join(map(str, self.header.get("relations", ()))))
        return f"{self.header.get('method', 'a training')} of {names}, {len(self.tensors)} tensors"

    def save(self, path: str | FilePath) -> FilePath:
        """Write the state to one safetensors file, at once."""
        return write_tensors(FilePath(path), self.tensors, self.header, STATE_FORMAT)

    @classmethod
    def load(cls, path: str | FilePath) -> "TrainingState":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: no such file; not a training state, or one whose parts do not fit each other.
        """
        path = FilePath(path)
        state = cls(*read_tensors(path, STATE_FORMAT))
        try:
            state.check_parts()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: damaged training state ({type(error).__name__}: {error}).") from error
        return state

    def check_parts(self) -> None:
        """Raise if the parts do not fit each other, or hold what no training leaves.

        Raises:
            KeyError, TypeError, ValueError: something is missing or too much; a shape, a count of steps or epochs, or a
                flag that does not fit the rest; numbers that are not finite, but for relations that stopped for that.
        """
        header, names = self.header, as_texts(self.header["relations"], "relations")
        lists = {name: as_list(header[name], name) for name in ("best_epochs", "stopped", "lrs", "n_train")}
        for name, values in lists.items():
            if len(values) != len(names):
                raise ValueError(f"{name}: expected {len(names)}, one a relation, got {len(values)}")
        left = set(self.tensors)
        for i in range(len(names)):
            best_epoch, stopped, lr, n_train = (values[i] for values in lists.values())
            if not as_number(lr, "lrs") > 0:
                raise ValueError(f"lrs: expected numbers over 0, got {lr}")
            left -= self._check_relation(i, best_epoch, as_flag(stopped, "stopped"), as_whole(n_train, "n_train", 1))
        if left:
            raise ValueError(f"unknown tensors {', '.join(sorted(left))}")

    def _check_relation(self, i: int, best_epoch: Any, stopped: bool, n_train: int) -> set[str]:
        """The tensors of a relation, which fit each other."""
        settings = self.header["settings"]
        epochs, size = as_whole(settings["epochs"], "epochs", 1), settings["batch_size"]
        curve, generator = self.tensors[f"{i}.curve"], self.tensors[f"{i}.generator"]
        if curve.ndim != 2 or not 1 <= len(curve) <= epochs + 1 or curve.shape[1] != len(CURVES):
            raise ValueError(f"{i}.curve: expected 1 to {epochs + 1} rows of {len(CURVES)}, got {list(curve.shape)}")
        as_whole(best_epoch, "best_epochs", 0, len(curve) - 1)
        if generator.ndim != 1 or generator.dtype != torch.uint8:
            raise ValueError(f"{i}.generator: expected bytes, got {generator.dtype} {list(generator.shape)}")
        start = self.tensors[f"{i}.start"]
        for name in VECTORS:
            numbers = self.tensors[f"{i}.{name}"]
            if numbers.shape != start.shape or numbers.ndim != 1:
                raise ValueError(f"{i}.{name}: expected shape {list(start.shape)}, got {list(numbers.shape)}")
            # the loss of a relation that has stopped may not have been finite any more
            _check_finite(f"{i}.{name}", numbers, may_fail=stopped and name == "value")
        n_steps = (len(curve) - 1) * -(-n_train // as_whole(n_train if size is None else size, "batch_size", 1))
        moments = {name for name in self.tensors if name.startswith(f"{i}.adam.")}
        for prefix in {name.rpartition(".")[0] for name in moments}:
            first, second, step = (self.tensors[f"{prefix}.{name}"] for name in ("exp_avg", "exp_avg_sq", "step"))
            if first.shape != second.shape or step.ndim or float(step) != n_steps:
                raise ValueError(
                    f"{prefix}: expected moments of one shape after {n_steps} steps, got {list(first.shape)} and "
                    f"{list(second.shape)} after {step.tolist()}"
                )
            for name, numbers in (("exp_avg", first), ("exp_avg_sq", second)):
                _check_finite(f"{prefix}.{name}", numbers, may_fail=stopped)
            if bool((second < 0).any()):
                raise ValueError(f"{prefix}.exp_avg_sq: expected squares, got {float(second.min())}")
            moments -= {f"{prefix}.{name}" for name in ("exp_avg", "exp_avg_sq", "step")}
        if moments:
            raise ValueError(f"unknown tensors {', '.join(sorted(moments))}")
        return {name for name in self.tensors if name.startswith(f"{i}.adam.")} | {
            f"{i}.{name}" for name in (*VECTORS, "curve", "generator")
        }

    def check(self, identity: Mapping[str, Any], whose: str) -> None:
        """Raise ``ValueError`` if this is of a training with another identity; ``whose`` is who asks."""
        for name, ours in identity.items():
            theirs = self.header.get(name)
            if name == "settings":
                theirs = _with_whole_template(theirs, ours, self.header.get("fingerprint"))
            elif name == "method":
                theirs = _OLD_METHODS.get(theirs, theirs) if isinstance(theirs, str) else theirs
            if theirs != ours and not (name == "fingerprint" and _same_model(ours, theirs)):
                raise ValueError(f"{whose}: the saved training has {name} {theirs!r}, this one {ours!r}.")


def _check_finite(name: str, numbers: Shaped[Tensor, "..."], *, may_fail: bool) -> None:
    if not numbers.is_floating_point():
        raise ValueError(f"{name}: expected numbers of a floating precision, got {numbers.dtype}")
    if not may_fail and not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{name}: holds NaN or infinite values")


def _with_whole_template(settings: Any, ours: Any, mark: Any) -> Any:
    """Settings as they are now: version 0.1 wrote the name of the template alone, and nobody what stands in front.

    That was one BOS token; where the tokenizer had none, which the fingerprint said, what is asked of it is the same.
    """
    if not isinstance(settings, dict):
        return settings
    template = settings.get("template")
    if isinstance(template, str):
        known = TEMPLATES.get(template)
        template = None if known is None else {k: v for k, v in known.to_json().items() if k != "bos"}
    if not isinstance(template, dict) or "bos" in template:
        return settings
    had_none = isinstance(mark, Mapping) and mark.get("bos") == "none"
    return settings | {"template": {**template, "bos": ours["template"]["bos"] if had_none else "one"}}


def _same_model(ours: Mapping[str, Any], theirs: Any) -> bool:
    return isinstance(theirs, Mapping) and all(theirs.get(k) == v for k, v in ours.items() if k not in INFORMATIVE)


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
