"""Gates: whether an analogy is steered at all, and how strongly.

A gate reads signals that need no right answer: how undecided the weights are, how much the composite helps its own
source pair, how sure the unsteered model is of what it says, and whether C and what it says, unsteered or steered, are
related as A and B are, by the same scores under the basis. ``strength = sigmoid(u . signals + k)`` if it is learned;
otherwise 1 where ``u . signals + k > 0`` and 0 elsewhere, over all signals (logistic) or one of them (threshold).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.composition._queries import ANALOGY_SETTINGS, AnalogySetting
from fvlens.files import read_tensors, write_tensors
from fvlens.showing import Shown
from fvlens.types import as_list, as_number

GATE_FORMAT = "fvlens-gate-1"
GateKind = Literal["logistic", "threshold", "learned"]
GATES: tuple[GateKind, ...] = ("logistic", "threshold", "learned")
SIGNALS = (
    "entropy", "source gain", "confidence", "same relation", "same relation, steered", "likeness", "likeness, steered",
)  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Gate(Shown):
    """A factor between 0 and 1 on the composite vector of an analogy, from its signals.

    Attributes:
        kind: ``"logistic"`` or ``"threshold"`` (0 or 1), or ``"learned"`` (a sigmoid).
        slopes: weight of each of :data:`SIGNALS`.
        offset: added to their weighted sum; a gate of 0 or 1 opens above 0.
        setting: the prompts that it was fitted on, and that it is for.
    """

    kind: GateKind
    slopes: tuple[float, ...]
    offset: float
    setting: AnalogySetting

    def _line(self) -> str:
        return f"{self.kind}, {self.setting}, offset {self.offset:.3f}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [("signal", "slope"), *((n, f"{slope:+.3f}") for n, slope in zip(SIGNALS, self.slopes, strict=True))]

    def __post_init__(self) -> None:
        if self.kind not in GATES:
            raise ValueError(f"Gate: kind={self.kind!r}; expected one of {', '.join(GATES)}.")
        if len(self.slopes) != len(SIGNALS):
            raise ValueError(f"Gate: expected {len(SIGNALS)} slopes ({', '.join(SIGNALS)}), got {len(self.slopes)}.")
        if self.setting not in ANALOGY_SETTINGS:
            raise ValueError(f"Gate: setting={self.setting!r}; expected one of {', '.join(ANALOGY_SETTINGS)}.")
        named = zip(self.slopes, SIGNALS, strict=True)
        slopes = tuple(as_number(slope, f"Gate: slope of {name}") for slope, name in named)
        object.__setattr__(self, "slopes", slopes)
        object.__setattr__(self, "offset", as_number(self.offset, "Gate: offset"))

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "Gate":
        """The gate of plain JSON values, as ``dataclasses.asdict`` gives them.

        Raises:
            KeyError, TypeError, ValueError: they are none.
        """
        slopes = tuple(as_list(header["slopes"], "slopes"))
        return cls(header["kind"], slopes, header["offset"], header["setting"])

    def save(self, path: str | Path) -> Path:
        """Write the gate to one file, all of it in the header. Replaces an existing file at once."""
        header = {**dataclasses.asdict(self), "signals": list(SIGNALS)}
        return write_tensors(Path(path), {"slopes": torch.tensor(self.slopes)}, header, GATE_FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "Gate":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ValueError: no such file; not a gate, or a damaged one; or one over other signals than :data:`SIGNALS`.
        """
        path = Path(path)
        _, header = read_tensors(path, GATE_FORMAT)
        try:
            if header["signals"] != list(SIGNALS):
                raise ValueError(f"expected slopes of {', '.join(SIGNALS)}, got those of {header['signals']}")
            return cls.from_header(header)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: damaged gate ({type(error).__name__}: {error}).") from error

    def strength(self, signals: Float[Tensor, "*row signal"]) -> Float[Tensor, "*row"]:
        """How much of the composite is injected, 0 to 1."""
        value = signals @ torch.tensor(self.slopes, dtype=signals.dtype) + self.offset
        return value.sigmoid() if self.kind == "learned" else (value > 0).to(signals.dtype)

    def describe(self) -> str:
        """The formula in words."""
        terms = [f"{slope:+.3g} {name}" for slope, name in zip(self.slopes, SIGNALS, strict=True) if slope]
        inner = " ".join([*terms, f"{self.offset:+.3g}"])
        return f"sigmoid({inner})" if self.kind == "learned" else f"1 where {inner} > 0, else 0"
