"""The comparison table: every way to make a model do a relation, what it costs, what it gains and what it disturbs."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.evaluation import Evaluation, evaluations
from fvlens.files import write_table, write_text
from fvlens.find import Ranking, find_vector, finished
from fvlens.finetuning._baselines import Adapted, Baseline, act_add, as_change, few_shot, lora, soft_prompt
from fvlens.finetuning._changes import Change, Demonstrations, Steered, Unchanged, read_prompts
from fvlens.finetuning._finetune import finetune
from fvlens.interruption import keeping, marked, titled
from fvlens.metrics import Interval, best_token, bootstrap_interval, kl_divergence, log_probability, rank
from fvlens.models import Fingerprint, fingerprint
from fvlens.prompts import Prompts, Template, build_prompts, render_prompts, template_or
from fvlens.relations import Pair, Relation, list_relations, load_relation
from fvlens.scoring import Scores, score
from fvlens.types import Steering
from fvlens.vectors import FunctionVector

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Pairs = Relation | Sequence[Pair | tuple[str, str]]


# --- what a method gains ---


def _template_of(adapted: Any) -> Template | str | None:
    """The template that a method was trained with, or that of its vector; None if it knows of none."""
    settings = getattr(adapted, "settings", None)
    if settings is not None:
        return settings.template
    steering = getattr(getattr(adapted, "change", adapted), "steering", adapted)
    return getattr(steering, "template", None)


def evaluate_adapted(
    model: Any,
    pairs: Pairs,
    adapted: Adapted | Steering | Change | None,
    *,
    template: Template | str | None = None,
    relation: str | None = None,
    batch_size: int | None = None,
    check: bool = True,
    generator: torch.Generator,
) -> Evaluation:
    """How well the model answers bare queries under any method; of a vector the numbers of :func:`fvlens.evaluate`.

    Low-rank updates and soft prompts act on the whole prompt and on an answer's tokens, a vector at the prompt's last
    token only.

    Args:
        model: the model.
        pairs: the pairs asked, one query each.
        adapted: what a baseline or ``finetune`` gave, a vector, or None for the model as it is.
        template: how queries are written; by default as ``adapted`` was made with, else ``"qa"``.
        relation: name recorded in the result; by default that of ``pairs``.
        batch_size: prompts run together; by default chosen from what memory is free.
        check: ask ``adapted`` whether it was made on this model.
        generator: draws the bootstrap.

    Returns:
        :class:`~fvlens.evaluation.Evaluation`, whose setting is ``"icl"`` where the method is demonstrations.

    Raises:
        ValueError: no pairs; ``adapted`` is nothing of the kind, or of another model; ``batch_size`` below 1.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.finetuning import evaluate_adapted, few_shot
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> split = fvlens.load_relation("antonym").split(g)
        >>> shown = evaluate_adapted(model, split.test, few_shot(split.train, generator=g), generator=g)
        >>> shown.top1 > evaluate_adapted(model, split.test, None, generator=g).top1
        True
    """
    change = as_change(adapted)
    if check:
        change.check(model)
    template = template_or(template, _template_of(adapted))
    bare = build_prompts(model, pairs, n_shots=0, template=template, relation=relation, generator=generator)
    prompts = change.on(model, bare)
    steering = change.steering if isinstance(change, Steered) else None
    if isinstance(change, Steered | Unchanged | Demonstrations):
        scores = score(model, prompts, [steering], batch_size=batch_size, check=check, what="evaluate_adapted")
    else:
        scores = _read_scores(model, change, prompts, batch_size)
    (found,) = evaluations(model, prompts, [steering], [1.0], scores, generator)
    if steering is not None:
        return found
    kind = None if isinstance(change, Unchanged | Demonstrations) else type(change).__name__
    return replaced(found, vector_kind=kind, fingerprint=getattr(change, "fingerprint", None))


def _read_scores(model: Any, change: Change, prompts: Prompts, batch_size: int | None) -> Scores:
    """Scores under a change that acts on whole prompts, by whole passes."""
    ranks, logs, best = [], [], []
    largest = 0
    with torch.no_grad():
        for rows, logits in read_prompts(
            model, change, prompts, n_answer=prompts.answer_tokens.shape[1], batch_size=batch_size,
            what="evaluate_adapted",
        ):  # fmt: skip
            wanted = prompts.answer_tokens[rows].to(logits.device)
            ranks.append(rank(logits[:, 0], wanted[:, 0]).cpu())
            logs.append(log_probability(logits, wanted.clamp(min=0)).masked_fill(wanted < 0, 0.0).cpu())
            best.append(best_token(logits[:, 0]).cpu())
            largest = max(largest, len(wanted))
    every = torch.cat(logs)
    first, rest = every[None, :, 0], every[None, :, 1:].sum(dim=-1)
    columns = torch.arange(len(prompts))
    return Scores(torch.cat(ranks)[None], first, rest, torch.cat(best)[None], columns, "naive", largest)


# --- what it disturbs ---


@dataclass(frozen=True, slots=True)
class Collateral:
    """How far a method changes predictions that it should leave alone.

    Attributes:
        divergences: ``KL(P_plain || P_adapted)`` of the next token after each prompt, in nats.
        interval: 95% bootstrap interval of their mean.
    """

    divergences: Float[Tensor, " prompt"]
    interval: Interval

    @property
    def mean(self) -> float:
        """Mean divergence in nats; 0 where nothing changes."""
        return self.divergences.double().mean().item()


def unrelated_prompts(
    model: Any,
    relation: Relation,
    *,
    n: int = 200,
    n_shots: int = 2,
    template: Template | str = "qa",
    generator: torch.Generator,
) -> Prompts:
    """Prompts that have nothing to do with a relation: other library relations, asked after demonstrations of them.

    Each prompt draws a relation, other than this one and of another family, and from it the query and the
    demonstrations, all of them pairs neither of whose words is a word of this relation [our choice].

    Args:
        model: the model.
        relation: the relation to stay away from.
        n: number of prompts.
        n_shots: demonstrations in each; they say what is asked, so that there is something to disturb.
        template: how prompts are written.
        generator: draws everything.

    Returns:
        :class:`~fvlens.prompts.Prompts`.

    Raises:
        ValueError: ``n`` below 1; ``n_shots`` below 0; no other relation has that many pairs left.
    """
    if n < 1 or n_shots < 0:
        raise ValueError(f"unrelated_prompts: expected n >= 1 and n_shots >= 0, got {n} and {n_shots}.")
    words = {*relation.inputs, *relation.outputs}
    pools = []
    for name in list_relations():
        other = load_relation(name)
        if name == relation.name or (relation.family and other.family == relation.family):
            continue
        by_input = {pair.input: pair for pair in other.pairs if not words & {*pair}}
        if len(by_input) > n_shots:
            pools.append(list(by_input.values()))
    if not pools:
        raise ValueError(
            f"unrelated_prompts: no library relation has {n_shots + 1} pairs without a word of {relation.name!r}; use "
            "fewer shots."
        )
    queries, shown = [], []
    for _ in range(n):
        pool = pools[int(torch.randint(len(pools), (1,), generator=generator))]
        picked = [pool[i] for i in torch.randperm(len(pool), generator=generator)[: n_shots + 1].tolist()]
        queries.append(picked[0])
        shown.append(picked[1:])
    return render_prompts(model, queries, shown, template=template, n_shots=n_shots)


def collateral_change(
    model: Any,
    adapted: Adapted | Steering | Change | None,
    prompts: Prompts,
    *,
    batch_size: int | None = None,
    check: bool = True,
    generator: torch.Generator,
) -> Collateral:
    """How far a method changes the next token after prompts that it was not made for.

    ``KL(P_plain || P_adapted)`` in nats. The method acts as on its own queries: a vector at the last token, soft tokens
    behind BOS, demonstrations in front of what the prompt shows itself, low-rank updates everywhere.

    Args:
        model: the model.
        adapted: what a baseline or ``finetune`` gave, a vector, or None for the model as it is.
        prompts: the prompts, such as :func:`unrelated_prompts`.
        batch_size: prompts run together; by default chosen from what memory is free.
        check: ask ``adapted`` whether it was made on this model.
        generator: draws the bootstrap.

    Returns:
        :class:`Collateral`.

    Raises:
        ValueError: ``adapted`` is nothing of the kind, or of another model; ``batch_size`` below 1; a prompt is too
            long for the context with what the method adds to it.
        MemoryError: out of memory with a single prompt.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.finetuning import collateral_change, unrelated_prompts
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = unrelated_prompts(model, fvlens.load_relation("antonym"), n=4, generator=g)
        >>> collateral_change(model, None, prompts, generator=g).mean
        0.0
    """
    change = as_change(adapted)
    if check:
        change.check(model)

    def logits(of: Change, asked: Prompts) -> Iterator[Tensor]:
        parts = read_prompts(model, of, asked, n_answer=1, batch_size=batch_size, what="collateral_change")
        return (part[:, 0].cpu() for _, part in parts)

    with torch.no_grad():
        plain = torch.cat(list(logits(Unchanged(), prompts)))
        found, at = [], 0
        for part in logits(change, change.on(model, prompts)):
            found.append(kl_divergence(plain[at : at + len(part)], part).float())
            at += len(part)
    divergences = torch.cat(found)
    return Collateral(divergences, bootstrap_interval(divergences, generator=generator))


# --- the table ---


@dataclass(frozen=True, slots=True)
class Row:
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


@dataclass(frozen=True, slots=True)
class Comparison:
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
                }
                for row in self.rows
            ]
        )
        return marked(table, self.complete)

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text: a row of headings, then one a method."""
        heading = ("method", "trained", "seconds", "top-1", "interval", "KL", "interval")
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
                    f"{row.collateral.mean:.3f}",
                    f"{kl.low:.3f} to {kl.high:.3f}",
                )
            )
        return [heading, *body]

    def describe(self) -> str:
        """What the table's numbers are."""
        return (
            f"{self.relation} on {self.model_name}: {self.n_train} training and {self.n_valid} validation pairs, "
            f"{self.n_test} test queries without demonstrations unless the method is demonstrations, vectors after "
            f"layer {self.layer}, the function vector times {self.scale:g}, seed {self.seed}. Trained: numbers that "
            f"were trained. KL: collateral change of the next token after {self.n_unrelated} prompts of other "
            "relations, in nats. Intervals: 95% bootstrap."
            + (f" Heads: {self.caution}" if self.caution else "")
            + ("" if self.complete else " Interrupted: the methods that are not here were not reached.")
        )

    def to_markdown(self) -> str:
        """The table, and a line that says what its numbers are."""
        heading, *body = self.cells()
        lines = [heading, ("---", *["---:"] * (len(heading) - 1)), *body]
        return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", self.describe(), ""])

    def save(self, folder: str | FilePath) -> list[FilePath]:
        """Write ``compare.md`` and ``compare.csv`` into a folder, which is made if need be."""
        folder = FilePath(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return [
            write_text(folder / "compare.md", self.to_markdown()),
            write_table(folder / "compare.csv", self.to_dataframe()),
        ]

    def plot(self, quantity: Literal["top1", "collateral"] = "top1") -> "go.Figure":
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
            title=titled(f"Methods of one budget, {self.relation} ({what})", self.complete),
            highlighted=[name for name in names if name.startswith("fine-tuned")],
        )


def compare(
    model: Any,
    relation: str | Relation,
    *,
    n_train: int = 20,
    n_heads: int = 10,
    labels: Ranking = "permuted",
    layer: int | None = None,
    n_shots: int = 10,
    n_prompts: int = 100,
    n_soft: Sequence[int] = (1, 8),
    ranks: Sequence[int] = (1,),
    epochs: int = 20,
    batch_size: int | None = 5,
    n_unrelated: int = 200,
    template: Template | str = "qa",
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Every method on one relation: what it costs, its top-1 on test queries, and what it changes elsewhere.

    Rows: the bare query; demonstrations; the untuned function vector; activation addition; the vector fine-tuned from
    the function vector and from zero; soft prompts; low-rank updates. All see the same training pairs; layers, scales
    and epochs are chosen on the validation pairs. Test pairs are used for the scores only. Collateral change is taken
    over :func:`unrelated_prompts`.

    Args:
        model: the model.
        relation: a library relation's name, or a relation.
        n_train: training pairs, the first of the train part.
        n_heads: heads in the function vector.
        labels: corruption that they are ranked on.
        layer: of all vectors; by default that where the untuned vector, with its best scale, is best on the validation
            pairs (see :func:`fvlens.find_vector`), and for activation addition its own best.
        n_shots: demonstrations in a prompt.
        n_prompts: clean prompts behind the function vector.
        n_soft: numbers of soft tokens, a row each.
        ranks: ranks of the low-rank updates, a row each.
        epochs, batch_size: of all that is trained.
        n_unrelated: prompts behind the collateral change.
        template: how prompts are written.
        seed: of everything drawn.
        progress: show progress bars. Interrupting gives the rows that are finished, with a warning.

    Returns:
        :class:`Comparison`.

    Raises:
        ValueError: ``n_train`` below 1; whatever the methods refuse.

    References:
        Todd et al. 2024, arXiv:2310.15213 (function vector); Kang, Wu, Lu 2026, arXiv:2601.08169 (fine-tuned); Turner
        et al. 2023, arXiv:2308.10248 (activation addition); Lester et al. 2021, arXiv:2104.08691 (soft prompt); Hu et
        al. 2021, arXiv:2106.09685 (low-rank updates).
    """
    if n_train < 1:
        raise ValueError(f"compare: expected n_train of at least 1, got {n_train}.")
    whole = load_relation(relation) if isinstance(relation, str) else relation

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    split = whole.split(fresh())
    split = replaced(split, train=split.train[:n_train])
    named: dict[str, Any] = {"template": template, "relation": whole.name}
    unrelated = unrelated_prompts(model, whole, n=n_unrelated, template=template, generator=fresh())

    def row(name: str, adapted: Adapted | None, seconds: float) -> Row:
        return Row(
            name=name,
            n_trainable=0 if adapted is None else adapted.n_trainable,
            seconds=seconds,
            evaluation=evaluate_adapted(model, split.test, adapted, check=False, generator=fresh(), **named),
            collateral=collateral_change(model, adapted, unrelated, check=False, generator=fresh()),
            adapted=adapted,
        )

    began = time.monotonic()
    found = find_vector(
        model, split, labels=labels, n_heads=n_heads, n_shots=n_shots, n_prompts=n_prompts,
        layers=None if layer is None else [layer], seed=seed, generator=fresh(), progress=progress, **named,
    )  # fmt: skip
    untuned = found.vector
    start = Baseline(
        method=f"function vector, {n_heads} heads",
        relation=whole.name,
        change=Steered(untuned),
        n_trainable=0,
        seconds=time.monotonic() - began,
        seed=seed,
    )

    def rows() -> Iterator[Row]:
        yield row("bare query", None, 0.0)
        shown = few_shot(split.train, n_shots=n_shots, relation=whole.name, generator=fresh())
        yield row(shown.method, shown, shown.seconds)
        yield row(start.method, start, start.seconds)
        added = act_add(model, split.train, layer=layer, valid=split.valid, n_shots=n_shots, generator=fresh(), **named)
        yield row(added.method, added, added.seconds)
        shared: dict[str, Any] = {
            "valid": split.valid, "epochs": epochs, "batch_size": batch_size, "progress": progress, **named
        }  # fmt: skip
        starts: list[tuple[str, FunctionVector | Literal["zero"], float]] = [
            ("vector", untuned, start.seconds),
            ("zero", "zero", 0.0),
        ]
        for name, init, before in starts:
            tuned = finished(finetune(model, split.train, init=init, layer=untuned.layer, generator=fresh(), **shared))
            yield row(f"fine-tuned from {name}", tuned, before + tuned.seconds)
        for n in n_soft:
            soft = finished(soft_prompt(model, split.train, n_tokens=n, generator=fresh(), **shared))
            yield row(soft.method, soft, soft.seconds)
        for one in ranks:
            updated = finished(lora(model, split.train, rank=one, generator=fresh(), **shared))
            yield row(updated.method, updated, updated.seconds)

    done: list[Row] = []
    total = 6 + len(n_soft) + len(ranks)
    with keeping(lambda: len(done), total, "compare", "methods are finished", stacklevel=2) as loop:
        for one in tqdm(rows(), total=total, desc="comparison", disable=not progress, leave=False):
            done.append(one)
    return Comparison(
        relation=whole.name,
        model_name=str(model.cfg.model_name),
        rows=tuple(done),
        layer=untuned.layer,
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
