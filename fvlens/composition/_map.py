"""Composite vectors: an affine map from source scores to weights, trained through the frozen model."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fvlens.composition._gate import Gate
from fvlens.composition._queries import (
    ANALOGY_SETTINGS,
    AnalogySetting,
    source_scores,
)
from fvlens.composition._rules import RULES, weights_by
from fvlens.files import read_tensors, write_tensors
from fvlens.prompts import Template, get_template, template_from, template_header, template_or
from fvlens.relations import Analogy, Pair, Pairs, named_pairs, words_of
from fvlens.showing import MOST_ROWS, Shown, number, shortened
from fvlens.training import TrainingState, VectorSet
from fvlens.types import as_flag, as_list, as_number, as_texts
from fvlens.vectors import INTERRUPTED, FunctionVector, as_float32

if TYPE_CHECKING:
    import pandas as pd

    from fvlens.plots import Figure

Map = Literal["none", "diagonal", "full", "lowrank", "transfer"]
ScoreKind = Literal["log_probability", "probability"]
MAPS: tuple[Map, ...] = ("none", "diagonal", "full", "lowrank", "transfer")
SCORES: tuple[ScoreKind, ...] = ("log_probability", "probability")
MAP_FORMAT = "fvlens-composite-map-1"


@dataclass(frozen=True, slots=True, repr=False)
class Seen(Shown):
    """What took part in making a composite; evaluations refuse to score on it.

    Attributes:
        relations: names of the relations of the basis and of the analogies that were fitted.
        pairs: word pairs of the basis's training, of the map's and of the gate's.
    """

    relations: frozenset[str] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()

    def _line(self) -> str:
        return f"{len(self.relations)} relations, {len(self.pairs)} pairs"

    def with_analogies(self, analogies: Sequence[Analogy]) -> "Seen":
        """The same and these analogies."""
        names = {name for one in analogies for name in (one.source_relation, one.target_relation) if name}
        pairs = {(x, y) for one in analogies for x, y in (one.source_pair, one.target_pair)}
        return Seen(self.relations | names, self.pairs | pairs)


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Shown):
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

    def _line(self) -> str:
        shown = ", ".join(f"{pair.input} : {pair.output}" for pair in self.pairs)
        heaviest = ", ".join(f"{name} {weight:.3f}" for name, weight in self.top(3))
        return f"{shortened(shown)}: {heaviest}, of {len(self.names)} relations"

    def _cells(self) -> list[tuple[str, ...]]:
        return [("relation", "weight"), *((name, f"{weight:+.3f}") for name, weight in self.top(MOST_ROWS))]

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

    def plot(self, n: int = 12) -> "Figure":
        """The heaviest weights as bars."""
        from fvlens import plots

        chosen = self.top(n)
        shown = ", ".join(f"{pair.input} : {pair.output}" for pair in self.pairs)
        return plots.bars(
            [name for name, _ in chosen],
            [weight for _, weight in chosen],
            x_title="Weight",
            signed=True,
            title=f"Basis of {shown}",
        )


@dataclass(frozen=True, slots=True, repr=False)
class FitHistory(Shown):
    """Loss (nats an answer) and top-1 after each epoch; entry 0 is before any step. NaN without validation."""

    train_loss: tuple[float, ...]
    valid_loss: tuple[float, ...]
    valid_top1: tuple[float, ...]

    def _line(self) -> str:
        n = len(self.train_loss)
        return f"{max(0, n - 1)} epochs" + (f", train loss {number(self.train_loss[-1])}" if n else "")

    def _cells(self) -> list[tuple[str, ...]]:
        rows = zip(self.train_loss, self.valid_loss, self.valid_top1, strict=True)
        heading = ("epoch", "train loss", "valid loss", "valid top-1")
        return [heading, *((str(i), *map(number, row)) for i, row in enumerate(rows))]

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


@dataclass(frozen=True, slots=True, repr=False)
class CompositeMap(Shown):
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
        complete: False if the last training, of the map or of a gate, was interrupted.
        state: to go on from, ``fit_composite(..., resume=state)``, or ``fit_gate``; it has a file of its own.
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
    complete: bool = True
    state: TrainingState | None = None

    def _line(self) -> str:
        gates = f", gates: {', '.join(gate.setting for gate in self.gates)}" if self.gates else ""
        part = "" if self.complete else ", interrupted"
        return (
            f"{self.map} map over {len(self.basis)} relations, rule {self.rule}, {self.setting}, strength "
            f"{self.strength:.3f}{gates}, model {self.basis.fingerprint.name!r}{part}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return self.history._cells()

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
        check_choice("map", self.map, MAPS)
        check_choice("scores", self.scores, SCORES)
        check_choice("rule", self.rule, tuple(RULES))
        check_choice("setting", self.setting, ANALOGY_SETTINGS)
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
        pairs: Pairs = (),
    ) -> "CompositeMap":
        """No map: weights are the softmax of the scores. ``pairs`` are those that the basis was trained on."""
        n = len(basis)
        template = template_or(template, basis.template)
        known = seen_pairs(pairs, "CompositeMap.plain: pairs")
        seen = Seen(frozenset(basis.names), frozenset((x, y) for x, y in known))
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
        first = words_of([a] if isinstance(a, str) else a, "explain: a")
        second = words_of([b] if isinstance(b, str) else b, "explain: b")
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

    def plot(self, model: Any, a: str | Sequence[str], b: str | Sequence[str], *, n: int = 12) -> "Figure":
        """The heaviest weights for the relation of a to b as bars: why an analogy is solved as it is."""
        return self.explain(model, a, b).plot(n)

    def save(self, path: str | FilePath) -> FilePath:
        """Write everything to one safetensors file, metadata in its header. Replaces an existing file at once."""
        header = {
            **self.basis.header(),
            "seen": {"relations": sorted(self.seen.relations), "pairs": sorted(map(list, self.seen.pairs))},
            "history": dataclasses.asdict(self.history),
            "gates": [dataclasses.asdict(gate) for gate in self.gates],
            "complete": self.complete,
            **{name: getattr(self, name) for name in _PLAIN},
            **template_header(self.template),
        }
        tensors = {"basis": self.basis.matrix, "matrix": self.matrix, "shift": self.shift}
        if self.transfer is not None:
            tensors["transfer"] = self.transfer
        return write_tensors(FilePath(path), tensors, header, MAP_FORMAT)

    @classmethod
    def load(cls, path: str | FilePath, *, model: Any = None, template: Template | str | None = None) -> "CompositeMap":
        """Read what :meth:`save` wrote, with a warning if its training was interrupted.

        Nothing in the file is executed.

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
            seen = header["seen"]
            loaded = cls(
                basis=VectorSet.from_header(tensors["basis"], header, template),
                matrix=tensors["matrix"],
                shift=tensors["shift"],
                transfer=tensors.get("transfer"),
                seen=Seen(
                    frozenset(as_texts(seen["relations"], "seen relations")),
                    frozenset(map(_pair, as_list(seen["pairs"], "seen pairs"))),
                ),
                gates=tuple(Gate.from_header(gate) for gate in as_list(header["gates"], "gates")),
                complete=as_flag(header.get("complete", True), "complete"),  # version 0.1 saved no other
                history=FitHistory(**{name: tuple(as_list(curve, name)) for name, curve in header["history"].items()}),
                **{name: header[name] for name in _PLAIN},
                template=template_or(template_from(header, template)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path.name}: damaged composite map ({type(error).__name__}: {error}).") from error
        if model is not None:
            loaded.basis.check(model)
        if not loaded.complete:
            warnings.warn(f"{path.name}: {INTERRUPTED}.", stacklevel=2)
        return loaded


_PLAIN = ("map", "strength", "scores", "rule", "setting")


def _pair(given: Any) -> tuple[str, str]:
    pair = as_texts(given, "seen pairs")
    if len(pair) != 2:
        raise ValueError(f"seen pairs: expected two words, got {list(pair)}.")
    return pair[0], pair[1]


def seen_pairs(pairs: Pairs, what: str) -> tuple[Pair, ...]:
    """Pairs that took part in making something, every one of them."""
    return named_pairs(pairs, what=what, may_be_empty=True, repeats=True)[0]


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(known)}.")
