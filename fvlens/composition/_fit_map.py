"""Training the map of a composite, by the one training loop."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fvlens.arguments import check_arguments
from fvlens.composition._affine import Affine, Transfer, distinct, recognition
from fvlens.composition._map import (
    MAPS,
    SCORES,
    CompositeMap,
    FitHistory,
    Map,
    ScoreKind,
    Seen,
    check_choice,
    seen_pairs,
)
from fvlens.composition._options import FittingOptions, fitting
from fvlens.composition._queries import (
    ANALOGY_SETTINGS,
    AnalogySetting,
    Queries,
    SourceScores,
    given_or_scored,
    shown_pairs,
)
from fvlens.composition._rules import RULES
from fvlens.prompts import Template, template_for, template_or
from fvlens.relations import Analogy, Pairs, as_analogies, list_relations, load_relation
from fvlens.training import Settings, SteeringChange, Task, Training, VectorSet, fill, train


def families_of(basis: VectorSet) -> list[str]:
    """The library family of every basis relation, ``""`` for one that the library does not know."""
    known = set(list_relations())
    return [load_relation(name).family if name in known else "" for name in basis.names]


def default_rank(basis: VectorSet) -> int:
    """The number of families among the basis's library relations (at least 1): what a map between domains needs."""
    return max(1, len(set(families_of(basis)) - {""}))


class MapChange(SteeringChange):
    """The vector of each analogy, a mixture of the basis by weights that a map makes of its source pair's scores.

    Args:
        prompts: the targets' prompts.
        trainee: the map.
        given: what it reads of each analogy, log-probabilities or probabilities.
        basis: the vectors that are mixed.
        lr: default learning rate.
        scores: which of the two ``given`` are.
    """

    def __init__(
        self,
        prompts: Queries,
        trainee: Affine | Transfer,
        given: Float[Tensor, "analogy relation"],
        basis: Float[Tensor, "relation d_model"],
        lr: float,
        scores: ScoreKind,
    ) -> None:
        super().__init__(prompts)
        self.trainee, self.given, self.basis = trainee, given, basis
        self.relative_lr, self.scores = lr, scores

    def parameters(self) -> list[list[nn.Parameter]]:
        return [[parameter for parameter in self.trainee.parameters() if parameter.requires_grad]]

    def scale(self, rows: Int[Tensor, " row"]) -> float:
        """Maps are of order 1: their learning rate is what it is."""
        return 1.0

    def vectors(self, rows: Int[Tensor, " row"], relation: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        return self.trainee(self.given[rows]) @ self.basis

    def penalty(
        self, step: Sequence[Int[Tensor, " _row"]], anchors: Sequence[Float[Tensor, " number"]] | None
    ) -> Float[Tensor, ""]:
        """The map's own: its distance from the start, or what a transfer map's ridge is on."""
        return self.trainee.penalty(self.given[step[0]])

    def identity(self) -> dict[str, Any]:
        trainee = self.trainee
        return super().identity() | {
            "map": trainee.map if isinstance(trainee, Affine) else "transfer",
            "rule": trainee.rule,
            "scores": self.scores,
            "shapes": [list(parameter.shape) for parameter in self.parameters()[0]],
            "layer": self.prompts.layer,
            "lr": self.relative_lr,
            "basis": hashlib.sha256(self.basis.numpy().tobytes()).hexdigest()[:16],
        }

    def result(self, place: int, task: Task, values: Float[Tensor, " number"]) -> Affine | Transfer:
        """A map with these numbers in it; training may go on with its own."""
        trainee = copy.deepcopy(self.trainee)
        fill([parameter for parameter in trainee.parameters() if parameter.requires_grad], values)
        return trainee


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
    template: Template | str | None = None,
    basis_pairs: Pairs = (),
    sources: SourceScores | None = None,
    generator: torch.Generator,
    **options: Unpack[FittingOptions],
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
        template: how queries are written; by default as the basis was made with, else ``"qa"``.
        basis_pairs: pairs that the basis was trained on; kept for the leak check.
        sources: :func:`source_scores` of the source pairs of ``analogies`` and then of ``valid``, where several maps
            share them; counted here by default.
        generator: order of the minibatches; after a resume it goes on from where the state left it.
        options: fields of :class:`~fvlens.composition.Fitting` and of its ``execution``:
        l2: weight of the squared distance from the start, by default 1e-4; of the ridge on R, by default 3e-3.
        lr: learning rate of Adam; by default 0.02, for ``"diagonal"`` 0.05.
        epochs, batch_size: passes over the analogies, 20 by default, and analogies in a step, 128.
        path, max_memory: as for :func:`fvlens.finetune`.
        resume: a state, or a file of one, to go on from; everything else must be as it was.
        checkpoint: write the state to this file after every epoch.
        progress: show a bar. Interrupting gives the best map so far, with a warning.

    Returns:
        :class:`CompositeMap`. A training whose loss is no longer a finite number stops with a warning; its best epoch
        before that stands.

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
    check_arguments(fit_composite, locals(), trains=True)
    for name, value, known in (("map", map, MAPS), ("scores", scores, SCORES), ("rule", rule, tuple(RULES)),
                               ("setting", setting, ANALOGY_SETTINGS)):  # fmt: skip
        check_choice(name, value, known)
    how = fitting("fit_composite", options)
    analogies = as_analogies(analogies, "fit_composite: analogies")
    valid = as_analogies(valid, "fit_composite: valid")
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
    template = template_for(model, template_or(template, basis.template))
    asked: dict[str, Any] = dict(template=template, **how.kept)
    pairs = [one.source_pair for one in every]
    sources = given_or_scored(
        sources, model, basis, pairs, whose="fit_composite", progress=how.execution.progress, **asked
    )
    given = sources.log_probs
    if scores == "probability":
        given = given.exp()
    shown = shown_pairs(pairs, setting)
    targets = [one.target_pair for one in every]
    queries = Queries(model, targets, shown, layer=basis.layer, **asked)
    # what is trained, from the start that its map prescribes
    if map == "transfer":
        rows = distinct(given[:n_train], labels)
        named = recognition(given[:n_train][rows], labels[rows])
        trainee = Transfer(*named, rule, basis.matrix, families_of(basis))
    else:
        trainee = Affine(map, given[:n_train], rule, rank, learn_strength)
    l2 = (3e-3 if map == "transfer" else 1e-4) if how.l2 is None else how.l2
    lr = (0.05 if map == "diagonal" else 0.02) if how.lr is None else float(how.lr)
    change = MapChange(queries, trainee, given, basis.matrix, lr, scores)
    parts = tuple(targets[:n_train]), tuple(targets[n_train:])
    task = Task("the composite map", *parts, generator.initial_seed(), generator)
    settings = Settings(
        l2=0.0 if map == "none" else float(l2), epochs=max(1, how.epochs), batch_size=how.batch_size, template=template
    )
    # where nothing is trained, the start is scored all the same
    trained = train(
        Training([task], change, settings, whose="fit_composite"), epochs=how.epochs if change.parameters()[0] else 0,
        what="composite map", stacklevel=3, **how.train,
    )  # fmt: skip
    # from the best epoch's numbers to plain matrices
    (outcome,) = trained.outcomes
    trainee = outcome.result
    matrix, shift = trainee.folded()
    curves = (outcome.history.train_loss, outcome.history.valid_loss, outcome.history.valid_top1)
    known = seen_pairs(basis_pairs, "fit_composite: basis_pairs")
    seen = Seen(frozenset(basis.names), frozenset((x, y) for x, y in known)).with_analogies(every)
    return CompositeMap(
        basis=basis, map=map, matrix=matrix, shift=shift, strength=trainee.strength(),
        scores=scores, rule=rule, setting=setting, template=template, seen=seen,
        history=FitHistory(*(tuple(curve.tolist()) for curve in curves)),
        transfer=trainee.transfer().detach() if isinstance(trainee, Transfer) else None,
        complete=trained.complete, state=trained.state,
    )  # fmt: skip
