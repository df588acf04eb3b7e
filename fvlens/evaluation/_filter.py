"""Pairs that the model answers anyway."""

import warnings
from typing import Any

import torch

from fvlens.arguments import check_arguments
from fvlens.prompts import Template, build_prompts
from fvlens.relations import Pair, Pairs, as_pairs
from fvlens.scoring import score


def filter_correct(
    model: Any,
    pairs: Pairs,
    *,
    demonstrations: Pairs | None = None,
    n_shots: int = 10,
    template: str | Template = "qa",
    batch_size: int | None = None,
    generator: torch.Generator,
) -> tuple[Pair, ...]:
    """The filter set: pairs whose query the model answers correctly (top-1) with clean demonstrations.

    Args:
        model: the model to ask.
        pairs: the pairs to filter.
        demonstrations: pairs that the demonstrations are drawn from; ``pairs`` if not given.
        n_shots, template: shape of the prompts.
        batch_size: prompts run together; by default from the memory plan, and halved where it runs out.
        generator: source of randomness for the demonstrations.

    Returns:
        The pairs answered correctly, in order; may be empty (a warning says so).

    Raises:
        ValueError: ``batch_size`` is below 1; whatever :func:`build_prompts` refuses.
        MemoryError: out of memory with a single prompt.

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3 (queries answered correctly in the 10-shot setting).
    """
    check_arguments(filter_correct, locals(), runs=True)
    wanted = as_pairs(pairs, what="filter_correct: pairs")
    shown = wanted if demonstrations is None else as_pairs(demonstrations, what="filter_correct: demonstrations")
    prompts = build_prompts(
        model,
        shown,
        queries=wanted,
        n_shots=n_shots,
        template=template,
        generator=generator,
    )
    scores = score(model, prompts, [None], batch_size=batch_size, what="filter_correct")
    kept = tuple(pair for pair, place in zip(wanted, scores.ranks[0].tolist(), strict=True) if place == 0)
    if not kept:
        warnings.warn("filter_correct: the model answers none of the queries correctly.", stacklevel=2)
    return kept
