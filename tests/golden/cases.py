"""The table of cases: options, and the function behind every group."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints import ARCHITECTURES

from golden import by_architecture, chain, commands, composites
from golden.values import Values


@dataclass(frozen=True, slots=True)
class Case:
    """One file of numbers.

    Attributes:
        options: how the numbers are made.
        groups: group -> the function that makes its numbers.
    """

    options: Mapping[str, Any]
    groups: Mapping[str, Callable[[], Values]]


SCORED = ("none", "transfer", "one-shot")
"""Composites that the analogies are solved with."""


def _architecture(name: str) -> Case:
    parts = {
        "effects": by_architecture.effects_found,
        "scores": by_architecture.scored,
        "training": by_architecture.trained,
    }
    groups = {
        f"{backend}-{part}": functools.partial(function, name, backend)
        for backend in ("hooked", "bridge")
        for part, function in parts.items()
    }
    return Case(by_architecture.OPTIONS, groups)


CASES: dict[str, Case] = {
    "run": Case(
        commands.RUN,
        {
            "split": commands.run_split,
            "aie": commands.run_aie,
            "heads": commands.run_heads,
            "sweep": commands.run_sweep,
            "choice": commands.run_choice,
            "vector": commands.run_vector,
            "answers": commands.run_answers,
            "steered": commands.run_steered,
            "controls": commands.run_controls,
            "tuned": commands.run_tuned,
            "summary": commands.run_summary,
            "intervals": commands.run_intervals,
        },
    ),
    "heads": Case(
        commands.HEADS | commands.SCREENS,
        {
            f"{method}-{labels}": functools.partial(commands.ranked_heads, method, labels)
            for method in ("exact", "atp", "ig", "lrp")
            for labels in ("permuted", "random")
        },
    ),
    "compare": Case(
        commands.COMPARE,
        {"choice": commands.compared_choice}
        | {name: functools.partial(commands.compared_row, place) for place, name in enumerate(commands.METHODS)},
    ),
    "universal": Case(commands.UNIVERSAL, {"aie": commands.universal_effects, "heads": commands.universal_chosen}),
    "compose": Case(
        composites.COMPOSE | {"sources": composites.SOURCES, "composites": composites.COMPOSITES},
        {
            "basis": functools.partial(composites.basis, "none"),
            "basis from vectors": functools.partial(composites.basis, "vectors"),
        }
        | {name: functools.partial(composites.composed, name) for name in composites.COMPOSITES if name != "vectors"},
    ),
    "analogies": Case(
        composites.ANALOGIES | {"composites": {name: composites.COMPOSITES[name] for name in SCORED}},
        {"drawn": composites.analogies_drawn, "answers": composites.analogies_answered}
        | {name: functools.partial(composites.analogies_scored, name) for name in SCORED},
    ),
    "chain": Case(
        chain.CHAIN,
        {
            "prompts": chain.chain_drawn,
            "means": chain.chain_averaged,
            "cie": chain.chain_cie,
            "scores": chain.chain_scored,
            "sweeps": chain.chain_swept,
            "controls": chain.chain_controlled,
            "answers": chain.chain_written,
            "ablation": chain.chain_ablated,
            "training": chain.chain_trained,
        },
    ),
    **{f"effects-{name}": _architecture(name) for name in ARCHITECTURES},
}
"""Every case by its name."""


def is_hooked(case: str, group: str) -> bool:
    """Whether a group's numbers are those of a HookedTransformer."""
    return not case.startswith("effects-") or group.startswith("hooked-")
