"""A vector against what else might explain its score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.activations import HeadMeans
from fvlens.arguments import check_arguments
from fvlens.evaluation._evaluate import Evaluation, evaluations
from fvlens.evaluation._prompting import Options, Pairs, asked_prompts, copied, read_once, running
from fvlens.interruption import keeping, marked, titled
from fvlens.metrics import Difference, Interval, bootstrap_interval, paired_difference
from fvlens.models import Fingerprint
from fvlens.prompts import Prompts
from fvlens.results import Result
from fvlens.scoring import score
from fvlens.showing import Shown, as_said, number, span
from fvlens.types import Head, Steering
from fvlens.vectors import FunctionVector, function_vector, random_vector_like

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

ControlKind = Literal["no_vector", "vector", "random_vector", "random_heads", "other_relation", "icl", "shuffled"]
CONTROL_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)


@dataclass(frozen=True, slots=True, repr=False)
class Control(Shown):
    """One row of :class:`Controls`: one vector, or the mean over several of one kind.

    Attributes:
        name: the row's name.
        kind: ``"no_vector"``, ``"vector"``, ``"random_vector"``, ``"random_heads"``, ``"other_relation"``, ``"icl"`` or
            ``"shuffled"``.
        evaluations: the scores of each single vector.
        scores: for each query, the share of these vectors under which it is answered correctly.
        interval: 95% bootstrap interval of :attr:`top1`, over queries.
        difference: this row's top-1 minus the vector's on the same queries, with its interval; negative where the
            vector is better.
    """

    name: str
    kind: ControlKind
    evaluations: tuple[Evaluation, ...]
    scores: Float[Tensor, " prompt"]
    interval: Interval
    difference: Difference

    @property
    def top1(self) -> float:
        """Mean top-1 accuracy."""
        return self.scores.double().mean().item()

    @property
    def exact(self) -> float:
        """Mean share of queries whose whole answer is right."""
        return sum(one.exact for one in self.evaluations) / len(self.evaluations)

    @property
    def probability(self) -> float:
        """Mean probability of the answer's first token."""
        return sum(one.probability for one in self.evaluations) / len(self.evaluations)

    @property
    def mean_rank(self) -> float:
        """Mean rank of the answer's first token."""
        return sum(one.mean_rank for one in self.evaluations) / len(self.evaluations)

    def _line(self) -> str:
        return f"{self.name}: {len(self.evaluations)} vectors, top1={self.top1:.3f} {span(*self.interval[:2])}"


@dataclass(frozen=True, slots=True, repr=False)
class Controls(Result):
    """A vector against its controls, all on the same queries.

    Attributes:
        rows: the vector and each control; every other relation's vector has its own row.
        pooled: one row a kind. It differs from ``rows`` only in ``"other_relation"``, the mean over those vectors.
        complete: False if interrupted; what was finished is there.
    """

    FORMAT: ClassVar[str] = "fvlens-controls-1"

    rows: tuple[Control, ...]
    pooled: tuple[Control, ...]
    complete: bool

    def summary(self, kind: ControlKind) -> tuple[float, Interval]:
        """Mean top-1 of one kind, and its interval.

        Raises:
            ValueError: the table has no such row.
        """
        for row in self.pooled:
            if row.kind == kind:
                return row.top1, row.interval
        raise ValueError(
            f"summary: no row of kind {kind!r}; this table has {', '.join(row.kind for row in self.pooled)}."
        )

    def _made_on(self) -> Fingerprint | None:
        return next((one.fingerprint for row in self.rows for one in row.evaluations if one.fingerprint), None)

    def _line(self) -> str:
        one = self.rows[0].evaluations[0]
        shown = ", ".join(f"{row.kind} {row.top1:.3f}" for row in self.pooled)
        return f"{one.name}, n={one.n}, top1: {shown}{'' if self.complete else ', interrupted'}"

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(row.name, str(len(row.evaluations)), number(row.top1), span(*row.interval[:2])) for row in self.rows]
        return [("control", "vectors", "top-1", "interval"), *rows]

    def to_dataframe(self, *, single: bool = False) -> "pd.DataFrame":
        """One row a control: name, kind, number of vectors, top-1 and difference to the vector with their intervals,
        and ``exact``, the share of whole answers that are right.

        Args:
            single: one row for each single vector instead: ``control, kind, run, top1, probability, mean_rank, exact``.
        """
        import pandas as pd

        if single:
            each = [
                {
                    "control": row.name,
                    "kind": row.kind,
                    "run": run,
                    "top1": one.top1,
                    "probability": one.probability,
                    "mean_rank": one.mean_rank,
                    "exact": one.exact,
                }
                for row in self.rows
                for run, one in enumerate(row.evaluations)
            ]
            return marked(pd.DataFrame(each), self.complete)
        table = pd.DataFrame(
            [
                {
                    "control": row.name,
                    "kind": row.kind,
                    "n_vectors": len(row.evaluations),
                    "top1": row.top1,
                    "low": row.interval.low,
                    "high": row.interval.high,
                    "difference": row.difference.mean,
                    "difference_low": row.difference.interval.low,
                    "difference_high": row.difference.interval.high,
                    "probability": row.probability,
                    "mean_rank": row.mean_rank,
                    "exact": row.exact,
                }
                for row in self.rows
            ]
        )
        return marked(table, self.complete)

    def plot(self) -> "Figure":
        """Top-1 of the vector and each control as bars with intervals."""
        from fvlens import plots

        vector = next(row for row in self.rows if row.kind == "vector")
        one = vector.evaluations[0]
        return plots.bars(
            [row.name for row in self.rows],
            [row.top1 for row in self.rows],
            [row.interval.low for row in self.rows],
            [row.interval.high for row in self.rows],
            x_title="Top-1",
            title=titled(
                f"The vector and its controls, {one.name} ({as_said(one.setting)}, {one.n} queries)", self.complete
            ),
            level=vector.interval.level,
            highlighted=[vector.name],
        )


def controls(
    model: Any,
    pairs: Pairs,
    vector: FunctionVector,
    *,
    others: Sequence[FunctionVector] = (),
    means: HeadMeans | None = None,
    n_random: int = 10,
    scale: float | int = 1.0,
    generator: torch.Generator,
    progress: bool = True,
    **options: Unpack[Options],
) -> Controls:
    """A vector against what else might explain its score.

    Rows: no vector; the vector; ``n_random`` random vectors of the same norm (will any push do?); ``n_random`` vectors
    of random heads, as many as the vector has and none of its own (will any heads do?); each other relation's vector
    (will any task do?); clean and corrupted demonstrations instead of a vector. All vectors are added after the layer
    of ``vector``. Each row has its paired difference to the vector. A row of one vector, or of none, equals
    :func:`evaluate` with a generator of the same seed.

    Args:
        model: the model.
        pairs: the pairs asked, usually the test pairs.
        vector: the vector.
        others: vectors of other relations, best ones with other outputs; they are moved to the vector's layer.
        means: task means for the vectors of random heads; None leaves that row out.
        n_random: number of random vectors, and of random sets of heads.
        n_shots: demonstrations in the rows that have some.
        scale: factor on the vector.
        generator: draws the prompts first, then the bootstrap and the random vectors and heads.
        progress: show a progress bar. Interrupting returns what is finished, with a warning: the queries that all
            vectors have been tried on, or the rows.
        options: how pairs are asked and prompts are run, as for :func:`evaluate`. ``demonstrations`` are needed, for
            the rows with demonstrations; ``setting`` is where the vectors are injected; ``labels`` and ``pool`` also
            say how the ``shuffled`` row corrupts labels.

    Returns:
        :class:`Controls`.

    Raises:
        ValueError: as for :func:`evaluate`; no ``demonstrations``; ``n_random`` below 1; ``means`` given, but the
            vector names no heads or the model has too few others.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> split = fvlens.load_relation("antonym").split(torch.Generator().manual_seed(0))
        >>> g = torch.Generator().manual_seed(0)
        >>> clean = fvlens.build_prompts(model, split.train, n_prompts=8, generator=g)
        >>> means = fvlens.mean_head_activations(model, clean, progress=False)
        >>> vec = fvlens.function_vector(model, means, heads=[(1, 0), (1, 3)], layer=1)
        >>> table = fvlens.controls(
        ...     model, split.test, vec, demonstrations=split.train, means=means, n_random=2, generator=g, progress=False
        ... )
        >>> [row.kind for row in table.rows]
        ['no_vector', 'vector', 'random_vector', 'random_heads', 'icl', 'shuffled']

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3 (vectors of random heads as a baseline). The other rows are ours.
    """
    check_arguments(controls, locals(), runs=True)
    if n_random < 1:
        raise ValueError(f"controls: expected n_random of at least 1, got {n_random}; 10 is usual.")
    pairs, given = read_once("controls", pairs, options)
    options = Options(**given)  # pyright: ignore
    start = copied(generator)
    shown: list[tuple[ControlKind, Prompts, torch.Generator]] = []
    settings: tuple[Literal["icl", "shuffled"], ...] = ("icl", "shuffled")
    for setting in settings:
        own = copied(start)
        labels = options.get("labels") if setting == "shuffled" else None
        asked = Options(**{**options, "setting": setting, "labels": labels})  # pyright: ignore
        prompts = asked_prompts("controls", model, pairs, asked, own, vector, first_tokens=False)
        shown.append((setting, prompts, own))
    own_labels = options.get("labels") if options.get("setting") == "shuffled" else None
    asked = Options(**{**options, "labels": own_labels})  # pyright: ignore
    prompts = asked_prompts("controls", model, pairs, asked, generator, vector)
    bootstrap = copied(generator)

    # what is injected, kind by kind; a row is the mean over the vectors of one entry
    steered: list[tuple[str, ControlKind, list[Steering | None]]] = [
        ("no vector", "no_vector", [None]),
        ("the vector", "vector", [vector]),
        (
            "random vectors, same norm",
            "random_vector",
            [random_vector_like(vector, generator) for _ in range(n_random)],
        ),
    ]
    if means is not None:
        sets = _random_heads(model, vector, n_random, generator)
        built: list[Steering | None] = [function_vector(model, means, heads=own, layer=vector.layer) for own in sets]
        steered.append((f"{len(vector.heads)} random heads", "random_heads", built))
    for other in others:
        name = f"vector of {other.relation}" if other.relation else "vector of another relation"
        steered.append((name, "other_relation", [other.at_layer(vector.layer)]))

    # all of it in one go over the prompts' one run
    changes = [change for _, _, own in steered for change in own]
    how, compute = running(options), options.get("compute")
    scores = score(model, prompts, changes, scales=scale, interruptible=True, progress=progress, what="controls", **how)
    scored = iter(evaluations(model, prompts, changes, [scale] * len(changes), scores, copied(bootstrap), compute))
    groups: list[tuple[str, ControlKind, list[Evaluation]]] = [
        (name, kind, [next(scored) for _ in own]) for name, kind, own in steered
    ]
    reference = next(found[0] for _, kind, found in groups if kind == "vector")

    def row(name: str, kind: ControlKind, found: Sequence[Evaluation]) -> Control:
        shares = torch.stack([one.correct.double() for one in found]).mean(dim=0)
        single = len(found) == 1
        return Control(
            name=name,
            kind=kind,
            evaluations=tuple(found),
            scores=shares,
            interval=found[0].interval if single else bootstrap_interval(shares, generator=copied(bootstrap)),
            difference=paired_difference(shares, reference.correct, generator=copied(bootstrap)),
        )

    rows = [row(*group) for group in groups]
    complete = scores.complete
    demonstrated: list[tuple[ControlKind, Prompts, torch.Generator]] = shown if complete else []
    n_rows = len(rows) + len(demonstrated)
    with keeping(lambda: len(rows), n_rows, "controls", "rows are finished", stacklevel=2) as loop:
        for kind, own_prompts, own in demonstrated:
            score_of = score(model, own_prompts, [None], progress=progress, what="controls", **how)
            found = evaluations(model, own_prompts, [None], [scale], score_of, own, compute)
            rows.append(row(f"{own_prompts.n_shots} demonstrations, {own_prompts.labels} labels", kind, found))
    complete = complete and loop.complete
    pooled: list[Control] = []
    for kind in CONTROL_KINDS:
        same = [one for one in rows if one.kind == kind]
        if len(same) > 1:
            pooled.append(row("vectors of other relations", kind, [found for one in same for found in one.evaluations]))
        else:
            pooled += same
    return Controls(rows=tuple(rows), pooled=tuple(pooled), complete=complete)


def _random_heads(model: Any, vector: FunctionVector, n_sets: int, generator: torch.Generator) -> list[list[Head]]:
    """Random sets of as many heads as the vector has, without its own."""
    cfg = model.cfg
    n = len(vector.heads)
    every = (Head(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads))
    rest = [head for head in every if head not in vector.heads]
    if not 1 <= n <= len(rest):
        raise ValueError(
            f"controls: cannot draw random heads: the vector names {n} heads, and the model has {len(rest)} others; "
            "pass means=None to leave that row out."
        )
    return [[rest[i] for i in torch.randperm(len(rest), generator=generator)[:n].tolist()] for _ in range(n_sets)]
