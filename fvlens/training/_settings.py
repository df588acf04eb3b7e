"""How a training is done, and the curves that it leaves."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.prompts import Template, get_template
from fvlens.relations import Pair
from fvlens.showing import Shown, number

if TYPE_CHECKING:
    import pandas as pd

Loss = Literal["cross_entropy", "perplexity"]
Anchor = Literal["zero", "init"]
Schedule = Literal["cosine", "constant"]
LOSSES, ANCHORS, SCHEDULES = ("cross_entropy", "perplexity"), ("zero", "init"), ("cosine", "constant")
CURVES = ("train_loss", "valid_loss", "valid_top1", "norm", "cosine")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a vector, or anything else, is trained.

    Attributes:
        loss: ``"cross_entropy"``, the mean over pairs of ``-log P(y | x)`` in nats, summed over the answer's tokens; or
            ``"perplexity"``, the exponential of the mean over pairs of its mean per token.
        l2: weight of ``||v - anchor||^2``.
        anchor: ``"zero"``, or ``"init"`` to stay near the start.
        lr: learning rate of Adam; by default 3% of the root mean square of the residual stream at the place of the
            vector, over the relation's training pairs, so that one number fits models of any scale.
        epochs: passes over the training pairs.
        batch_size: pairs in a step; None for all of them.
        schedule: of the learning rate over epochs, ``"cosine"`` down to zero or ``"constant"``.
        patience: stop after this many epochs without a better validation score; None to use all epochs.
        template: how the queries are written; a name gives the built-in template.
    """

    loss: Loss = "cross_entropy"
    l2: float = 0.0
    anchor: Anchor = "zero"
    lr: float | None = None
    epochs: int = 20
    batch_size: int | None = 5
    schedule: Schedule = "cosine"
    patience: int | None = None
    template: Template | str = "qa"

    def __post_init__(self) -> None:
        for name, known in (("loss", LOSSES), ("anchor", ANCHORS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"finetune: {name}={getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise ValueError(f"finetune: expected l2 of 0 or more, got {self.l2}.")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"finetune: expected lr over 0, or None, got {self.lr}.")
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"finetune: expected {name} of at least 1, got {value}.")
        object.__setattr__(self, "template", get_template(self.template))

    def to_json(self) -> dict[str, Any]:
        """All of them as plain JSON values, of the template the whole."""
        return dataclasses.asdict(self) | {"template": get_template(self.template).to_json()}

    def factor(self, epoch: int) -> float:
        """Of the learning rate in an epoch, counted from 0."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


@dataclass(frozen=True, slots=True)
class Task:
    """One relation to train: its pairs, and the order of its minibatches.

    Attributes:
        name: of the relation.
        train, valid: its pairs.
        seed: of the order of its minibatches.
        order: draws that order instead of a new generator of ``seed``, and moves on with it.
    """

    name: str
    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    seed: int
    order: torch.Generator | None = None

    @property
    def known_as(self) -> str:
        """Its name in messages."""
        return self.name or "this relation"


@dataclass(frozen=True, slots=True, repr=False)
class History(Shown):
    """One entry an epoch; entry 0 is the start, before any step.

    Attributes:
        train_loss: the loss without its l2 term (nats for ``"cross_entropy"``) over the epoch's steps, of each pair
            before the step that it takes part in; of entry 0, over all training pairs at the start.
        valid_loss: the same over all validation pairs after the epoch, NaN without pairs.
        valid_top1: share of validation pairs whose answer's first token is the most likely one.
        norm: Euclidean norm of the vector.
        cosine: cosine similarity to the start; NaN if the start was zero.
    """

    train_loss: Float[Tensor, " epoch"]
    valid_loss: Float[Tensor, " epoch"]
    valid_top1: Float[Tensor, " epoch"]
    norm: Float[Tensor, " epoch"]
    cosine: Float[Tensor, " epoch"]

    def __len__(self) -> int:
        """Number of entries, one more than the epochs trained."""
        return len(self.train_loss)

    def _line(self) -> str:
        n = len(self)
        return f"{n - 1} epochs" + (f", train loss {number(float(self.train_loss[-1]))}" if n else "")

    def _cells(self) -> list[tuple[str, ...]]:
        rows = zip(*(getattr(self, name).tolist() for name in CURVES), strict=True)
        return [("epoch", *CURVES), *((str(i), *map(number, row)) for i, row in enumerate(rows))]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an epoch: ``epoch`` and the curves."""
        import pandas as pd

        curves = {name: getattr(self, name).numpy() for name in CURVES}
        return pd.DataFrame({"epoch": range(len(self)), **curves})
