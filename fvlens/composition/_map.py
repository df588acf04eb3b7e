"""Composite vectors: an affine map from source scores to weights, trained through the frozen model."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.composition._affine import Affine, Transfer, distinct, recognition
from fvlens.composition._gate import Gate
from fvlens.composition._queries import (
    ANALOGY_SETTINGS,
    AnalogySetting,
    Queries,
    SourceScores,
    given_or_scored,
    shown_pairs,
    source_scores,
)
from fvlens.composition._rules import RULES, weights_by
from fvlens.files import read_tensors, write_tensors
from fvlens.finetuning import VectorSet, frozen
from fvlens.prompts import Template, get_template, template_from, template_header, template_or
from fvlens.relations import Analogy, Pair, list_relations, load_relation
from fvlens.suffix import Route
from fvlens.types import as_list, as_number, as_texts
from fvlens.vectors import FunctionVector, as_float32, vector_from, vector_header

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Map = Literal["none", "diagonal", "full", "lowrank", "transfer"]
ScoreKind = Literal["log_probability", "probability"]
MAPS: tuple[Map, ...] = ("none", "diagonal", "full", "lowrank", "transfer")
SCORES: tuple[ScoreKind, ...] = ("log_probability", "probability")
MAP_FORMAT = "fvlens-composite-map-1"


@dataclass(frozen=True, slots=True)
class Seen:
    """What took part in making a composite; evaluations refuse to score on it.

    Attributes:
        relations: names of the relations of the basis and of the analogies that were fitted.
        pairs: word pairs of the basis's training, of the map's and of the gate's.
    """

    relations: frozenset[str] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()

    def with_analogies(self, analogies: Sequence[Analogy]) -> "Seen":
        """The same and these analogies."""
        names = {name for one in analogies for name in (one.source_relation, one.target_relation) if name}
        pairs = {(x, y) for one in analogies for x, y in (one.source_pair, one.target_pair)}
        return Seen(self.relations | names, self.pairs | pairs)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an analogy is solved as it is: the weight of every basis relation.

    Attributes:
        names: the basis.
        weights: one each; at least 0 and summing to 1, except by a transfer map, which gives signed ones.
        scores: mean log-probability of B given A under each basis vector, in nats.
        pairs: the source pairs.
        recognised: of a transfer map, how likely the source pair shows each basis relation; the weights otherwise.
    """

    names: tuple[str, ...]
    weights: Float[Tensor, " relation"]
    scores: Float[Tensor, " relation"]
    pairs: tuple[Pair, ...]
    recognised: Float[Tensor, " relation"]

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The heaviest basis relations with their weights, whatever their sign."""
        return self._first(self.weights, n)

    def named(self, n: int = 3) -> list[tuple[str, float]]:
        """The basis relations that the source pair most likely shows, with their probability."""
        return self._first(self.recognised, n)

    def _first(self, values: Float[Tensor, " relation"], n: int) -> list[tuple[str, float]]:
        order = values.abs().argsort(descending=True)[:n].tolist()
        return [(self.names[i], float(values[i])) for i in order]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a basis relation: ``relation, weight, score, recognised``."""
        import pandas as pd

        columns = dict(weight=self.weights, score=self.scores, recognised=self.recognised)
        return pd.DataFrame({"relation": self.names, **{name: column.numpy() for name, column in columns.items()}})

    def plot(self, n: int = 12) -> "go.Figure":
        """The heaviest weights as bars."""
        from fvlens import plots

        chosen = self.top(n)
        shown = ", ".join(f"{pair.input} : {pair.output}" for pair in self.pairs)
        return plots.bars(
            [name for name, _ in chosen], [weight for _, weight in chosen], x_title="Weight", title=f"Basis of {shown}"
        )


@dataclass(frozen=True, slots=True)
class FitHistory:
    """Loss (nats an answer) and top-1 after each epoch; entry 0 is before any step. NaN without validation."""

    train_loss: tuple[float, ...]
    valid_loss: tuple[float, ...]
    valid_top1: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("train_loss", "valid_loss", "valid_top1"):
            curve = getattr(self, name)
            if not isinstance(curve, tuple) or not all(type(value) is float for value in curve):
                raise ValueError(f"FitHistory: {name}: expected a tuple of floats, got {curve!r}.")
            if len(curve) != len(self.train_loss):
                raise ValueError(
                    f"FitHistory: expected curves of one length, got {len(self.train_loss)} values of train_loss and "
                    f"{len(curve)} of {name}."
                )


@dataclass(frozen=True, slots=True)
class CompositeMap:
    """From a source pair to a composite vector: ``v = strength * sum_i w_i v_i``, ``w = rule(M s + c)``.

    ``s`` are the scores of the source pair under the basis vectors (:func:`source_scores`). A transfer map has
    ``w = T rule(M s + c)``.

    Attributes:
        basis: the vectors v_i.
        map: what was trained: ``"none"`` (M = 1, c = 0), ``"diagonal"``, ``"full"``, ``"lowrank"`` or ``"transfer"``.
        matrix, shift: M and c.
        transfer: T of a transfer map, None of any other.
        strength: factor on the mixture; 1 unless it was trained.
        scores: ``"log_probability"`` or ``"probability"``.
        rule: a name of :data:`RULES`.
        setting: the prompts it was trained on.
        template: of source and target queries; a name gives the built-in one.
        gates: at most one a setting; see :func:`fit_gate`.
        seen: what took part; evaluations refuse to score on it.
        history: of the training.
    """

    basis: VectorSet
    map: Map
    matrix: Float[Tensor, "relation relation"]
    shift: Float[Tensor, " relation"]
    strength: float = 1.0
    scores: ScoreKind = "log_probability"
    rule: str = "softmax"
    setting: AnalogySetting = "zero_shot"
    template: Template | str = "qa"
    gates: tuple[Gate, ...] = ()
    seen: Seen = field(default_factory=Seen)
    history: FitHistory = field(default_factory=lambda: FitHistory((), (), ()))
    transfer: Float[Tensor, "relation relation"] | None = None

    def __post_init__(self) -> None:
        n = len(self.basis)
        if (self.transfer is None) == (self.map == "transfer") or (
            self.transfer is not None and self.transfer.shape != (n, n)
        ):
            got = "none" if self.transfer is None else str(list(self.transfer.shape))
            raise ValueError(
                f"CompositeMap: a transfer map, and no other, has a transfer [{n} {n}]; map={self.map!r} has {got}."
            )
        if self.matrix.shape != (n, n) or self.shift.shape != (n,):
            raise ValueError(
                f"CompositeMap: a basis of {n} needs a matrix [{n} {n}] and a shift [{n}], got "
                f"{list(self.matrix.shape)} and {list(self.shift.shape)}."
            )
        _check_choice("map", self.map, MAPS)
        _check_choice("scores", self.scores, SCORES)
        _check_choice("rule", self.rule, tuple(RULES))
        _check_choice("setting", self.setting, ANALOGY_SETTINGS)
        for name in ("matrix", "shift", "transfer"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, as_float32(values, f"CompositeMap: {name}"))
        object.__setattr__(self, "strength", as_number(self.strength, "CompositeMap: strength"))
        object.__setattr__(self, "template", get_template(self.template))
        gated = [gate.setting for gate in self.gates]
        if len(set(gated)) < len(gated):
            raise ValueError(f"CompositeMap: expected one gate a setting, got gates for {', '.join(gated)}.")

    @classmethod
    def plain(
        cls,
        basis: VectorSet,
        *,
        template: Template | str | None = None,
        setting: AnalogySetting = "zero_shot",
        pairs: Sequence[Pair | tuple[str, str]] = (),
    ) -> "CompositeMap":
        """No map: weights are the softmax of the scores. ``pairs`` are those that the basis was trained on."""
        n = len(basis)
        template = template_or(template, basis.template)
        seen = Seen(frozenset(basis.names), frozenset((x, y) for x, y in pairs))
        return cls(basis, "none", torch.eye(n), torch.zeros(n), setting=setting, template=template, seen=seen)

    def gate(self, setting: AnalogySetting) -> Gate | None:
        """The gate for these prompts, if there is one."""
        return next((gate for gate in self.gates if gate.setting == setting), None)

    def with_gate(self, gate: Gate, analogies: Sequence[Analogy] = ()) -> "CompositeMap":
        """The same with this gate instead of an older one of its setting; ``analogies`` took part in making it."""
        kept = tuple(one for one in self.gates if one.setting != gate.setting)
        return dataclasses.replace(self, gates=(*kept, gate), seen=self.seen.with_analogies(analogies))

    def mix(
        self, log_probs: Float[Tensor, "*row relation"]
    ) -> tuple[Float[Tensor, "*row relation"], Float[Tensor, "*row d_model"]]:
        """Weights and composite vectors from scores that are there already, before any gate."""
        weights = self.weights_of(log_probs)
        return weights, self.strength * (weights @ self.basis.matrix)

    def weights_of(self, log_probs: Float[Tensor, "*row relation"]) -> Float[Tensor, "*row relation"]:
        """Weights from scores that are there already (log-probabilities of the source's answer)."""
        recognised = self.recognised(log_probs)
        return recognised if self.transfer is None else recognised @ self.transfer.T

    def recognised(self, log_probs: Float[Tensor, "*row relation"]) -> Float[Tensor, "*row relation"]:
        """``rule(M s + c)``: the weights, or what a transfer map makes them of; at least 0, summing to 1."""
        given = log_probs.exp() if self.scores == "probability" else log_probs
        return weights_by(self.rule, given @ self.matrix.T + self.shift)

    def explain(self, model: Any, a: str | Sequence[str], b: str | Sequence[str]) -> Explanation:
        """Weights with what they come from.

        Args:
            model: the model of the basis.
            a, b: the source pair; or several words each, whose scores are averaged.

        Raises:
            ValueError: not as many a as b, or none; a model other than the basis's.
        """
        first, second = ([a] if isinstance(a, str) else list(a)), ([b] if isinstance(b, str) else list(b))
        if len(first) != len(second) or not first:
            raise ValueError(f"expected as many a as b, at least one, got {len(first)} and {len(second)}.")
        pairs = tuple(Pair(x, y) for x, y in zip(first, second, strict=True))
        scores = source_scores(model, self.basis, pairs, template=self.template).log_probs.mean(dim=0)
        return self.explanation(scores, pairs)

    def explanation(self, log_probs: Float[Tensor, " relation"], pairs: Sequence[Pair]) -> Explanation:
        """The same from scores that are there already."""
        weights, recognised = self.weights_of(log_probs), self.recognised(log_probs)
        return Explanation(self.basis.names, weights, log_probs, tuple(pairs), recognised)

    def weights(self, model: Any, a: str | Sequence[str], b: str | Sequence[str]) -> Float[Tensor, " relation"]:
        """Weight of every basis vector for the relation of a to b (several source pairs: see :meth:`explain`)."""
        return self.explain(model, a, b).weights

    def vector_for(self, model: Any, a: str | Sequence[str], b: str | Sequence[str]) -> FunctionVector:
        """The composite vector for the relation of a to b, ready for :func:`fvlens.inject`."""
        found = self.explain(model, a, b)
        return dataclasses.replace(
            self.basis[0],
            vector=self.mix(found.scores[None])[1][0],
            relation=", ".join(f"{pair.input} : {pair.output}" for pair in found.pairs),
            kind="composite",
            template=self.template,
            heads=(),
            data_hash="",
            seed=None,
        )

    def plot(self, model: Any, a: str | Sequence[str], b: str | Sequence[str], *, n: int = 12) -> "go.Figure":
        """The heaviest weights for the relation of a to b as bars: why an analogy is solved as it is."""
        return self.explain(model, a, b).plot(n)

    def save(self, path: str | FilePath) -> FilePath:
        """Write everything to one safetensors file, metadata in its header. Replaces an existing file at once."""
        header = {
            "vectors": [vector_header(vector) for vector in self.basis],
            "categories": list(self.basis.categories),
            "seen": {"relations": sorted(self.seen.relations), "pairs": sorted(map(list, self.seen.pairs))},
            "history": dataclasses.asdict(self.history),
            "gates": [dataclasses.asdict(gate) for gate in self.gates],
            **{name: getattr(self, name) for name in _PLAIN},
            **template_header(self.template),
        }
        tensors = {"basis": self.basis.matrix, "matrix": self.matrix, "shift": self.shift}
        if self.transfer is not None:
            tensors["transfer"] = self.transfer
        return write_tensors(FilePath(path), tensors, header, MAP_FORMAT)

    @classmethod
    def load(cls, path: str | FilePath, *, model: Any = None, template: Template | str | None = None) -> "CompositeMap":
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            model: if given, the basis must have been made on this model.
            template: taken instead of the file's, for the map and its basis; see :meth:`FunctionVector.load`.

        Raises:
            ValueError: no such file; not a composite map, or a damaged one; or one of another model than ``model``.
        """
        path = FilePath(path)
        tensors, header = read_tensors(path, MAP_FORMAT)
        try:
            vectors = [
                vector_from(row, entry, template)
                for row, entry in zip(tensors["basis"], header["vectors"], strict=True)
            ]
            seen = header["seen"]
            loaded = cls(
                basis=VectorSet(tuple(vectors), as_texts(header["categories"], "categories")),
                matrix=tensors["matrix"],
                shift=tensors["shift"],
                transfer=tensors.get("transfer"),
                seen=Seen(
                    frozenset(as_texts(seen["relations"], "seen relations")),
                    frozenset(map(_pair, as_list(seen["pairs"], "seen pairs"))),
                ),
                gates=tuple(
                    Gate(**one | {"slopes": tuple(as_list(one["slopes"], "slopes"))})
                    for one in as_list(header["gates"], "gates")
                ),
                history=FitHistory(**{name: tuple(as_list(curve, name)) for name, curve in header["history"].items()}),
                **{name: header[name] for name in _PLAIN},
                template=template_or(template_from(header, template)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path.name}: damaged composite map ({type(error).__name__}: {error}).") from error
        if model is not None:
            loaded.basis.check(model)
        return loaded


_PLAIN = ("map", "strength", "scores", "rule", "setting")


def _pair(given: Any) -> tuple[str, str]:
    pair = as_texts(given, "seen pairs")
    if len(pair) != 2:
        raise ValueError(f"seen pairs: expected two words, got {list(pair)}.")
    return pair[0], pair[1]


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(known)}.")


def families_of(basis: VectorSet) -> list[str]:
    """The library family of every basis relation, ``""`` for one that the library does not know."""
    known = set(list_relations())
    return [load_relation(name).family if name in known else "" for name in basis.names]


def default_rank(basis: VectorSet) -> int:
    """The number of families among the basis's library relations (at least 1): what a map between domains needs."""
    return max(1, len(set(families_of(basis)) - {""}))


def fit_composite(
    model: Any,
    basis: VectorSet,
    analogies: Sequence[Analogy],
    *,
    map: Map = "diagonal",
    valid: Sequence[Analogy] = (),
    scores: ScoreKind = "log_probability",
    rule: str = "softmax",
    setting: AnalogySetting = "zero_shot",
    rank: int | None = None,
    learn_strength: bool = False,
    l2: float | None = None,
    lr: float | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    template: Template | str | None = None,
    basis_pairs: Sequence[Pair | tuple[str, str]] = (),
    sources: SourceScores | None = None,
    path: Route | None = None,
    max_memory: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> CompositeMap:
    """Train the affine map of a composite vector through the frozen model.

    ``L = mean over analogies of -log P(D | C; resid_l += strength * sum_i w_i v_i) + l2 * |M - M_0|^2``, summed over
    D's tokens, where ``w = rule(M s + c)`` and s are the scores of the source pair (A, B) under the basis. The paper
    learns an affine map and a softmax [digest]; its shape is not known, so there are four [choice]. ``lowrank`` can
    connect domains that no training analogy connects, which a diagonal map cannot and a full one gets no signal for.

    ``transfer`` [choice] drops the limit that weights are at least 0 and sum to 1: ``w = T rule(M s + c)``. M and c
    are fitted first, to name the relation of the source pair (logistic regression on the names in the analogies); then
    T, from 0, through the frozen model: ``T = b 1 + F G + R`` with one number b, weights F that all source relations of
    a library family share, and a single relation's own R, whose ridge is ``l2 * mean |sum_i (R p)_i v_i|^2``.

    Args:
        model: the model; its parameters and mode stay as they are.
        basis: fine-tuned vectors of one layer.
        analogies: training analogies.
        map: ``"none"``, ``"diagonal"``, ``"full"``, ``"lowrank"`` or ``"transfer"``.
        valid: analogies that choose the epoch (best top-1, then lowest loss); the last epoch without.
        scores: ``"log_probability"``, or ``"probability"`` as in the paper.
        rule: from affine scores to weights, a name of :data:`RULES`.
        setting: what the composite is injected into while training: ``"zero_shot"`` (the bare C) or ``"one_shot"``.
        rank: of ``"lowrank"``; by default the number of families in the basis.
        learn_strength: train a factor on the mixture too (1 otherwise). Many basis vectors with small weights make a
            short composite. T has a scale of its own, so a transfer map keeps 1.
        l2: weight of the squared distance from the start, by default 1e-4; of the ridge on R, by default 3e-3.
        lr: learning rate of Adam; by default 0.02, for ``"diagonal"`` 0.05.
        epochs, batch_size: passes over the analogies, analogies in a step.
        template: how queries are written; by default as the basis was made with, else ``"qa"``.
        basis_pairs: pairs that the basis was trained on; kept for the leak check.
        sources: :func:`source_scores` of the source pairs of ``analogies`` and then of ``valid``, where several maps
            share them; counted here by default.
        path, max_memory: as for :func:`fvlens.finetune`.
        generator: order of the minibatches.
        progress: show a bar.

    Returns:
        :class:`CompositeMap`.

    Raises:
        ValueError: no analogies; an unknown map, score, rule or setting; numbers out of range; another model's basis;
            a transfer map from analogies none of which names a source relation of the basis.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.relations import make_analogies
        >>> g = torch.Generator().manual_seed(0)
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> names = ["animal-young", "animal-home", "animal-sound"]
        >>> splits = {name: fvlens.load_relation(name).split(g) for name in names}
        >>> basis = fvlens.finetune_many(model, splits, init="zero", layer=1, generator=g, progress=False).vectors
        >>> parts = [fvlens.Relation(name, split.train) for name, split in splits.items()]
        >>> analogies = make_analogies(parts, kind="near", n=60, generator=g)
        >>> composite = fvlens.fit_composite(model, basis, analogies, epochs=3, generator=g, progress=False)
        >>> composite.explain(model, "cow", "calf").top(1)[0][0]
        'animal-young'

    References:
        Kang, Wu and Lu 2026, arXiv:2601.08169 [digest].
    """
    for name, value, known in (("map", map, MAPS), ("scores", scores, SCORES), ("rule", rule, tuple(RULES)),
                               ("setting", setting, ANALOGY_SETTINGS)):  # fmt: skip
        _check_choice(name, value, known)
    l2 = (3e-3 if map == "transfer" else 1e-4) if l2 is None else l2
    for name, number, least in (("epochs", epochs, 0), ("batch_size", batch_size, 1), ("l2", l2, 0)):
        if not (math.isfinite(number) and number >= least):
            raise ValueError(f"fit_composite: expected {name} of at least {least}, got {number}.")
    if not analogies:
        raise ValueError("fit_composite: expected at least one analogy, got none.")
    basis.check(model)
    place = {name: i for i, name in enumerate(basis.names)}
    labels = torch.tensor([place.get(one.source_relation, -1) for one in analogies])
    if map == "transfer" and not bool((labels >= 0).any()):
        raise ValueError("fit_composite: a transfer map needs analogies that name source relations of the basis.")
    rank = default_rank(basis) if rank is None else rank
    if not 1 <= rank <= len(basis):
        raise ValueError(f"fit_composite: expected rank in 1..{len(basis)} (the size of the basis), got {rank}.")
    every = [*analogies, *valid]
    n_train = len(analogies)
    template = template_or(template, basis.template)
    options: dict[str, Any] = dict(template=template, path=path, max_memory=max_memory)
    pairs = [one.source_pair for one in every]
    sources = given_or_scored(sources, model, basis, pairs, whose="fit_composite", progress=progress, **options)
    given = sources.log_probs
    if scores == "probability":
        given = given.exp()
    shown = shown_pairs(pairs, setting)
    queries = Queries(model, [one.target_pair for one in every], shown, layer=basis.layer, **options)
    if map == "transfer":
        rows = distinct(given[:n_train], labels)
        found = recognition(given[:n_train][rows], labels[rows])
        trainee = Transfer(*found, rule, basis.matrix, families_of(basis))
    else:
        trainee = Affine(map, given[:n_train], rule, rank, learn_strength)
    trained = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    rate = lr or (0.05 if map == "diagonal" else 0.02)
    optimiser = torch.optim.Adam(trained, lr=rate) if trained else None
    matrix = basis.matrix

    def vectors(rows: Tensor) -> Tensor:
        return trainee(given[rows]) @ matrix

    def score(start: int, end: int) -> tuple[float, float]:
        """Mean loss and top-1 of some analogies."""
        if start == end:
            return math.nan, math.nan
        losses, hits = [], []
        with torch.no_grad():
            for rows in queries.parts(torch.arange(start, end)):
                logs, first = queries.scores(rows, vectors(rows))
                losses.append(-logs.sum(dim=1).cpu())
                hits.append(queries.right(first, rows))
        return float(torch.cat(losses).double().mean()), float(torch.cat(hits).double().mean())

    train_loss = [score(0, n_train)[0]]
    curves = [score(n_train, len(every))]
    best, best_key = {k: v.clone() for k, v in trainee.state_dict().items()}, (curves[0][1], -curves[0][0])
    with frozen(model), torch.enable_grad(), tqdm(total=epochs, disable=not progress, desc="composite map") as bar:
        for epoch in range(epochs if optimiser is not None else 0):
            assert optimiser is not None
            for group in optimiser.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            total = 0.0
            for rows in torch.randperm(n_train, generator=generator).split(batch_size):
                optimiser.zero_grad(set_to_none=True)
                for part in queries.parts(rows):
                    loss = -queries.log_probs(part, vectors(part)).sum() / len(rows)
                    loss.backward()
                    total += float(loss.detach()) * len(rows)
                if l2 and map != "none":
                    (l2 * trainee.penalty(given[rows])).backward()
                optimiser.step()
            train_loss.append(total / n_train)
            curves.append(score(n_train, len(every)))
            key = (curves[-1][1], -curves[-1][0])
            if not valid or key > best_key:
                best, best_key = {k: v.clone() for k, v in trainee.state_dict().items()}, key
            bar.update()
    trainee.load_state_dict(best)
    folded, shift = trainee.folded()
    seen = Seen(frozenset(basis.names), frozenset((x, y) for x, y in basis_pairs)).with_analogies(every)
    return CompositeMap(
        basis=basis, map=map, matrix=folded, shift=shift, strength=trainee.strength(),
        scores=scores, rule=rule, setting=setting, template=template, seen=seen,
        history=FitHistory(tuple(train_loss), tuple(c[0] for c in curves), tuple(c[1] for c in curves)),
        transfer=trainee.transfer().detach() if isinstance(trainee, Transfer) else None,
    )  # fmt: skip
