"""What a training of vectors gives: of one relation, and of many in one batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fvlens.models import Fingerprint
from fvlens.results import Result
from fvlens.showing import named, number, shortened
from fvlens.suffix import Route, Weights
from fvlens.training._adaptations import Steered
from fvlens.training._set import VectorSet
from fvlens.training._settings import History, Settings
from fvlens.training._state import TrainingState
from fvlens.types import as_whole
from fvlens.vectors import DistributedVector, FunctionVector

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


@dataclass(frozen=True, slots=True, repr=False)
class FineTuned(Result):
    """A trained vector and how it came about.

    Attributes:
        vector: the vector at its best epoch.
        history: curves over epochs.
        best_epoch: the epoch that ``vector`` is of, chosen on the validation pairs; 0 is the start.
        layer_scores: where several layers were tried, (layer, validation top-1, validation loss) of each, means over
            the relations trained together; else empty.
        settings: how it was trained.
        lr: the learning rate used.
        seed: seed of the minibatches' order.
        seconds: time of the whole training, of all relations trained together and all layers tried; after a resume,
            from there on.
        path: ``"weights"``, ``"kv"`` or ``"naive"``: how the gradients were computed.
        batch_size: pairs that went through the model together at most; a step of more adds up the gradients of parts.
        compute: precision of the products, where it is not the model's own.
        weights: how they were held on the path ``"weights"``: ``"copied"``, or ``"laid out at each call"`` where a
            second copy does not fit the memory; None on other paths.
        complete: False if the training was interrupted.
        state: to go on from, ``finetune(..., resume=state)``; of all relations trained together.
    """

    FORMAT: ClassVar[str] = "fvlens-fine-tuned-1"

    vector: FunctionVector | DistributedVector
    history: History
    best_epoch: int
    layer_scores: tuple[tuple[int, float, float], ...]
    settings: Settings
    lr: float
    seed: int
    seconds: float
    path: Route
    batch_size: int
    compute: str | None
    weights: Weights | None
    complete: bool
    state: TrainingState

    @property
    def relation(self) -> str:
        """The relation's name."""
        return self.vector.relation

    @property
    def method(self) -> str:
        """Name of the method, beside those of the baselines."""
        return "fine-tuned vector"

    @property
    def change(self) -> Steered:
        """What it does to a forward pass: the vector is added."""
        return Steered(self.vector)

    @property
    def n_trainable(self) -> int:
        """Numbers that were trained."""
        if isinstance(self.vector, FunctionVector):
            return self.vector.vector.numel()
        return len(self.vector.heads) * self.vector.values.shape[-1]

    def _made_on(self) -> Fingerprint | None:
        return self.vector.fingerprint

    def _check_loaded(self) -> None:
        as_whole(self.best_epoch, "best_epoch", 0, len(self.history) - 1)
        self.state.check_parts()

    def _line(self) -> str:
        layer = f", layer {self.vector.layer}" if isinstance(self.vector, FunctionVector) else ""
        part = "" if self.complete else ", interrupted"
        top1 = number(float(self.history.valid_top1[self.best_epoch]))
        return (
            f"{named(self.relation)}: {self.n_trainable} numbers{layer}, best epoch {self.best_epoch} of "
            f"{len(self.history) - 1}, validation top1={top1}{part}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return self.history._cells()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an epoch: ``relation, epoch, train_loss, valid_loss, valid_top1, norm, cosine``."""
        frame = self.history.to_dataframe()
        frame.insert(0, "relation", self.relation)
        return frame

    def plot(self) -> "Figure":
        """Losses, validation top-1, norm and cosine over epochs, the best epoch marked."""
        from fvlens import plots

        history = self.history
        return plots.training_curves(
            train_loss=history.train_loss,
            valid_loss=history.valid_loss,
            valid_top1=history.valid_top1,
            norm=history.norm,
            cosine=history.cosine,
            marked=self.best_epoch,
            title=f"Training of {self.relation or 'a vector'}",
        )


@dataclass(frozen=True, slots=True, repr=False)
class FineTunedSet(Result):
    """Relations trained in one batch.

    Attributes:
        runs: one :class:`FineTuned` a relation, in the order given.
        seconds: time of the whole training.
    """

    FORMAT: ClassVar[str] = "fvlens-fine-tuned-set-1"

    runs: tuple[FineTuned, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        """False if the training was interrupted."""
        return all(run.complete for run in self.runs)

    @property
    def vectors(self) -> VectorSet:
        """The trained vectors."""
        return VectorSet(tuple(run.vector for run in self.runs if isinstance(run.vector, FunctionVector)))

    def __len__(self) -> int:
        """Number of relations."""
        return len(self.runs)

    def __iter__(self) -> Iterator[FineTuned]:
        """The runs, in order."""
        return iter(self.runs)

    def __getitem__(self, name: str) -> FineTuned:
        """The run of a relation.

        Raises:
            ValueError: there is none of that name.
        """
        for run in self.runs:
            if run.relation == name:
                return run
        raise ValueError(f"no training of {name!r} here; there are {', '.join(run.relation for run in self.runs)}.")

    def _made_on(self) -> Fingerprint | None:
        return self.runs[0]._made_on()

    def _check_loaded(self) -> None:
        if not self.runs:
            raise ValueError("expected at least one training.")
        for run in self.runs:
            run._check_loaded()

    def _line(self) -> str:
        names = shortened(", ".join(named(run.relation) for run in self.runs))
        best = [float(run.history.valid_top1[run.best_epoch]) for run in self.runs]
        part = "" if self.complete else ", interrupted"
        return f"{len(self.runs)} relations: {names}; mean validation top1={number(sum(best) / len(best))}{part}"

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [
            (named(run.relation), str(run.best_epoch), number(float(run.history.valid_top1[run.best_epoch])))
            for run in self.runs
        ]
        return [("relation", "best epoch", "validation top-1"), *rows]

    def to_dataframe(self) -> "pd.DataFrame":
        """The rows of :meth:`FineTuned.to_dataframe` of all relations."""
        import pandas as pd

        return pd.concat([run.to_dataframe() for run in self.runs], ignore_index=True)
