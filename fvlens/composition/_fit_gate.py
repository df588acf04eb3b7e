"""Fitting a gate, and the signals that it reads."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from fvlens.composition._gate import GATES, SIGNALS, Gate, GateKind
from fvlens.composition._map import CompositeMap
from fvlens.composition._queries import SETTINGS, Queries, Setting, SourceScores, shown_pairs, source_scores
from fvlens.finetuning import frozen
from fvlens.relations import Analogy
from fvlens.suffix import Path

LOWERED_BY, LOWERINGS = 0.25, 200
"""Steps of a learned gate's offset, and at most how many, until near analogies are not made worse."""


def signals_from(
    model: Any,
    composite: CompositeMap,
    analogies: Sequence[Analogy],
    scores: SourceScores,
    *,
    setting: Setting,
    path: Path | None,
    max_memory: int | None,
) -> Float[Tensor, "analogy signal"]:
    """:func:`gate_signals` from source scores that are there already."""
    n = len(analogies)
    vectors = composite.mix(scores.log_probs)[1]
    options = _options(composite, path, max_memory)
    sources = Queries(model, [one.source_pair for one in analogies], **options)
    targets = _targets(model, analogies, setting, options)
    steered, sure = torch.empty(n), torch.empty(n)
    zero = torch.zeros(vectors.shape[1])
    with torch.no_grad(), frozen(model):
        for rows in torch.arange(n).split(sources.rows_at_once):
            logs = sources.log_probs(rows, vectors[rows]).sum(dim=1).cpu()
            steered[rows] = (logs / sources.n_tokens[rows]).float()
        for rows in torch.arange(n).split(targets.rows_at_once):
            first = targets.logits(rows, zero)[:, 0].float()
            sure[rows] = first.log_softmax(dim=-1).amax(dim=-1).cpu()
    entropy = torch.special.entr(composite.recognised(scores.log_probs)).sum(dim=-1)
    return torch.stack([entropy, steered - scores.unsteered, sure], dim=1)


def _options(composite: CompositeMap, path: Path | None, max_memory: int | None) -> dict[str, Any]:
    return dict(layer=composite.basis.layer, template=composite.template, path=path, max_memory=max_memory)


def _targets(model: Any, analogies: Sequence[Analogy], setting: Setting, options: dict[str, Any]) -> Queries:
    """The targets' prompts: C alone, or behind the source pair."""
    shown = shown_pairs([one.source_pair for one in analogies], setting)
    return Queries(model, [one.target_pair for one in analogies], shown, **options)


def gate_signals(
    model: Any,
    composite: CompositeMap,
    analogies: Sequence[Analogy],
    *,
    setting: Setting = "one_shot",
    path: Path | None = None,
    max_memory: int | None = None,
) -> Float[Tensor, "analogy signal"]:
    """What a gate knows of each analogy; the answer D takes no part.

    Args:
        model: the model of the basis.
        composite: the map.
        analogies: what is asked.
        setting: the prompts of the third signal.
        path, max_memory: as for :func:`fvlens.finetune`.

    Returns:
        In the order of :data:`SIGNALS`: entropy of the weights (nats; of what is
        recognised, where a transfer map makes the weights of that); ``log P(B | A; composite) - log P(B | A)``, a
        mean per token (nats); log-probability of the most likely token after C without steering (nats).

    Raises:
        ValueError: no analogies; an unknown setting; another model than the basis's.
    """
    if setting not in SETTINGS:
        raise ValueError(f"gate_signals: setting={setting!r}; expected one of {', '.join(SETTINGS)}.")
    if not analogies:
        raise ValueError("gate_signals: expected at least one analogy, got none.")
    kept: dict[str, Any] = dict(path=path, max_memory=max_memory)
    pairs = [one.source_pair for one in analogies]
    scores = source_scores(model, composite.basis, pairs, template=composite.template, **kept)
    return signals_from(model, composite, analogies, scores, setting=setting, **kept)


def fit_gate(
    model: Any,
    composite: CompositeMap,
    analogies: Sequence[Analogy],
    *,
    kind: GateKind = "learned",
    setting: Setting = "one_shot",
    protect: bool = True,
    l2: float = 1e-3,
    lr: float = 0.1,
    epochs: int = 20,
    batch_size: int = 128,
    path: Path | None = None,
    max_memory: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> CompositeMap:
    """Fit a gate to a composite, so that near analogies, which the model solves by itself, are not made worse.

    ``"learned"``: ``L = mean of -log P(D | prompt; resid_l += sigmoid(u . f + k) v) + l2 * |u|^2`` over the analogies,
    through the frozen model; f are the signals of :func:`gate_signals`, centred and scaled by what is seen here.
    ``"threshold"``: of all thresholds on one signal, in both directions, the one with the best top-1 on the analogies,
    and among equals the one that steers least. The paper has no gate [choice].

    Either gate may not cost near analogies anything: of the thresholds only those count with which as many near ones
    are solved as without steering; a learned gate's offset is lowered, in steps of 0.25, until that holds.

    Args:
        model: the model; its parameters and mode stay as they are.
        composite: the map.
        analogies: near and far ones, other than those that the map was trained on; a gate that has only seen what a
            map was trained on trusts it too much.
        kind: ``"learned"`` or ``"threshold"``.
        setting: the prompts that it is for. A composite can have one gate a setting.
        protect: whether the near ones among the analogies (``kind="near"``) limit the gate as said.
        l2, lr, epochs, batch_size: of the learned gate; Adam.
        path, max_memory: as for :func:`fvlens.finetune`.
        generator: order of the minibatches.
        progress: show a bar.

    Returns:
        The composite with this gate, and with the analogies among what it has seen.

    Raises:
        ValueError: no analogies; an unknown kind or setting; numbers out of range; another model than the basis's.
    """
    for name, value, known in (("kind", kind, GATES), ("setting", setting, SETTINGS)):
        if value not in known:
            raise ValueError(f"fit_gate: {name}={value!r}; expected one of {', '.join(known)}.")
    if not analogies:
        raise ValueError("fit_gate: expected at least one analogy, got none.")
    for name, number, least in (("epochs", epochs, 0), ("batch_size", batch_size, 1), ("l2", l2, 0), ("lr", lr, 0)):
        if not (math.isfinite(number) and number >= least):
            raise ValueError(f"fit_gate: expected {name} of at least {least}, got {number}.")
    kept: dict[str, Any] = dict(path=path, max_memory=max_memory)
    pairs = [one.source_pair for one in analogies]
    scores = source_scores(model, composite.basis, pairs, template=composite.template, progress=progress, **kept)
    signals = signals_from(model, composite, analogies, scores, setting=setting, **kept)
    vectors = composite.mix(scores.log_probs)[1]
    queries = _targets(model, analogies, setting, _options(composite, **kept))
    near = torch.tensor([protect and one.kind == "near" for one in analogies])
    plain = _hits(model, queries, torch.zeros_like(vectors))
    if kind == "threshold":
        gate = _threshold(signals, plain, _hits(model, queries, vectors), near, setting)
    else:
        with frozen(model), torch.enable_grad():
            gate = _learned(queries, signals, vectors, setting, l2, lr, epochs, batch_size, generator, progress)
        for _ in range(LOWERINGS):
            solved = _hits(model, queries, gate.strength(signals)[:, None] * vectors)
            if int(solved[near].sum()) >= int(plain[near].sum()):
                break
            gate = dataclasses.replace(gate, offset=gate.offset - LOWERED_BY)
        else:
            gate = dataclasses.replace(gate, kind="threshold", slopes=(0.0,) * len(SIGNALS), offset=-1.0)  # never open
    return composite.with_gate(gate, analogies)


def _hits(model: Any, queries: Queries, vectors: Float[Tensor, "analogy d_model"]) -> Bool[Tensor, " analogy"]:
    """Whether each analogy is solved with its vector."""
    parts = []
    with torch.no_grad(), frozen(model):
        for rows in torch.arange(len(queries)).split(queries.rows_at_once):
            best = queries.logits(rows, vectors[rows])[:, 0].argmax(dim=-1)
            parts.append((best == queries.targets[rows.to(best.device), 0]).cpu())
    return torch.cat(parts)


def _threshold(
    signals: Float[Tensor, "analogy signal"], plain: Bool[Tensor, " analogy"], steered: Bool[Tensor, " analogy"],
    near: Bool[Tensor, " analogy"], setting: Setting,
) -> Gate:  # fmt: skip
    gain = steered.double() - plain.double()
    best, chosen = (0.0, 0), Gate("threshold", (0.0,) * len(SIGNALS), -1.0, setting)  # never open
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


def _learned(
    queries: Queries, signals: Tensor, vectors: Tensor, setting: Setting, l2: float, lr: float, epochs: int,
    batch_size: int, generator: torch.Generator, progress: bool,
) -> Gate:  # fmt: skip
    centre, spread = signals.mean(dim=0), signals.std(dim=0, correction=0).clamp(min=1e-3)
    standard = (signals - centre) / spread
    slope = torch.zeros(len(SIGNALS), requires_grad=True)
    offset = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.Adam([slope, offset], lr=lr)
    for epoch in tqdm(range(epochs), disable=not progress, desc="gate"):
        for group in optimiser.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for rows in torch.randperm(len(queries), generator=generator).split(batch_size):
            optimiser.zero_grad(set_to_none=True)
            for part in rows.split(queries.rows_at_once):
                factor = (standard[part] @ slope + offset).sigmoid()
                (-queries.log_probs(part, factor[:, None] * vectors[part]).sum() / len(rows)).backward()
            if l2:
                (l2 * slope.square().sum()).backward()
            optimiser.step()
    plain = slope.detach() / spread
    return Gate("learned", tuple(plain.tolist()), float(offset.detach() - plain @ centre), setting)
