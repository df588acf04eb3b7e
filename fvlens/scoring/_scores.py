"""What is asked of the model, and what it answers: changes in, :class:`Scores` out."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.results import Result
from fvlens.showing import number
from fvlens.suffix import Route, Variant, Weights
from fvlens.types import Steering

Change = Steering | Variant | None
"""What is done to the model: a steering, such as a ``FunctionVector``; edits of the prompt's last token; or nothing."""


@dataclass(frozen=True, slots=True, repr=False)
class Scores(Result):
    """What the model says to every prompt under every change.

    Attributes:
        ranks: how many tokens come before the answer's first token; 0 means right.
        first: log-probability of the answer's first token, in nats.
        rest: log-probability of its other tokens, given those before, in nats, summed; 0 for answers of one token.
        best: the most likely next token.
        exact: True where every token of the answer is the most likely one given those before, so that the model writes
            the whole answer greedily.
        prompts: the prompts that these columns belong to; all of them unless interrupted.
        path: ``"weights"``, ``"kv"`` or ``"naive"``: how they were computed.
        batch_size: prompts that ran together at most.
        weights: how they were held on the path ``"weights"``: ``"copied"``, or ``"laid out at each call"`` where a
            second copy does not fit the memory; None on other paths.
        complete: False if interrupted; ``prompts`` are those that were finished under every change.
    """

    FORMAT: ClassVar[str] = "fvlens-scores-1"

    ranks: Int[Tensor, "change prompt"]
    first: Float[Tensor, "change prompt"]
    rest: Float[Tensor, "change prompt"]
    best: Int[Tensor, "change prompt"]
    exact: Bool[Tensor, "change prompt"]
    prompts: Int[Tensor, " prompt"]
    path: Route
    batch_size: int
    weights: Weights | None = None
    complete: bool = True

    @property
    def whole(self) -> Float[Tensor, "change prompt"]:
        """Log-probability of the whole answer, in nats."""
        return self.first + self.rest

    def _line(self) -> str:
        right = ", ".join(number(share) for share in (self.ranks == 0).double().mean(dim=1).tolist()[:5])
        more = ", ..." if len(self.ranks) > 5 else ""
        return f"{self.ranks.shape[0]} changes of {self.ranks.shape[1]} prompts, top1: {right}{more}, path {self.path}"


@dataclass(frozen=True, slots=True)
class Part:
    """Outcomes of some prompts under every change: ``[change prompt]`` each, in the order of the fields above."""

    weights: Weights | None
    prompts: Int[Tensor, " prompt"]
    ranks: Int[Tensor, "change prompt"]
    first: Float[Tensor, "change prompt"]
    rest: Float[Tensor, "change prompt"]
    best: Int[Tensor, "change prompt"]
    exact: Bool[Tensor, "change prompt"]
