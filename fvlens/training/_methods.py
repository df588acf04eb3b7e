"""The methods that a comparison makes and scores: one table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fvlens.find import finished
from fvlens.relations import Split
from fvlens.training._adapted import Adapted, Baseline
from fvlens.training._finetune import finetune
from fvlens.training._lora import lora
from fvlens.training._options import Execution
from fvlens.training._settings import Settings
from fvlens.training._soft_prompt import soft_prompt
from fvlens.training._untrained import act_add, few_shot
from fvlens.vectors import FunctionVector


@dataclass(frozen=True, slots=True)
class Budget:
    """What every method is given.

    Attributes:
        model: the model.
        relation: name of the relation.
        split: its pairs; methods are made on the train part and choose on the valid part.
        start: the untuned function vector as a method.
        vector: the vector itself, with its best scale in it.
        layer: the layer that was asked for, None if it was chosen.
        n_shots: demonstrations in a prompt.
        n_soft: numbers of soft tokens.
        ranks: of low-rank updates.
        settings, running: of all that is trained.
        seed: of everything drawn.
    """

    model: Any
    relation: str
    split: Split
    start: Baseline
    vector: FunctionVector
    layer: int | None
    n_shots: int
    n_soft: tuple[int, ...]
    ranks: tuple[int, ...]
    settings: Settings
    running: Execution
    seed: int

    def fresh(self) -> torch.Generator:
        """A generator of the seed: every method draws the same."""
        return torch.Generator().manual_seed(self.seed)

    def how(self) -> dict[str, Any]:
        """Keywords of what is trained."""
        return {
            "valid": self.split.valid, "relation": self.relation, "settings": self.settings,
            "max_memory": self.running.max_memory, "progress": self.running.progress, "generator": self.fresh(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """A row of the comparison, before it is made.

    Attributes:
        make: gives the method, or None for the model as it is; raises ``KeyboardInterrupt`` if it is interrupted.
        name: of the row; by default the method's own.
        seconds_before: time that making what it starts from took.
    """

    make: Callable[[], Adapted | None]
    name: str = ""
    seconds_before: float = 0.0


def _bare_query(budget: Budget) -> list[Planned]:
    return [Planned(lambda: None, "bare query")]


def _prompting(budget: Budget) -> list[Planned]:
    how: dict[str, Any] = dict(n_shots=budget.n_shots, relation=budget.relation, generator=budget.fresh())
    return [Planned(lambda: few_shot(budget.split.train, **how))]


def _untuned(budget: Budget) -> list[Planned]:
    return [Planned(lambda: budget.start)]


def _addition(budget: Budget) -> list[Planned]:
    how: dict[str, Any] = dict(
        layer=budget.layer, valid=budget.split.valid, n_shots=budget.n_shots, template=budget.settings.template,
        relation=budget.relation, generator=budget.fresh(),
    )  # fmt: skip
    return [Planned(lambda: act_add(budget.model, budget.split.train, **how))]


def _tuned(budget: Budget) -> list[Planned]:
    def tuned(init: Any) -> Adapted:
        pairs, layer = budget.split.train, budget.vector.layer
        running = budget.running
        how: dict[str, Any] = dict(layer=layer, path=running.path, compute=running.compute, **budget.how())
        return finished(finetune(budget.model, pairs, init=init, **how))

    return [
        Planned(lambda: tuned(budget.vector), "fine-tuned from vector", budget.start.seconds),
        Planned(lambda: tuned("zero"), "fine-tuned from zero"),
    ]


def _soft(budget: Budget) -> list[Planned]:
    def soft(n_tokens: int) -> Adapted:
        return finished(soft_prompt(budget.model, budget.split.train, n_tokens=n_tokens, **budget.how()))

    return [Planned(lambda n_tokens=n_tokens: soft(n_tokens)) for n_tokens in budget.n_soft]


def _low_rank(budget: Budget) -> list[Planned]:
    def updated(rank: int) -> Adapted:
        return finished(lora(budget.model, budget.split.train, rank=rank, **budget.how()))

    return [Planned(lambda rank=rank: updated(rank)) for rank in budget.ranks]


METHODS: list[Callable[[Budget], list[Planned]]] = [
    _bare_query,
    _prompting,
    _untuned,
    _addition,
    _tuned,
    _soft,
    _low_rank,
]
"""The rows of a comparison, in order: each gives one row, or several."""
