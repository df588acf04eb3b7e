"""One analogy answered, with the reasons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fvlens.composition._fit_gate import gate_signals
from fvlens.composition._map import CompositeMap, Explanation
from fvlens.composition._queries import ANALOGY_SETTINGS, AnalogySetting, Queries, shown_pairs, source_scores
from fvlens.metrics import best_tokens
from fvlens.relations import Analogy, Pair, words_of
from fvlens.showing import Shown
from fvlens.training import frozen


@dataclass(frozen=True, slots=True, repr=False)
class Answered(Shown):
    """Answers to a : b :: c : ? in several ways, the likeliest first.

    Attributes:
        answers: way, such as ``"composite, one-shot"`` -> words with their probability; among choices, the share of
            the choices' summed likelihood, each a mean per token.
        explanation: weight of every basis relation.
        gates: how much of the composite is injected, by setting; only where the composite has a gate.
    """

    answers: dict[str, list[tuple[str, float]]]
    explanation: Explanation
    gates: dict[AnalogySetting, float]

    def _line(self) -> str:
        shown = ", ".join(f"{way}: {words[0][0]} {words[0][1]:.3f}" for way, words in self.answers.items() if words)
        return shown

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(way, ", ".join(f"{word} {p:.3f}" for word, p in words[:5])) for way, words in self.answers.items()]
        return [("way", "answers"), *rows]

    @property
    def answer(self) -> str:
        """The first word of the composite in the one-shot prompt, through its gate if it has one."""
        gated = "gated composite, one-shot"
        return self.answers[gated if gated in self.answers else "composite, one-shot"][0][0]


def answer_analogy(
    model: Any, composite: CompositeMap, a: str, b: str, c: str, *, choices: Sequence[str] | None = None, n: int = 20
) -> Answered:
    """Answer a : b :: c : ? without steering and with the composite, in the bare query and the one-shot prompt.

    Args:
        model: the model of the composite.
        composite: the map.
        a, b, c: the words.
        choices: answers to choose among; any token otherwise.
        n: answers kept, where there are no choices.

    Raises:
        ValueError: a blank word; fewer than two choices; another model than the composite's.

    Example:
        >>> import torch, fvlens
        >>> from fvlens.composition import answer_analogy, library_composite
        >>> model = fvlens.load_model("rel-small", device="cpu")
        >>> names, g = ["animal-young", "animal-home"], torch.Generator().manual_seed(0)
        >>> composite = library_composite(model, names=names, epochs=5, generator=g, progress=False)
        >>> answer_analogy(model, composite, "cow", "calf", "bear", choices=["den", "cub"]).answer
        'cub'
    """
    choices = None if choices is None else words_of(choices, "answer_analogy: choices")
    if choices is not None and len(set(choices)) < 2:
        raise ValueError(f"answer_analogy: expected at least two different choices, got {list(choices)}.")
    composite.basis.check(model)
    asked = Analogy(a, b, c, d=b)  # the answer that an analogy must have takes no part
    source = asked.source_pair
    scores = source_scores(model, composite.basis, [source], template=composite.template)
    vector = composite.mix(scores.log_probs)[1][0]
    words = [c] if choices is None else list(choices)
    answers: dict[str, list[tuple[str, float]]] = {}
    gates: dict[AnalogySetting, float] = {}
    for setting in ANALOGY_SETTINGS:
        shown = shown_pairs([source] * len(words), setting)
        pairs = [Pair(c, word) for word in words]
        queries = Queries(model, pairs, shown, layer=composite.basis.layer, template=composite.template)
        ways = {"unsteered": torch.zeros_like(vector), "composite": vector}
        gate = composite.gate(setting)
        if gate is not None:
            signals = gate_signals(model, composite, [asked], setting=setting, sources=scores)
            strength = gate.strength(signals)[0]
            gates[setting] = float(strength)
            ways["gated composite"] = strength * vector
        for name, given in ways.items():
            with torch.no_grad(), frozen(model):
                found = _likeliest(model, queries, given, choices, n)
            answers[f"{name}, {setting.replace('_', '-')}"] = found
    return Answered(answers, composite.explanation(scores.log_probs[0], [source]), gates)


def _likeliest(
    model: Any, queries: Queries, vector: Tensor, choices: Sequence[str] | None, n: int
) -> list[tuple[str, float]]:
    if choices is None:
        logits = queries.first_logits(torch.tensor([0]), vector)[0].float()
        best = best_tokens(logits, min(n, len(logits)))
        words = [model.tokenizer.decode([token]).strip() for token in best.tolist()]
        return list(zip(words, logits.softmax(dim=-1)[best].tolist(), strict=True))
    rows = torch.arange(len(queries))
    logs = queries.log_probs(rows, vector).sum(dim=1).cpu() / queries.n_tokens
    chances = logs.float().softmax(dim=0)
    order = chances.argsort(descending=True, stable=True).tolist()
    listed = list(choices)
    return [(listed[i], float(chances[i])) for i in order]
