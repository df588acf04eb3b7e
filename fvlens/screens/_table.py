"""The table of screens, and what each is asked and gives."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from fvlens.screens._batch import Screening
from fvlens.screens._patching import attribution_patching, integrated_gradients
from fvlens.screens._relevance import relevance


@dataclass(frozen=True, slots=True)
class Request:
    """What a screen is asked, beside the prompts.

    Attributes:
        n_steps: points of a path, for those that go along one.
        at_once: copies of each prompt that may go through together.
        keys: the demonstrations' label tokens, for those that look at them.
    """

    n_steps: int
    at_once: int
    keys: Bool[Tensor, "prompt pos"] | None


Scored = tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"], str]
"""Scores, the answer's probability, and what must be said about them (empty if nothing)."""


@dataclass(frozen=True, slots=True)
class Screen:
    """One way to score all heads by gradients.

    Attributes:
        title: name of its mean over prompts.
        short: the same beside a colour scale.
        score: scores the prompts of some rows.
        by_steps: whether it takes ``n_steps``, all of which may go through together.
        by_labels: whether it looks at the demonstrations' label tokens from the last token, in logits of the answer's
            first token.
        unit: of its scores.
    """

    title: str
    short: str
    score: Callable[[Screening, slice, Request], Scored]
    by_steps: bool = False
    by_labels: bool = False
    unit: str = "probability"


def _attribution_patching(screening: Screening, rows: slice, request: Request) -> Scored:
    return *attribution_patching(screening, rows), ""


def _integrated_gradients(screening: Screening, rows: slice, request: Request) -> Scored:
    return *integrated_gradients(screening, rows, n_steps=request.n_steps, at_once=request.at_once), ""


def _relevance(screening: Screening, rows: slice, request: Request) -> Scored:
    assert request.keys is not None
    scores, baseline, missing = relevance(screening, rows, request.keys)
    note = "AttnLRP rules for norms, activation functions, gates and attention products"
    return scores, baseline, note + (f"; plain gradient instead: {missing}" if missing else "")


SCREENS: dict[str, Screen] = {
    "atp": Screen("Attribution patching", "AtP", _attribution_patching),
    "ig": Screen("Integrated gradients", "IG", _integrated_gradients, by_steps=True),
    "lrp": Screen("Attention relevance (LRP, in logits)", "LRP relevance", _relevance, by_labels=True, unit="logits"),
}
"""The screens, by the name that ``method=`` gives them."""
