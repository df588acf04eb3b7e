"""The comparison table: every way to make a model do a relation, what it costs, what it gains and what it disturbs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import torch

from fvlens.evaluation import Evaluation
from fvlens.files import write_table, write_text
from fvlens.find import Ranking, find_vector
from fvlens.interruption import keeping, marked, titled
from fvlens.models import Fingerprint, fingerprint
from fvlens.progress import tqdm
from fvlens.relations import Pairs, as_relation
from fvlens.results import Result, read_result
from fvlens.showing import Shown
from fvlens.training._adaptations import Steered
from fvlens.training._adapted import Adapted, Baseline, kinds_of_changes
from fvlens.training._collateral import Collateral, collateral_change, evaluate_adapted, unrelated_prompts
from fvlens.training._fine_tuned import FineTuned
from fvlens.training._methods import METHODS, Budget, Planned
from fvlens.training._options import TrainingOptions, settled
from fvlens.training._settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure


COMPARISON_FILE = "compare.safetensors"
"""A comparison's own file in the folder that it is saved to."""


@dataclass(frozen=True, slots=True, repr=False)
class Row(Shown):
    """One method in the table.

    Attributes:
        name: the method.
        n_trainable: numbers that were trained.
        seconds: time that making it took, its start included.
        evaluation: scores of the test queries.
        collateral: what it changes elsewhere.
        adapted: what can be used on; None for the model as it is.
    """

    name: str
    n_trainable: int
    seconds: float
    evaluation: Evaluation
    collateral: Collateral
    adapted: Adapted | None

    def _line(self) -> str:
        top1, kl = self.evaluation.top1, self.collateral.mean
        return f"{self.name}: {self.n_trainable} numbers, top1={top1:.3f}, KL {kl:.3f} nats"


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Result):
    """Methods of one budget on one relation, on the same test queries.

    Attributes:
        relation: name of the relation.
        model_name: the model's name in its configuration.
        rows: the methods.
        layer: the vectors, but for activation addition, are added after this layer.
        scale: factor on the function vector, chosen with the layer on the validation pairs; the vector has it in it.
        n_train, n_valid: pairs that every method was made and chosen on.
        n_unrelated: prompts behind the collateral change.
        seed: of everything drawn.
        fingerprint: the model.
        data_hash: hash of the relation's pairs.
        complete: False if interrupted; the rows that were finished are there.
        caution: whether heads were taken that do not help (:meth:`~fvlens.attribution.IndirectEffects.caution`).
    """

    FORMAT: ClassVar[str] = "fvlens-comparison-1"

    relation: str
    model_name: str
    rows: tuple[Row, ...]
    layer: int
    scale: float
    n_train: int
    n_valid: int
    n_unrelated: int
    seed: int
    fingerprint: Fingerprint
    data_hash: str
    complete: bool
    caution: str = ""

    @property
    def n_test(self) -> int:
        """Number of test queries."""
        return self.rows[0].evaluation.n

    def __getitem__(self, name: str) -> Row:
        """The row of a method.

        Raises:
            ValueError: there is none of that name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"no method {name!r} here; there are {', '.join(row.name for row in self.rows)}.")

    @classmethod
    def _kinds(cls) -> tuple[type, ...]:
        return (Baseline, FineTuned, *kinds_of_changes())

    def _line(self) -> str:
        best = max(self.rows, key=lambda row: row.evaluation.top1)
        part = "" if self.complete else ", interrupted"
        return (
            f"{self.relation} on {self.model_name}: {len(self.rows)} methods, {self.n_test} test queries, best "
            f"{best.name} with top1={best.evaluation.top1:.3f}{part}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return self.cells()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a method: trained numbers, seconds, top-1 and collateral change with intervals, and more scores."""
        import pandas as pd

        table = pd.DataFrame(
            [
                {
                    "relation": self.relation,
                    "method": row.name,
                    "n_trainable": row.n_trainable,
                    "seconds": row.seconds,
                    "top1": row.evaluation.top1,
                    "low": row.evaluation.interval.low,
                    "high": row.evaluation.interval.high,
                    "kl": row.collateral.mean,
                    "kl_low": row.collateral.interval.low,
                    "kl_high": row.collateral.interval.high,
                    "mean_rank": row.evaluation.mean_rank,
                    "probability": row.evaluation.probability,
                    "log_probability": row.evaluation.answer_log_probability,
                    "n": row.evaluation.n,
                    "exact": row.evaluation.exact,
                }
                for row in self.rows
            ]
        )
        return marked(table, self.complete)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text: a row of headings, then one a method; whole answers where they differ from top-1."""
        differs = any(row.evaluation.exact != row.evaluation.top1 for row in self.rows)
        exact = ("exact",) if differs else ()
        heading = ("method", "trained", "seconds", "top-1", "interval", *exact, "KL", "interval")
        body = []
        for row in self.rows:
            top1, kl = row.evaluation.interval, row.collateral.interval
            body.append(
                (
                    row.name,
                    f"{row.n_trainable:,}",
                    f"{row.seconds:.1f}",
                    f"{row.evaluation.top1:.2f}",
                    f"{top1.low:.2f} to {top1.high:.2f}",
                    *([f"{row.evaluation.exact:.2f}"] if differs else []),
                    f"{row.collateral.mean:.3f}",
                    f"{kl.low:.3f} to {kl.high:.3f}",
                )
            )
        return [heading, *body]

    def describe(self) -> str:
        """What the table's numbers are."""
        answers = self.rows[0].evaluation.caution if self.rows else ""
        return (
            f"{self.relation} on {self.model_name}: {self.n_train} training and {self.n_valid} validation pairs, "
            f"{self.n_test} test queries without demonstrations unless the method is demonstrations, vectors after "
            f"layer {self.layer}, the function vector times {self.scale:g}, seed {self.seed}. Trained: numbers that "
            f"were trained. KL: collateral change of the next token after {self.n_unrelated} prompts of other "
            "relations, in nats. Intervals: 95% bootstrap."
            + (f" Answers: {answers}" if answers else "")
            + (f" Heads: {self.caution}" if self.caution else "")
            + ("" if self.complete else " Interrupted: the methods that are not here were not reached.")
        )

    def to_markdown(self) -> str:
        """The table, and a line that says what its numbers are."""
        heading, *body = self.cells()
        lines = [heading, ("---", *["---:"] * (len(heading) - 1)), *body]
        return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", self.describe(), ""])

    def save(self, folder: str | FilePath) -> list[FilePath]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write ``compare.md``, ``compare.csv`` and, for ``load``, ``compare.safetensors`` into a folder.

        The folder is made if need be.
        """
        folder = FilePath(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return [
            write_text(folder / "compare.md", self.to_markdown()),
            write_table(folder / "compare.csv", self.to_dataframe()),
            self._write(folder / COMPARISON_FILE),
        ]

    @classmethod
    def load(cls, path: str | FilePath, *, model: Any = None) -> "Comparison":
        """Read what :meth:`save` wrote, from its folder or from the file ``compare.safetensors`` itself.

        Nothing in the file is executed. It warns if the table was interrupted.

        Args:
            path: the folder or the file.
            model: if given, the table must have been made on this model.

        Raises:
            ValueError: no such file; not a comparison, or a damaged one; or one of another model than ``model``.
        """
        path = FilePath(path)
        return read_result(cls, path / COMPARISON_FILE if path.is_dir() else path, model)

    def plot(self, quantity: Literal["top1", "collateral"] = "top1") -> "Figure":
        """Top-1, or the collateral change, of each method as bars with intervals.

        Raises:
            ValueError: an unknown quantity.
        """
        from fvlens import plots

        if quantity not in ("top1", "collateral"):
            raise ValueError(f"plot: quantity={quantity!r}; expected 'top1' or 'collateral'.")
        names = [row.name for row in self.rows]
        if quantity == "top1":
            values = [row.evaluation.top1 for row in self.rows]
            intervals = [row.evaluation.interval for row in self.rows]
            x_title, what = "Top-1", f"{self.n_test} test queries"
        else:
            values = [row.collateral.mean for row in self.rows]
            intervals = [row.collateral.interval for row in self.rows]
            x_title, what = "KL in nats", f"{self.n_unrelated} unrelated prompts"
        return plots.bars(
            names,
            values,
            [interval.low for interval in intervals],
            [interval.high for interval in intervals],
            x_title=x_title,
            level=intervals[0].level,
            title=titled(f"Methods of one budget, {self.relation} ({what})", self.complete),
            highlighted=[name for name in names if name.startswith("fine-tuned")],
        )


def compare(
    model: Any,
    relation: Pairs,
    *,
    n_train: int = 20,
    n_heads: int = 10,
    labels: Ranking = "permuted",
    layer: int | None = None,
    n_shots: int = 10,
    n_prompts: int = 100,
    n_corrupted: int = 25,
    n_soft: Sequence[int] = (1, 8),
    ranks: Sequence[int] = (1,),
    n_unrelated: int = 200,
    seed: int = 0,
    settings: Settings | None = None,
    **options: Unpack[TrainingOptions],
) -> Comparison:
    """Every method on one relation: what it costs, its top-1 on test queries, and what it changes elsewhere.

    Rows are those of :data:`~fvlens.training.METHODS`: the bare query; demonstrations; the untuned function vector;
    activation addition; the vector fine-tuned from the function vector and from zero; soft prompts; low-rank updates.
    All see the same training pairs; layers, scales
    and epochs are chosen on the validation pairs. Test pairs are used for the scores only. Collateral change is taken
    over :func:`unrelated_prompts`.

    Args:
        model: the model.
        relation: a relation, its name or file, or pairs in any shape (:func:`fvlens.relations.as_relation`).
        n_train: training pairs, the first of the train part.
        n_heads: heads in the function vector.
        labels: corruption that they are ranked on.
        layer: of all vectors; by default that where the untuned vector, with its best scale, is best on the validation
            pairs (see :func:`fvlens.find_vector`), and for activation addition its own best.
        n_shots: demonstrations in a prompt.
        n_prompts: clean prompts behind the function vector.
        n_corrupted: corrupted prompts behind the choice of its heads.
        n_soft: numbers of soft tokens, a row each.
        ranks: ranks of the low-rank updates, a row each.
        n_unrelated: prompts behind the collateral change.
        seed: of everything drawn.
        settings, options: of all that is trained, as for :func:`~fvlens.training.finetune`; ``template`` is that of all
            prompts. With ``progress``, interrupting gives the rows that are finished, with a warning.

    Returns:
        :class:`Comparison`.

    Raises:
        ValueError: ``n_train`` below 1; ``resume`` or ``checkpoint``, which are for one training; whatever the methods
            refuse.

    References:
        Todd et al. 2024, arXiv:2310.15213 (function vector); Kang, Wu, Lu 2026, arXiv:2601.08169 (fine-tuned); Turner
        et al. 2023, arXiv:2308.10248 (activation addition); Lester et al. 2021, arXiv:2104.08691 (soft prompt); Hu et
        al. 2021, arXiv:2106.09685 (low-rank updates).
    """
    if n_train < 1:
        raise ValueError(f"compare: expected n_train of at least 1, got {n_train}.")
    how, running = settled("compare", model, settings, options)
    if running.resume is not None or running.checkpoint is not None:
        raise ValueError("compare: resume and checkpoint are for one training; here there are many.")
    whole = as_relation(relation, what="compare")

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    split = whole.split(fresh())
    split = replaced(split, train=split.train[:n_train])
    unrelated = unrelated_prompts(model, whole, n=n_unrelated, template=how.template, generator=fresh())
    # the start that several methods share
    began = time.monotonic()
    found = find_vector(
        model, split, labels=labels, n_heads=n_heads, n_shots=n_shots, n_prompts=n_prompts,
        n_corrupted=n_corrupted, layers=None if layer is None else [layer], template=how.template,
        relation=whole.name, seed=seed, generator=fresh(), progress=running.progress,
    )  # fmt: skip
    start = Baseline(
        method=f"function vector, {n_heads} heads",
        relation=whole.name,
        change=Steered(found.vector),
        n_trainable=0,
        seconds=time.monotonic() - began,
        seed=seed,
    )
    budget = Budget(
        model=model, relation=whole.name, split=split, start=start, vector=found.vector, layer=layer, n_shots=n_shots,
        n_soft=tuple(n_soft), ranks=tuple(ranks), settings=how, running=running, seed=seed,
    )  # fmt: skip
    planned = [row for method in METHODS for row in method(budget)]

    def made(row: Planned) -> Row:
        adapted = row.make()
        own = (0, 0.0, "") if adapted is None else (adapted.n_trainable, adapted.seconds, adapted.method)
        scored: dict[str, Any] = {"template": how.template, "relation": whole.name, "check": False}
        return Row(
            name=row.name or own[2],
            n_trainable=own[0],
            seconds=row.seconds_before + own[1],
            evaluation=evaluate_adapted(model, split.test, adapted, generator=fresh(), **scored),
            collateral=collateral_change(model, adapted, unrelated, check=False, generator=fresh()),
            adapted=adapted,
        )

    done: list[Row] = []
    with keeping(lambda: len(done), len(planned), "compare", "methods are finished", stacklevel=2) as loop:
        for row in tqdm(planned, desc="comparison", disable=not running.progress, leave=False):
            done.append(made(row))
    return Comparison(
        relation=whole.name,
        model_name=str(model.cfg.model_name),
        rows=tuple(done),
        layer=found.vector.layer,
        scale=found.scale,
        n_train=len(split.train),
        n_valid=len(split.valid),
        n_unrelated=n_unrelated,
        seed=seed,
        fingerprint=fingerprint(model),
        data_hash=whole.data_hash,
        complete=loop.complete,
        caution=" ".join(found.cautions),
    )
