"""Fitting a gate, and the signals that it reads."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fvlens.composition._affine import folded, minimise, scale_of
from fvlens.composition._gate import GATES, SIGNALS, Gate, GateKind
from fvlens.composition._map import CompositeMap
from fvlens.composition._options import FittingOptions, fitting
from fvlens.composition._queries import (
    ANALOGY_SETTINGS,
    AnalogySetting,
    Queries,
    SourceScores,
    answer_scores,
    given_or_scored,
    shown_pairs,
)
from fvlens.metrics import best_token
from fvlens.relations import Analogy
from fvlens.suffix import Route
from fvlens.training import Settings, SteeringChange, Task, Training, filled, frozen, train

LOWERED_BY, LOWERINGS = 0.25, 200
"""Steps of a learned gate's offset, and at most how many, until near analogies are not made worse."""
NEAR_WEIGHT, LOGISTIC_L2 = 5.0, 1e-2
"""Of a logistic gate: what a near analogy counts, and the weight of the squared slopes (over scaled signals)."""
LEAST = 1e-6
"""Least probability that two pairs show the same relation."""


def _options(composite: CompositeMap, path: Route | None, max_memory: int | None) -> dict[str, Any]:
    return dict(layer=composite.basis.layer, template=composite.template, path=path, max_memory=max_memory)


def _targets(model: Any, analogies: Sequence[Analogy], setting: AnalogySetting, options: dict[str, Any]) -> Queries:
    """The targets' prompts: C alone, or behind the source pair."""
    shown = shown_pairs([one.source_pair for one in analogies], setting)
    return Queries(model, [one.target_pair for one in analogies], shown, **options)


def gate_signals(
    model: Any,
    composite: CompositeMap,
    analogies: Sequence[Analogy],
    *,
    setting: AnalogySetting = "one_shot",
    sources: SourceScores | None = None,
    path: Route | None = None,
    max_memory: int | None = None,
) -> Float[Tensor, "analogy signal"]:
    """What a gate knows of each analogy; the answer D takes no part.

    With p the weights of the source pair (what is recognised in it, where a transfer map makes the weights of that), v
    its composite vector, and Y the model's most likely token after C in these prompts:

    - ``entropy`` of p, in nats;
    - ``source gain``: ``log P(B | A; v) - log P(B | A)``, a mean per token, in nats;
    - ``confidence``: ``log P(Y)`` without steering, in nats;
    - ``same relation``: ``log sum_i p_i q_i``, q being for (C, Y) what p is for (A, B): how likely both pairs show the
      same basis relation (nats, not below log 1e-6); once with the Y of the unsteered model, once with the steered Y;
    - ``likeness``: cosine of v and the composite vector of (C, Y), which is high for two relations of a family, too, if
      the map knows that; with both Y again.

    So a model checks its own answer: does it stand to C as B stands to A? [choice]

    Args:
        model: the model of the basis.
        composite: the map.
        analogies: what is asked.
        setting: the prompts that C is asked in.
        sources: :func:`source_scores` of the source pairs; counted here by default.
        path, max_memory: as for :func:`fvlens.finetune`.

    Returns:
        In the order of :data:`SIGNALS`.

    Raises:
        ValueError: no analogies; an unknown setting; another model than the basis's; sources of other analogies.
    """
    if setting not in ANALOGY_SETTINGS:
        raise ValueError(f"gate_signals: setting={setting!r}; expected one of {', '.join(ANALOGY_SETTINGS)}.")
    if not analogies:
        raise ValueError("gate_signals: expected at least one analogy, got none.")
    kept: dict[str, Any] = dict(path=path, max_memory=max_memory)
    composite.basis.check(model)
    n, pairs = len(analogies), [one.source_pair for one in analogies]
    scores = given_or_scored(
        sources, model, composite.basis, pairs, whose="gate_signals", template=composite.template, **kept
    )
    vectors = composite.mix(scores.log_probs)[1]
    asked = Queries(model, pairs, **_options(composite, **kept))
    targets = _targets(model, analogies, setting, _options(composite, **kept))
    gained, sure = torch.empty(n), torch.empty(n)
    answers = torch.empty(n, 2, dtype=torch.long)
    zero = torch.zeros(vectors.shape[1])
    with torch.no_grad(), frozen(model):
        for rows in asked.parts(torch.arange(n)):
            logs = asked.log_probs(rows, vectors[rows]).sum(dim=1).cpu()
            gained[rows] = (logs / asked.n_tokens[rows]).float() - scores.unsteered[rows]
        for rows in targets.parts(torch.arange(n)):
            plain, steered = (targets.first_logits(rows, given).float() for given in (zero, vectors[rows]))
            sure[rows] = plain.log_softmax(dim=-1).amax(dim=-1).cpu()
            answers[rows] = torch.stack([best_token(plain), best_token(steered)], dim=1).cpu()
    words = [one.c for one in analogies]
    said = answer_scores(model, composite.basis, words, answers, template=composite.template, **kept)
    shown = composite.recognised(scores.log_probs)
    same = (shown[:, None] * composite.recognised(said)).sum(dim=-1).clamp(min=LEAST).log()
    likeness = F.cosine_similarity(vectors[:, None], composite.mix(said)[1], dim=-1)
    entropy = torch.special.entr(shown).sum(dim=-1)
    return torch.cat([torch.stack([entropy, gained, sure], dim=1), same, likeness], dim=1)


def fit_gate(
    model: Any,
    composite: CompositeMap,
    analogies: Sequence[Analogy],
    *,
    kind: GateKind = "logistic",
    setting: AnalogySetting = "one_shot",
    protect: bool = True,
    sources: SourceScores | None = None,
    generator: torch.Generator,
    **options: Unpack[FittingOptions],
) -> CompositeMap:
    """Fit a gate to a composite, so that near analogies, which the model solves by itself, are not made worse.

    ``"logistic"``: a logistic regression on the signals of :func:`gate_signals` (centred and scaled by what is seen
    here, ``1e-2 |u|^2``, L-BFGS) says of the analogies that steering changes whether it helps or harms; the gate opens
    where helping is the likelier. A near analogy counts five times.
    ``"threshold"``: of all thresholds on one signal, in both directions, the one with the best top-1 on the analogies,
    and among equals the one that steers least; of those only with which as many near ones are solved as unsteered.
    ``"learned"``: ``L = mean of -log P(D | prompt; resid_l += sigmoid(u . f + k) v) + l2 * |u|^2`` over the analogies,
    through the frozen model, f being the scaled signals; then k is lowered, in steps of 0.25, until as many near ones
    are solved as unsteered. The paper has no gate [choice].

    Args:
        model: the model; its parameters and mode stay as they are.
        composite: the map.
        analogies: near and far ones, other than those that the map was trained on; a gate that has only seen what a
            map was trained on trusts it too much.
        kind: ``"logistic"``, ``"threshold"`` or ``"learned"``.
        setting: the prompts that it is for. A composite can have one gate a setting.
        protect: whether the near ones among the analogies (``kind="near"``) limit the gate as said.
        sources: :func:`source_scores` of the source pairs, where several gates share them; counted here by default.
        generator: order of the minibatches.
        options: fields of :class:`~fvlens.composition.Fitting` and of its ``execution``:
        l2, lr, epochs, batch_size: of the learned gate, by default 1e-3, 0.1, 20 and 128; Adam.
        path, max_memory: as for :func:`fvlens.finetune`.
        resume, checkpoint: of the learned gate; as for :func:`fit_composite`.
        progress: show a bar. Interrupting gives the learned gate so far, with a warning.

    Returns:
        The composite with this gate, and with the analogies among what it has seen.

    Raises:
        ValueError: no analogies; an unknown kind or setting; numbers out of range; another model than the basis's;
            sources of other analogies.
    """
    for name, value, known in (("kind", kind, GATES), ("setting", setting, ANALOGY_SETTINGS)):
        if value not in known:
            raise ValueError(f"fit_gate: {name}={value!r}; expected one of {', '.join(known)}.")
    if not analogies:
        raise ValueError("fit_gate: expected at least one analogy, got none.")
    how = fitting("fit_gate", options)
    kept, progress = how.kept, how.execution.progress
    pairs = [one.source_pair for one in analogies]
    sources = given_or_scored(
        sources, model, composite.basis, pairs, whose="fit_gate", template=composite.template, progress=progress, **kept
    )
    signals = gate_signals(model, composite, analogies, setting=setting, sources=sources, **kept)
    vectors = composite.mix(sources.log_probs)[1]
    queries = _targets(model, analogies, setting, _options(composite, **kept))
    near = torch.tensor([protect and one.kind == "near" for one in analogies])
    plain = _hits(model, queries, torch.zeros_like(vectors))
    if kind != "learned":
        find = _threshold if kind == "threshold" else _logistic
        gate = find(signals, plain, _hits(model, queries, vectors), near, setting)
    else:
        lr, l2 = (default if given is None else float(given) for given, default in ((how.lr, 0.1), (how.l2, 1e-3)))
        change = GateChange(queries, signals, vectors, setting, lr)
        targets = tuple(one.target_pair for one in analogies)
        task = Task("the gate", targets, (), generator.initial_seed(), generator)
        settings = Settings(l2=l2, epochs=max(1, how.epochs), batch_size=how.batch_size, template=composite.template)
        trained = train(
            Training([task], change, settings, whose="fit_gate"), epochs=how.epochs, what="gate", stacklevel=3,
            **how.train,
        )  # fmt: skip
        gate = trained.outcomes[0].result
        composite = dataclasses.replace(composite, complete=trained.complete, state=trained.state)
        # lower it until near analogies are not made worse
        for _ in range(LOWERINGS):
            solved = _hits(model, queries, gate.strength(signals)[:, None] * vectors)
            if int(solved[near].sum()) >= int(plain[near].sum()):
                break
            gate = dataclasses.replace(gate, offset=gate.offset - LOWERED_BY)
        else:
            gate = _always("threshold", False, setting)
    return composite.with_gate(gate, analogies)


def _hits(model: Any, queries: Queries, vectors: Float[Tensor, "analogy d_model"]) -> Bool[Tensor, " analogy"]:
    """Whether each analogy is solved with its vector."""
    parts = []
    with torch.no_grad(), frozen(model):
        for rows in queries.parts(torch.arange(len(queries))):
            parts.append(queries.right(queries.first_logits(rows, vectors[rows]), rows))
    return torch.cat(parts)


def _always(kind: GateKind, is_open: bool, setting: AnalogySetting) -> Gate:
    """A gate of 0 or 1 that does not look at its signals."""
    return Gate(kind, (0.0,) * len(SIGNALS), 1.0 if is_open else -1.0, setting)


def _logistic(
    signals: Float[Tensor, "analogy signal"], plain: Bool[Tensor, " analogy"], steered: Bool[Tensor, " analogy"],
    near: Bool[Tensor, " analogy"], setting: AnalogySetting,
) -> Gate:  # fmt: skip
    changed = plain != steered
    helps = steered[changed].double()
    if helps.unique().numel() < 2:  # steering only helps or only harms
        return _always("logistic", bool(helps.any()), setting)
    centre, spread = scale_of(signals.double())
    standard = ((signals - centre) / spread)[changed]
    weight = torch.where(near[changed], NEAR_WEIGHT, 1.0)
    slope, offset = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in (len(centre), ()))

    def loss() -> Tensor:
        found = F.binary_cross_entropy_with_logits(standard @ slope + offset, helps, weight=weight)
        return found + LOGISTIC_L2 * slope.square().sum()

    minimise(loss, [slope, offset])
    return _over_plain_signals("logistic", slope, offset, centre, spread, setting)


def _over_plain_signals(
    kind: GateKind, slope: Tensor, offset: Tensor, centre: Tensor, spread: Tensor, setting: AnalogySetting
) -> Gate:
    """A gate over signals as they are from one over scaled ones."""
    slopes, shift = folded(slope.detach(), offset.detach(), centre, spread)
    return Gate(kind, tuple(slopes.tolist()), float(shift), setting)


def _threshold(
    signals: Float[Tensor, "analogy signal"], plain: Bool[Tensor, " analogy"], steered: Bool[Tensor, " analogy"],
    near: Bool[Tensor, " analogy"], setting: AnalogySetting,
) -> Gate:  # fmt: skip
    gain = steered.double() - plain.double()
    best, chosen = (0.0, 0), _always("threshold", False, setting)
    for which in range(len(SIGNALS)):
        for sign in (1.0, -1.0):
            value, order = (sign * signals[:, which].double()).sort(descending=True)
            total = gain[order].cumsum(dim=0)
            harmless = (gain * near)[order].cumsum(dim=0) >= 0
            cuts = torch.cat([(value[:-1] + value[1:]) / 2, value[-1:] - 1])
            apart = torch.cat([value[:-1] > value[1:], torch.tensor([True])])
            for i in (apart & harmless).nonzero()[:, 0].tolist():
                key = (float(total[i]), -(i + 1))
                if key > best:
                    slopes = tuple(sign if j == which else 0.0 for j in range(len(SIGNALS)))
                    best, chosen = key, Gate("threshold", slopes, -float(cuts[i]), setting)
    return chosen


class GateChange(SteeringChange):
    """Composite vectors times ``sigmoid(u . f + k)``, f being the scaled signals; u and k are trained, from 0.

    Args:
        prompts: the targets' prompts.
        signals: what the gate reads of each analogy.
        composites: the vector of each.
        setting: the prompts that it is for.
        lr: the learning rate.
    """

    def __init__(
        self,
        prompts: Queries,
        signals: Float[Tensor, "analogy signal"],
        composites: Float[Tensor, "analogy d_model"],
        setting: AnalogySetting,
        lr: float,
    ) -> None:
        super().__init__(prompts)
        self.centre, self.spread = scale_of(signals)
        self.standard = (signals - self.centre) / self.spread
        self.composites, self.relative_lr = composites, lr
        self.setting: AnalogySetting = setting
        self.slope, self.offset = nn.Parameter(torch.zeros(len(SIGNALS))), nn.Parameter(torch.zeros(()))

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[self.slope, self.offset]]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Signals are scaled, so the learning rate is what it is."""
        return 1.0

    def vectors(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        factor = (self.standard[rows] @ self.slope + self.offset).sigmoid()
        return factor[:, None] * self.composites[rows]

    def penalty(
        self, step: Sequence[Int[Tensor, " _row"]], anchors: Sequence[Float[Tensor, " number"]] | None
    ) -> Float[Tensor, ""]:
        """Squared slopes."""
        return self.slope.square().sum()

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"layer": self.prompts.layer, "setting": self.setting, "lr": self.relative_lr}

    def result(self, place: int, task: Task, values: Float[Tensor, " number"]) -> Gate:
        """A gate over signals as they are."""
        slope, offset = filled(self.parameters()[place], values)
        return _over_plain_signals("learned", slope, offset, self.centre, self.spread, self.setting)
