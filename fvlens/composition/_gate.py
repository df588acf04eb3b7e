"""Gates: whether an analogy is steered at all, and how strongly.

A gate reads three signals that need no answer: how undecided the weights are, how much the composite helps its own
source pair, and how sure the unsteered model is of its answer. ``strength = sigmoid(u . signals + k)`` if it is
learned, 1 or 0 if it is a threshold on one of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.composition._queries import Setting

GateKind = Literal["learned", "threshold"]
GATES: tuple[GateKind, ...] = ("learned", "threshold")
SIGNALS = ("entropy", "source gain", "confidence")


@dataclass(frozen=True, slots=True)
class Gate:
    """A factor between 0 and 1 on the composite vector of an analogy, from its signals.

    Attributes:
        kind: ``"learned"`` (a sigmoid) or ``"threshold"`` (0 or 1).
        slopes: weight of each of :data:`SIGNALS`.
        offset: added to their weighted sum; a threshold opens above 0.
        setting: the prompts that it was fitted on, and that it is for.
    """

    kind: GateKind
    slopes: tuple[float, ...]
    offset: float
    setting: Setting

    def __post_init__(self) -> None:
        if self.kind not in GATES:
            raise ValueError(f"Gate: kind={self.kind!r}; expected one of {', '.join(GATES)}.")
        if len(self.slopes) != len(SIGNALS):
            raise ValueError(f"Gate: expected {len(SIGNALS)} slopes ({', '.join(SIGNALS)}), got {len(self.slopes)}.")

    def strength(self, signals: Float[Tensor, "*row signal"]) -> Float[Tensor, "*row"]:
        """How much of the composite is injected, 0 to 1."""
        value = signals @ torch.tensor(self.slopes, dtype=signals.dtype) + self.offset
        return value.sigmoid() if self.kind == "learned" else (value > 0).to(signals.dtype)

    def describe(self) -> str:
        """The formula in words."""
        terms = [f"{slope:+.3g} {name}" for slope, name in zip(self.slopes, SIGNALS, strict=True) if slope]
        inner = " ".join([*terms, f"{self.offset:+.3g}"])
        return f"sigmoid({inner})" if self.kind == "learned" else f"1 where {inner} > 0, else 0"
