"""Gates: whether an analogy is steered at all, and how strongly.

A gate reads signals that need no right answer: how undecided the weights are, how much the composite helps its own
source pair, how sure the unsteered model is of what it says, and whether C and what it says, unsteered or steered, are
related as A and B are, by the same scores under the basis. ``strength = sigmoid(u . signals + k)`` if it is learned;
otherwise 1 where ``u . signals + k > 0`` and 0 elsewhere, over all signals (logistic) or one of them (threshold).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.composition._queries import ANALOGY_SETTINGS, AnalogySetting
from fvlens.types import as_number

GateKind = Literal["logistic", "threshold", "learned"]
GATES: tuple[GateKind, ...] = ("logistic", "threshold", "learned")
SIGNALS = (
    "entropy", "source gain", "confidence", "same relation", "same relation, steered", "likeness", "likeness, steered",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gate:
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

    def strength(self, signals: Float[Tensor, "*row signal"]) -> Float[Tensor, "*row"]:
        """How much of the composite is injected, 0 to 1."""
        value = signals @ torch.tensor(self.slopes, dtype=signals.dtype) + self.offset
        return value.sigmoid() if self.kind == "learned" else (value > 0).to(signals.dtype)

    def describe(self) -> str:
        """The formula in words."""
        terms = [f"{slope:+.3g} {name}" for slope, name in zip(self.slopes, SIGNALS, strict=True) if slope]
        inner = " ".join([*terms, f"{self.offset:+.3g}"])
        return f"sigmoid({inner})" if self.kind == "learned" else f"1 where {inner} > 0, else 0"
