"""What a run found."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fvlens.attribution import IndirectEffects
from fvlens.evaluation import ControlKind, Controls, Evaluation, LayerScaleSweep
from fvlens.find import Ranking
from fvlens.metrics import Interval
from fvlens.models import Fingerprint, LoadReport
from fvlens.relations import Relation, Split
from fvlens.report._provenance import Provenance
from fvlens.report._settings import Loading, RunOptions
from fvlens.showing import Shown, number, span
from fvlens.training import FineTuned
from fvlens.universal import GivenHeads
from fvlens.vectors import FunctionVector

Source = Literal["permuted", "random", "file"]
"""Where a vector's heads come from: a ranking, or a file of heads."""


@dataclass(frozen=True, slots=True, repr=False)
class Tuned(Shown):
    """The fine-tuned vector of a run, and what it does on the test pairs.

    Attributes:
        run: the training.
        vector: what it gave.
        evaluation: its scores on bare queries.
        others: the same queries under each fine-tuned vector of another relation.
        other: mean top-1 under those and its 95% interval over queries; None without other relations.
        decoded: the tokens it decodes to, with their logits.
    """

    run: FineTuned
    vector: FunctionVector
    evaluation: Evaluation
    others: tuple[Evaluation, ...]
    other: tuple[float, Interval] | None
    decoded: tuple[tuple[str, float], ...]

    def _line(self) -> str:
        return f"{self.epochs} epochs, layer {self.vector.layer}, test top1={self.evaluation.top1:.3f}"

    @property
    def other_exact(self) -> float:
        """Mean share of whole answers that are right under the vectors of other relations; 0 without any."""
        return sum(one.exact for one in self.others) / max(1, len(self.others))

    @property
    def epochs(self) -> int:
        """Epochs that were run."""
        return len(self.run.history) - 1


class Row(NamedTuple):
    """A row of the summary."""

    name: str
    top1: float
    interval: Interval | None
    exact: float

    @classmethod
    def of(cls, name: str, score: Evaluation) -> "Row":
        return cls(name, score.top1, score.interval, score.exact)


@dataclass(frozen=True, slots=True, repr=False)
class RunResult(Shown):
    """Everything a run found.

    ``vectors``, ``steered`` and ``sweeps`` are keyed by where the heads come from: the ranking asked for, after it the
    other one if both were, or ``"file"`` alone if the heads were given. The vectors have their scale in them.
    ``effects`` has the rankings, and is empty for given heads. ``at_scale_one`` are the scores of the saved vector at
    scale 1, at its best layer for that; None if a scale was given. ``tuned`` is None if ``options.epochs`` is 0.
    ``cautions`` says of each ranking, and of the vectors of other relations, if heads were taken that do not help
    (:meth:`~fvlens.attribution.IndirectEffects.caution`), and if answers share first tokens. ``data`` are all pairs.
    ``loaded`` is what was found when the model was loaded.
    """

    relation: str
    model_name: str
    options: RunOptions
    split: Split
    icl: Evaluation
    shuffled: Evaluation
    zero_shot: Evaluation
    steered: dict[Source, Evaluation]
    vectors: dict[Source, FunctionVector]
    effects: dict[Ranking, IndirectEffects]
    sweeps: dict[Source, LayerScaleSweep]
    at_scale_one: Evaluation | None
    controls: Controls
    others: tuple[str, ...]
    decoded: tuple[tuple[str, float], ...]
    fingerprint: Fingerprint
    data_hash: str
    seconds: float
    provenance: Provenance
    given: GivenHeads | None = None
    loading: Loading | None = None
    command: tuple[str, ...] | None = None
    tuned: Tuned | None = None
    cautions: tuple[str, ...] = ()
    loaded: LoadReport | None = None
    data: Relation | None = None

    def _line(self) -> str:
        tuned = "" if self.tuned is None else f", fine-tuned {self.tuned.evaluation.top1:.3f}"
        return (
            f"{self.relation} on {self.model_name}: {self.n_test} test queries, top1: bare {self.zero_shot.top1:.3f}, "
            f"function vector {self.steered[self.source].top1:.3f}{tuned}, {self.options.n_shots} demonstrations "
            f"{self.icl.top1:.3f}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [
            (row.name, number(row.top1), "" if row.interval is None else span(*row.interval[:2]))
            for row in self._rows()
        ]
        return [("what", "top-1", "interval"), *rows]

    @property
    def path(self) -> str | None:
        """The path that the indirect effects took; None if the heads were given."""
        return next((effects.path for effects in self.effects.values()), None)

    @property
    def source(self) -> Source:
        """Where the saved vector's heads come from: ``options.labels``, or ``"file"``."""
        return self.options.labels if self.given is None else "file"

    @property
    def vector(self) -> FunctionVector:
        """The vector that is saved."""
        return self.vectors[self.source]

    @property
    def scale(self) -> float:
        """The scale that the saved vector has in it."""
        return self.sweeps[self.source].best_scale

    def described(self, source: Source) -> str:
        """Where heads come from, in words."""
        if self.given is None or source != "file":
            return f"heads by {source} labels"
        return self.given.described

    @property
    def n_test(self) -> int:
        """Number of test pairs."""
        return len(self.split.test)

    @property
    def n_trained(self) -> int:
        """Number of pairs that the fine-tuned vector was trained on."""
        return len(self.split.train[: self.options.n_train])

    def control(self, kind: ControlKind) -> tuple[float, Interval]:
        """Mean top-1 and interval of one kind of control, ``"random_vector"`` or ``"other_relation"``."""
        return self.controls.summary(kind)

    def summary(self) -> list[tuple[str, float, Interval | None]]:
        """Rows (name, top-1, 95% interval) of the table that the command line and the report show."""
        return [(row.name, row.top1, row.interval) for row in self._rows()]

    def exact(self) -> list[float] | None:
        """Share of whole answers that are right, a number for each row of :meth:`summary`; None if all are as top-1."""
        rows = self._rows()
        return [row.exact for row in rows] if any(abs(row.exact - row.top1) > 1e-9 for row in rows) else None

    def _rows(self) -> list[Row]:
        shots = self.options.n_shots
        # prompting, and the bare query
        rows = [
            Row.of(f"{shots} clean demonstrations", self.icl),
            Row.of(f"{shots} demonstrations, labels permuted", self.shuffled),
            Row.of("bare query", self.zero_shot),
        ]
        # the vector of each ranking; of the saved one also what it does unscaled
        for source, vector in self.vectors.items():
            score, scale = self.steered[source], self.sweeps[source].best_scale
            text = f"function vector, {len(vector.heads)} {self.described(source)}, layer {vector.layer}"
            rows.append(Row.of(f"{text}, scale {scale:g}", score))
            unscaled = self.at_scale_one
            if source == self.source and scale != 1 and unscaled is not None:
                rows.append(Row.of(f"the same at scale 1, layer {unscaled.vector_layer}", unscaled))
        tuned = self.tuned
        if tuned is not None:
            text = f"fine-tuned vector, {self.n_trained} pairs, {tuned.epochs} epochs, layer {tuned.vector.layer}"
            rows.append(Row.of(text, tuned.evaluation))
        # what is no vector of this relation
        rows.append(self._control(f"{self.options.n_random} random vectors of the same norm", "random_vector"))
        if self.others:
            rows.append(self._control(f"vectors of other relations ({', '.join(self.others)})", "other_relation"))
        if tuned is not None and tuned.other is not None:
            rows.append(Row("fine-tuned vectors of the same other relations", *tuned.other, tuned.other_exact))
        rows.append(self._control(f"{self.options.n_random} sets of random heads", "random_heads"))
        return rows

    def _control(self, name: str, kind: ControlKind) -> Row:
        return Row(name, *self.control(kind), self.control_exact(kind))

    def control_exact(self, kind: ControlKind) -> float:
        """Mean share of whole answers that are right under one kind of control."""
        return next(row.exact for row in self.controls.pooled if row.kind == kind)
