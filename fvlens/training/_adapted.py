"""What every method gives: a model made to do a relation, what that cost, and how it acts on a forward pass."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch

from fvlens.models import Fingerprint
from fvlens.relations import Pair, Pairs, as_pairs, named_pairs
from fvlens.results import Result
from fvlens.showing import named
from fvlens.suffix import check_compute
from fvlens.training._adaptations import Adaptation, Demonstrations, Steered, Unchanged
from fvlens.training._change import Change
from fvlens.training._loop import Training, train
from fvlens.training._options import Execution
from fvlens.training._settings import History, Settings, Task
from fvlens.training._state import TrainingState
from fvlens.types import Steering
from fvlens.vectors import DistributedVector, FunctionVector

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


@runtime_checkable
class Adapted(Protocol):
    """A model made to do a relation; :class:`Baseline` and :class:`~fvlens.training.FineTuned` are such.

    Attributes:
        method: name of the method.
        change: what it does to a forward pass.
        n_trainable: numbers that were trained.
        seconds: time that making it took.
        history: curves over epochs, None if nothing was trained.
    """

    @property
    def method(self) -> str: ...

    @property
    def change(self) -> Adaptation: ...

    @property
    def n_trainable(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def history(self) -> History | None: ...


def kinds_of_changes() -> tuple[type, ...]:
    """What files may hold as a change: those that come with fvlens, and the vectors that they add."""
    from fvlens.training._lora import LoRA  # both are made of this module's parts
    from fvlens.training._soft_prompt import SoftPrompt

    return Unchanged, Demonstrations, Steered, SoftPrompt, LoRA, FunctionVector, DistributedVector


@dataclass(frozen=True, slots=True, repr=False)
class Baseline(Result):
    """A model made to do a relation by another method than a fine-tuned vector.

    Attributes:
        method: name of the method.
        relation: name of the relation, if known.
        change: what it does to a forward pass.
        n_trainable: numbers that were trained.
        seconds: time that making it took.
        history: curves over epochs; None if nothing was trained.
        best_epoch: the epoch that ``change`` is of, chosen on the validation pairs; None if nothing was trained.
        settings: how it was trained; None if nothing was.
        lr: the learning rate used; None if nothing was trained.
        seed: seed of the minibatches' order, or of the demonstrations drawn.
        choices: of activation addition, (layer, scale, validation top-1, validation loss in nats) of all that were
            tried.
        complete: False if the training was interrupted.
        state: to go on from, ``resume=state``; None if nothing was trained.
    """

    FORMAT: ClassVar[str] = "fvlens-baseline-1"

    method: str
    relation: str
    change: Adaptation
    n_trainable: int
    seconds: float
    history: History | None = None
    best_epoch: int | None = None
    settings: Settings | None = None
    lr: float | None = None
    seed: int | None = None
    choices: tuple[tuple[int, float, float, float], ...] = ()
    complete: bool = True
    state: TrainingState | None = None

    @property
    def vector(self) -> Steering:
        """The vector, of a method that adds one.

        Raises:
            ValueError: it adds none.
        """
        if not isinstance(self.change, Steered):
            raise ValueError(f"vector: {self.method} adds no vector; use .change.")
        return self.change.steering

    @classmethod
    def _kinds(cls) -> tuple[type, ...]:
        return kinds_of_changes()

    def _made_on(self) -> Fingerprint | None:
        steering = getattr(self.change, "steering", self.change)
        return getattr(steering, "fingerprint", None)

    def _check_loaded(self) -> None:
        if self.state is not None:
            self.state.check_parts()

    def _line(self) -> str:
        how = "nothing trained" if self.best_epoch is None else f"best epoch {self.best_epoch}"
        part = "" if self.complete else ", interrupted"
        return f"{self.method}, {named(self.relation)}: {self.n_trainable} numbers, {how}{part}"

    def _cells(self) -> list[tuple[str, ...]]:
        return [] if self.history is None else self.history._cells()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an epoch: ``method, relation, epoch, train_loss, valid_loss, valid_top1, norm, cosine``.

        Raises:
            ValueError: nothing was trained.
        """
        frame = self._trained().to_dataframe()
        frame.insert(0, "relation", self.relation)
        frame.insert(0, "method", self.method)
        return frame

    def plot(self) -> "Figure":
        """Losses, validation top-1 and norm over epochs, the best epoch marked.

        Raises:
            ValueError: nothing was trained.
        """
        from fvlens import plots

        history = self._trained()
        return plots.training_curves(
            train_loss=history.train_loss,
            valid_loss=history.valid_loss,
            valid_top1=history.valid_top1,
            norm=history.norm,
            cosine=history.cosine,
            marked=self.best_epoch or 0,
            title=f"Training of {self.method}, {self.relation or 'custom pairs'}",
        )

    def _trained(self) -> History:
        if self.history is None:
            raise ValueError(f"{self.method}: nothing was trained, so there are no epochs to show.")
        return self.history


def as_adaptation(given: Adapted | Steering | Adaptation | None) -> Adaptation:
    """What a result of any method does to a forward pass; None is the model as it is.

    Raises:
        ValueError: ``given`` is nothing of the kind.
    """
    if given is None:
        return Unchanged()
    if isinstance(given, Adaptation):
        return given
    if isinstance(given, Steering):
        return Steered(given)
    if isinstance(given, Adapted):
        return given.change
    raise ValueError(
        f"expected what a baseline or finetune gives, a vector, or None, got {type(given).__name__}; see Adapted."
    )


def given_pairs(function: str, pairs: Pairs, relation: str | None) -> tuple[tuple[Pair, ...], str]:
    """The pairs, and the relation's name."""
    own, name = named_pairs(pairs, what=f"{function}: pairs")
    return tuple(own), name if relation is None else relation


def valid_pairs(function: str, valid: Pairs | None) -> tuple[Pair, ...]:
    """The validation pairs; none for None."""
    return as_pairs(valid, what=f"{function}: valid", may_be_empty=True)


def drawn_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=generator))


def trained_baseline(
    function: str, method: str, task: Task, change: Change, settings: Settings, running: Execution
) -> Baseline:
    """Train one relation's change, by whole passes; what the change makes is an :class:`Adaptation`.

    Raises:
        ValueError: another path is insisted on, or another precision of products; whatever training refuses.
    """
    if running.path not in (None, "naive"):
        raise ValueError(f"{function}: path={running.path!r}, but this is trained by whole passes ('naive').")
    check_compute(function, change.model, "naive", running.compute)
    training = Training([task], change, settings, whose=function)
    trained = train(
        training, progress=running.progress, what=f"{method}, {task.name}" if task.name else method,
        resume=running.resume, checkpoint=running.checkpoint, stacklevel=4,
    )  # fmt: skip
    outcome = trained.outcomes[0]
    return Baseline(
        method=method,
        relation=task.name,
        change=dataclasses.replace(outcome.result, complete=trained.complete),
        n_trainable=outcome.values.numel(),
        seconds=trained.seconds,
        history=outcome.history,
        best_epoch=outcome.best_epoch,
        settings=settings,
        lr=outcome.lr,
        seed=task.seed,
        complete=trained.complete,
        state=trained.state,
    )
