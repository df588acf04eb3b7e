"""Analogies scored with and without a composite vector, beside its controls."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.arguments import check_arguments
from fvlens.composition._fit_gate import gate_signals
from fvlens.composition._map import CompositeMap, Seen
from fvlens.composition._queries import (
    ANALOGY_SETTINGS,
    AnalogySetting,
    Queries,
    SourceScores,
    given_or_scored,
    shown_pairs,
)
from fvlens.composition._rules import RULES
from fvlens.metrics import Difference, Interval, best_token, bootstrap_interval, paired_difference, rank
from fvlens.models import Fingerprint
from fvlens.progress import tqdm
from fvlens.prompts import Template, answers_behind, template_for, template_or
from fvlens.relations import Analogy, Pair, Pairs, as_analogies, as_pairs
from fvlens.results import Result, check_counts
from fvlens.showing import Shown, number, span
from fvlens.suffix import Route
from fvlens.training import frozen

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

Unseen = Literal["pairs", "relations"]
CONTROLS = ("uniform", "best single", "random", "own vector")


@dataclass(frozen=True, slots=True, repr=False)
class Scored(Shown):
    """One way of solving all analogies.

    Attributes:
        name: such as ``"composite, one-shot"``.
        ranks: tokens more likely than the answer's first token; 0 is right.
        right: whether the most likely token begins the answer, or another right one.
        log_probs: mean log-probability per token of the whole answer, in nats.
        chosen: whether the answer beats every foil by that measure; None where an analogy has no foils.
    """

    name: str
    ranks: Int[Tensor, " analogy"]
    right: Bool[Tensor, " analogy"]
    log_probs: Float[Tensor, " analogy"]
    chosen: tuple[bool | None, ...]

    def _line(self) -> str:
        return f"{self.name}: {len(self.ranks)} analogies, top1={number(float(self.right.double().mean()))}"


@dataclass(frozen=True, slots=True, repr=False)
class PairedComparison(Shown):
    """Two ways on the same analogies.

    Attributes:
        difference: mean difference of top-1 with its paired bootstrap interval.
        p_value: McNemar's exact test on the analogies that only one of the two solves.
        only_first, only_second: how many those are.
    """

    difference: Difference
    p_value: float
    only_first: int
    only_second: int

    def _line(self) -> str:
        low, high, _ = self.difference.interval
        return f"difference {self.difference.mean:+.3f} {span(low, high)}, p={self.p_value:.3g}"


def mcnemar(first: Bool[Tensor, " n"], second: Bool[Tensor, " n"]) -> tuple[float, int, int]:
    """McNemar's exact two-sided test: do two methods solve equally many of the same items?

    Of the items that only one of the two solves, each solves half if they are equally good (binomial).

    Returns:
        The p-value (1 if they never differ), and how many only the first and only the second solves.

    Raises:
        ValueError: the two differ in length.
    """
    from scipy.stats import binomtest  # slow to import

    if first.shape != second.shape:
        raise ValueError(f"mcnemar: expected two of one length, got {len(first)} and {len(second)}.")
    one, two = int((first & ~second).sum()), int((second & ~first).sum())
    return (float(binomtest(one, one + two).pvalue) if one + two else 1.0), one, two


@dataclass(frozen=True, slots=True, repr=False)
class AnalogyEvaluation(Result):
    """Analogies and every way of solving them.

    Attributes:
        analogies: what was asked.
        scored: the ways, by name.
        seed: of the bootstrap.
        basis: names of the composite's basis, none without a composite.
        weights: of each basis relation in each analogy's mixture.
        fingerprint: the composite's model; None without a composite.
    """

    FORMAT: ClassVar[str] = "fvlens-analogy-evaluation-1"

    analogies: tuple[Analogy, ...]
    scored: dict[str, Scored]
    seed: int = 0
    basis: tuple[str, ...] = ()
    weights: Float[Tensor, "analogy relation"] = field(default_factory=lambda: torch.zeros(0, 0))
    fingerprint: Fingerprint | None = None

    def _which(self, kind: str | None) -> Tensor:
        keep = torch.tensor([kind is None or one.kind == kind for one in self.analogies])
        if not bool(keep.any()):
            raise ValueError(f"no analogy of kind {kind!r} among these {len(self.analogies)}.")
        return keep

    def __getitem__(self, name: str) -> Scored:
        """A way by its name.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.scored:
            raise ValueError(f"no way {name!r}; there are {', '.join(self.scored)}.")
        return self.scored[name]

    def top1(self, name: str, *, kind: str | None = None) -> float:
        """Share of analogies (of a kind) whose answer is the most likely token."""
        return float(self[name].right[self._which(kind)].double().mean())

    def interval(self, name: str, *, kind: str | None = None) -> Interval:
        """Bootstrap interval of :meth:`top1` over analogies."""
        return self._interval(self[name], self._which(kind))

    def _interval(self, way: Scored, keep: Tensor) -> Interval:
        return bootstrap_interval(way.right[keep], generator=torch.Generator().manual_seed(self.seed))

    def choice(self, name: str, *, kind: str | None = None) -> float:
        """Share of the analogies with foils (of a kind) whose answer beats every foil; NaN without any."""
        return _choice(self[name], self._which(kind))

    def compare(self, first: str, second: str, *, kind: str | None = None) -> PairedComparison:
        """Top-1 of two ways on the same analogies: paired bootstrap and McNemar's test."""
        keep = self._which(kind)
        a, b = self[first].right[keep], self[second].right[keep]
        p_value, one, two = mcnemar(a, b)
        generator = torch.Generator().manual_seed(self.seed)
        return PairedComparison(paired_difference(a, b, generator=generator), p_value, one, two)

    def _check_loaded(self) -> None:
        n = len(self.analogies)
        for name, way in self.scored.items():
            if way.name != name or len(way.ranks) != n:
                raise ValueError(f"{name}: expected scores of {n} analogies.")
            check_counts(way, n)

    def _line(self) -> str:
        shown = ", ".join(f"{name} {self.top1(name):.3f}" for name in self.scored)
        return f"{len(self.analogies)} analogies, basis of {len(self.basis)}, top1: {shown}"

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(name, number(self.top1(name)), number(self.choice(name))) for name in self.scored]
        return [("way", "top-1", "choice"), *rows]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an analogy and way: words, kind, relations, ``way, rank, right, log_prob, chosen``."""
        import pandas as pd

        rows = []
        for way in self.scored.values():
            for i, one in enumerate(self.analogies):
                rows.append(
                    dict(
                        analogy=str(one), kind=one.kind, source_relation=one.source_relation,
                        target_relation=one.target_relation, way=way.name, rank=int(way.ranks[i]),
                        right=bool(way.right[i]), log_prob=float(way.log_probs[i]), chosen=way.chosen[i],
                    )
                )  # fmt: skip
        return pd.DataFrame(rows)

    def summary(self) -> "pd.DataFrame":
        """One row a way and kind: ``kind, way, n, top1, low, high, choice, mean_rank``; intervals over analogies."""
        import pandas as pd

        rows = []
        for kind in dict.fromkeys(one.kind for one in self.analogies):
            keep = torch.tensor([one.kind == kind for one in self.analogies])
            for way in self.scored.values():
                low, high, _ = self._interval(way, keep)
                rows.append(
                    dict(
                        kind=kind, way=way.name, n=int(keep.sum()), top1=float(way.right[keep].double().mean()),
                        low=low, high=high, choice=_choice(way, keep),
                        mean_rank=float(way.ranks[keep].double().mean()),
                    )
                )  # fmt: skip
        return pd.DataFrame(rows)

    def by_relation(self, first: str, second: str, *, kind: str | None = None) -> "pd.DataFrame":
        """Which target relations gain from one way over another, and what the mixture puts its weight on.

        One row a target relation, the largest gain first: ``relation, n``, top-1 of either way, ``gain``, and, with a
        composite, ``heaviest`` (the basis relation with most weight on average, whatever its sign), ``weight`` (its
        mean) and ``own_weight`` (that of the target relation itself, 0 where it is not in the basis).
        """
        import pandas as pd

        keep = self._which(kind).tolist()
        rows = []
        for name in dict.fromkeys(one.target_relation for one, kept in zip(self.analogies, keep, strict=True) if kept):
            own = [i for i, one in enumerate(self.analogies) if keep[i] and one.target_relation == name]
            a, b = (float(self[way].right[own].double().mean()) for way in (first, second))
            row: dict[str, Any] = {"relation": name, "n": len(own), first: a, second: b, "gain": a - b}
            if self.basis:
                mean = self.weights[own].mean(dim=0)
                place = int(mean.abs().argmax())
                own_weight = float(mean[self.basis.index(name)]) if name in self.basis else 0.0
                row |= {"heaviest": self.basis[place], "weight": float(mean[place]), "own_weight": own_weight}
            rows.append(row)
        return pd.DataFrame(rows).sort_values("gain", ascending=False, kind="stable", ignore_index=True)

    def plot(self, *, kind: str | None = None) -> "Figure":
        """Top-1 of every way with its interval, as bars."""
        from fvlens import plots

        names = list(self.scored)
        ends = [self.interval(name, kind=kind) for name in names]
        return plots.bars(
            names, [self.top1(name, kind=kind) for name in names], [e.low for e in ends], [e.high for e in ends],
            x_title="Top-1", x_range=(0, 1.15), highlighted=[name for name in names if name.startswith("composite")],
            level=ends[0].level,
            title=f"{'' if kind is None else kind.capitalize() + ' a'}{'A' if kind is None else ''}nalogies",
        )  # fmt: skip


def _choice(way: Scored, keep: Tensor) -> float:
    """Share of these analogies, of those with foils, whose answer beats every foil."""
    told = [c for c, kept in zip(way.chosen, keep.tolist(), strict=True) if kept and c is not None]
    return sum(told) / len(told) if told else float("nan")


def leaks(seen: Seen, analogies: Sequence[Analogy], *, unseen: Unseen = "pairs") -> list[str]:
    """What of these analogies took part in making a composite, as sentences.

    Args:
        seen: what took part.
        analogies: what is to be scored.
        unseen: what must be new: ``"pairs"``: word pairs and reversed pairs; ``"relations"``: the relations, too.

    Raises:
        ValueError: ``unseen`` is neither.
    """
    if unseen not in ("pairs", "relations"):
        raise ValueError(f"unseen={unseen!r}; expected pairs or relations.")
    known = {plain_pair(pair) for pair in seen.pairs}
    told: dict[str, None] = {}
    for one in analogies:
        for pair in (one.source_pair, one.target_pair):
            if plain_pair(pair) in known:
                told[f"the pair {pair.input} : {pair.output}"] = None
            elif plain_pair((pair.output, pair.input)) in known:
                told[f"the pair {pair.input} : {pair.output}, reversed"] = None
        if unseen == "relations":
            for name in (one.source_relation, one.target_relation):
                if name in seen.relations:
                    told[f"the relation {name}"] = None
    return list(told)


def plain_pair(pair: tuple[str, str]) -> tuple[str, str]:
    """A pair as the leak check compares it: without outer blanks and case."""
    return pair[0].strip().casefold(), pair[1].strip().casefold()


def evaluate_analogies(
    model: Any,
    analogies: Sequence[Analogy],
    composite: CompositeMap | None = None,
    *,
    settings: Sequence[AnalogySetting] = ANALOGY_SETTINGS,
    controls: Sequence[str] = CONTROLS,
    demonstrations: Mapping[str, Pairs] | None = None,
    n_shots: int = 5,
    unseen: Unseen = "pairs",
    allow_leak: bool = False,
    template: Template | str | None = None,
    sources: SourceScores | None = None,
    path: Route | None = None,
    max_memory: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> AnalogyEvaluation:
    """Solve analogies unsteered, with the composite vector, and with its controls.

    Open vocabulary: the rank of D's first token after C, and top-1 (another right answer counts, too). Multiple choice:
    the answer must beat every foil in mean log-probability per token. The composite is injected into the bare query
    (``"zero_shot"``) and into the one-shot analogy prompt (``"one_shot"``, the paper's). Where the composite has a gate
    for a prompt, it is scored with the gate (``"gated composite"``) and without.

    Args:
        model: the model.
        analogies: what is asked.
        composite: the trained map; without it only the unsteered ways are scored.
        settings: prompts that vectors are injected into.
        controls: of ``"uniform"`` (equal weights), ``"best single"`` (the basis vector that makes B most likely),
            ``"random"`` (a random direction of the composite's length) and ``"own vector"`` (that of the target's own
            relation, scored where it is in the basis).
        demonstrations: pairs of each target relation for the k-shot prompt; none, no such prompt.
        n_shots: its k.
        unseen: what of the analogies must not have taken part in basis, map or gate: see :func:`leaks`.
        allow_leak: score all the same.
        template: how prompts are written; by default as the composite's, ``"qa"`` without one.
        sources: :func:`source_scores` of the source pairs under the composite's basis and template, where several
            composites share them; counted here by default.
        path, max_memory: as for :func:`fvlens.finetune`.
        generator: random vectors, demonstrations, and the seed of the bootstrap.
        progress: show a bar.

    Returns:
        :class:`AnalogyEvaluation`.

    Raises:
        ValueError: no analogies; an unknown setting or control; a leak; too few demonstrations.

    Example:
        >>> import torch, fvlens
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> analogies = [fvlens.Analogy("cow", "calf", "bear", "cub", foils=("den",))]
        >>> found = fvlens.evaluate_analogies(model, analogies, generator=torch.Generator(), progress=False)
        >>> found.top1("unsteered, one-shot"), found.choice("unsteered, one-shot")
        (1.0, 1.0)
    """
    check_arguments(evaluate_analogies, locals(), runs=True)
    if n_shots < 0:
        raise ValueError(f"evaluate_analogies: expected n_shots of at least 0, got {n_shots}.")
    analogies = as_analogies(analogies, "evaluate_analogies")
    if not analogies:
        raise ValueError("evaluate_analogies: expected at least one analogy, got none.")
    for name, values, known in (("setting", settings, ANALOGY_SETTINGS), ("control", controls, CONTROLS)):
        strange = [value for value in values if value not in known]
        if strange:
            raise ValueError(f"evaluate_analogies: {name} {strange[0]!r}; expected some of {', '.join(known)}.")
    layer = 0  # where zero vectors are added when there is no composite
    if composite is not None:
        composite.basis.check(model)
        layer = composite.basis.layer
        found = leaks(composite.seen, analogies, unseen=unseen)
        if found and not allow_leak:
            raise ValueError(
                f"evaluate_analogies: {len(found)} leaks, the first: {found[0]} took part in making the composite; "
                "leave them out, or score all the same with allow_leak=True."
            )
    template = template_for(model, template_or(template, None if composite is None else composite.template))
    if composite is not None and composite.template != template:
        composite = dataclasses.replace(composite, template=template)
    asked = _Asked.of(analogies)
    options: dict[str, Any] = dict(layer=layer, template=template, path=path, max_memory=max_memory)
    shots = _shots(analogies, demonstrations, n_shots, generator) if demonstrations is not None else None
    seed = int(torch.randint(2**31, (1,), generator=generator))
    zero = torch.zeros(model.cfg.d_model)
    ways = {setting: {"unsteered": zero} for setting in settings}
    if composite is not None:
        kept: dict[str, Any] = dict(path=path, max_memory=max_memory)
        pairs = [one.source_pair for one in analogies]
        sources = given_or_scored(
            sources, model, composite.basis, pairs, whose="evaluate_analogies", template=template, **kept
        )
        vectors = _vectors(analogies, composite, sources.log_probs, controls, generator)
        for setting in settings:
            ways[setting] |= vectors
            gate = composite.gate(setting)
            if gate is not None:
                signals = gate_signals(model, composite, analogies, setting=setting, sources=sources, **kept)
                ways[setting]["gated composite"] = gate.strength(signals)[:, None] * vectors["composite"]
    scored: dict[str, Scored] = {}
    n_ways = sum(map(len, ways.values())) + (shots is not None)
    with torch.no_grad(), frozen(model), tqdm(total=n_ways, disable=not progress, desc="analogies") as bar:
        for setting in settings:
            shown = shown_pairs([one.source_pair for one in analogies], setting)
            queries = asked.queries(model, shown, options)
            for name, given in ways[setting].items():
                full = f"{name}, {setting.replace('_', '-')}"
                scored[full] = asked.score(queries, given, full)
                bar.update()
        if shots is not None:
            name = f"unsteered, {n_shots}-shot"
            scored[name] = asked.score(asked.queries(model, shots, options), zero, name)
            bar.update()
    if composite is None or sources is None:
        return AnalogyEvaluation(analogies, scored, seed)
    weights = composite.weights_of(sources.log_probs)
    return AnalogyEvaluation(analogies, scored, seed, composite.basis.names, weights, composite.basis.fingerprint)


def _shots(
    analogies: Sequence[Analogy], demonstrations: Mapping[str, Pairs], n: int,
    generator: torch.Generator,
) -> list[list[Pair]]:  # fmt: skip
    """Demonstrations of each target's own relation, without its words."""
    shown = []
    whose = "evaluate_analogies: demonstrations of"
    given = {name: as_pairs(own, what=f"{whose} {name!r}", may_be_empty=True) for name, own in demonstrations.items()}
    for one in analogies:
        pairs = [pair for pair in given.get(one.target_relation, ()) if not {*pair} & {one.c, one.d}]
        if len(pairs) < n:
            raise ValueError(
                f"evaluate_analogies: {n} demonstrations of {one.target_relation!r} wanted for {one}, but there are "
                f"{len(pairs)} without its words."
            )
        shown.append([pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:n].tolist()])
    return shown


def _vectors(
    analogies: Sequence[Analogy], composite: CompositeMap, scores: Float[Tensor, "analogy relation"],
    controls: Sequence[str], generator: torch.Generator,
) -> dict[str, Float[Tensor, "analogy d_model"]]:  # fmt: skip
    """The vectors of each way, a row an analogy."""
    basis, matrix = composite.basis, composite.basis.matrix
    mixed = composite.mix(scores)[1]
    found = {"composite": mixed}
    for name in controls:
        if name in ("uniform", "best single"):
            found[name] = RULES[name.replace(" ", "_")](scores) @ matrix
        elif name == "random":
            noise = torch.randn(mixed.shape, generator=generator)
            found[name] = noise * (mixed.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))
        else:
            place = {relation: i for i, relation in enumerate(basis.names)}
            if all(one.target_relation in place for one in analogies):
                found[name] = matrix[[place[one.target_relation] for one in analogies]]
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """All candidates of all analogies as queries: of each its answer, then its foils.

    Attributes:
        analogies: the analogies.
        pairs: the query of each candidate.
        whose: the analogy that it belongs to.
        first: the place of each analogy's own answer.
    """

    analogies: tuple[Analogy, ...]
    pairs: tuple[Pair, ...]
    whose: Int[Tensor, " candidate"]
    first: Int[Tensor, " analogy"]

    @classmethod
    def of(cls, analogies: Sequence[Analogy]) -> "_Asked":
        pairs, whose, first = [], [], []
        for i, one in enumerate(analogies):
            first.append(len(pairs))
            foils = [foil if isinstance(foil, Pair) else Pair(one.c, foil) for foil in one.foils]
            pairs += [one.target_pair, *foils]
            whose += [i] * (1 + len(foils))
        return cls(tuple(analogies), tuple(pairs), torch.tensor(whose), torch.tensor(first))

    def queries(self, model: Any, shown: Sequence[Sequence[Pair]] | None, options: Mapping[str, Any]) -> Queries:
        demonstrations = None if shown is None else [shown[i] for i in self.whose.tolist()]
        return Queries(model, self.pairs, demonstrations, **options)

    def score(self, queries: Queries, vectors: Float[Tensor, "*analogy d_model"], name: str) -> Scored:
        n = len(self.analogies)
        logs = torch.empty(len(self.pairs))
        ranks = torch.empty(n, dtype=torch.long)
        best = torch.empty(n, dtype=torch.long)
        own = torch.full((len(self.pairs),), -1)
        own[self.first] = torch.arange(n)
        for rows in queries.parts(torch.arange(len(self.pairs))):
            found, first = queries.scores(rows, vectors if vectors.ndim == 1 else vectors[self.whose[rows]])
            logs[rows] = (found.sum(dim=1).cpu() / queries.n_tokens[rows]).float()
            mine = own[rows] >= 0
            if bool(mine.any()):
                top = first[mine.to(first.device)]
                wanted = queries.targets[rows[mine].to(queries.targets.device), 0].to(top.device)
                ranks[own[rows][mine]] = rank(top, wanted).cpu()
                best[own[rows][mine]] = best_token(top).cpu()
        right = ranks == 0
        for i, one in enumerate(self.analogies):
            if one.alternatives and not right[i]:
                right[i] = int(best[i]) in _first_tokens(queries, int(self.first[i]), one.alternatives)
        chosen: list[bool | None] = []
        for i, one in enumerate(self.analogies):
            start = int(self.first[i])
            others = logs[start + 1 : start + 1 + len(one.foils)]
            chosen.append(bool(logs[start] > others.max()) if len(others) else None)
        return Scored(name, ranks, right, logs[self.first], tuple(chosen))


def _first_tokens(queries: Queries, place: int, words: Sequence[str]) -> set[int]:
    """First tokens of these words as answers to one of the queries."""
    prompts, tokenizer = queries.prompts, queries.model.tokenizer
    text = prompts.texts[place]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    n = len(words)
    return {tokens[0] for tokens in answers_behind(tokenizer, prompts.template, [text] * n, [ids] * n, words)}
