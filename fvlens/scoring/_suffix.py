"""All changes of all prompts of a slice together, through the exact engine."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fvlens.prompts import Prompts, with_answers
from fvlens.scoring._scores import Part
from fvlens.suffix import Route, Slices, Variant, halving, plan_slices, rows_of, run_prefix


def by_answer_length(prompts: Prompts) -> dict[int, Int[Tensor, " prompt"]]:
    """Number of answer tokens -> the prompts whose answers have so many."""
    lengths = prompts.answer_mask.sum(dim=1)
    return {n: (lengths == n).nonzero().flatten() for n in sorted(set(lengths.tolist()))}


def by_suffix(
    model: Any,
    prompts: Prompts,
    variants: Sequence[Variant],
    path: Route,
    batch_size: int | None,
    max_memory: int | None,
    compute: torch.dtype | None,
    what: str,
) -> Iterator[Part]:
    """All changes of a slice of prompts together, slice after slice."""
    n_layers = model.cfg.n_layers
    starts = [edit.layer + (edit.site == "resid_post") for variant in variants for edit in variant]
    kept: dict[str, Any] = dict(
        from_layer=min(starts, default=n_layers), keep_z=any(edit.site == "z" for own in variants for edit in own)
    )
    warn = True
    for n_answer, index in by_answer_length(prompts).items():
        group = prompts if len(index) == len(prompts) else prompts.select(index.tolist())
        asked = _Group.of(group, n_answer, [rows_of([variant], index)[0] for variant in variants])
        planned: dict[str, Any] = kept if path == "weights" else {}
        plan = plan_slices(
            model, n_pos=asked.tokens.shape[1], n_suffix=n_answer, n_variants=len(variants), path=path,
            max_memory=max_memory, compute=compute, n_prompts=len(index), warn=warn and batch_size is None, **planned,
        )  # fmt: skip
        warn = False  # once is enough
        plan = dataclasses.replace(plan, prompts=min(plan.prompts, batch_size or plan.prompts))
        options = dict(path=path, copied=plan.copied, compute=compute, **kept)
        work = functools.partial(asked.outcomes, model, plan, options)
        for rows, part in halving(work, plan.over_prompts(len(group)), variants=plan.variants, what=what):
            yield Part(plan.weights if path == "weights" else None, index[rows], *part)


@dataclass(frozen=True, slots=True)
class _Group:
    """Prompts whose answers have the same length, without needless padding, and the changes of them."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Int[Tensor, "prompt pos"]
    targets: Int[Tensor, "prompt answer_pos"]
    variants: Sequence[Variant]

    @classmethod
    def of(cls, prompts: Prompts, n_answer: int, variants: Sequence[Variant]) -> "_Group":
        tokens, mask, _ = with_answers(prompts, n_answer)
        width = int(mask.sum(dim=1).max())
        return cls(tokens[:, -width:], mask[:, -width:], prompts.answer_tokens[:, :n_answer], variants)

    def outcomes(
        self, model: Any, plan: Slices, options: Mapping[str, Any], rows: slice, at_once: int
    ) -> tuple[slice, list[Tensor]]:
        """Of some prompts, under every change: ranks, first and rest, best token, exact, ``[change prompt]`` each."""
        n_answer = self.targets.shape[1]
        prefix = run_prefix(model, self.tokens[rows], self.mask[rows], n_suffix=n_answer, **options)
        variants = rows_of(self.variants, rows)
        parts = []
        for some in dataclasses.replace(plan, variants=at_once).over_variants(len(variants)):
            resid = prefix.under(variants[some])
            ranks, first, best = prefix.outcomes(resid[:, :, 0], self.targets[rows, 0], at_once=plan.logits)
            rest, exact = torch.zeros_like(first), ranks == 0
            for place in range(1, n_answer):
                later, logs, _ = prefix.outcomes(resid[:, :, place], self.targets[rows, place], at_once=plan.logits)
                rest, exact = rest + logs, exact & (later == 0)
            parts.append((ranks.T, first.T, rest.T, best.T, exact.T))
        return rows, [torch.cat(kind) for kind in zip(*parts, strict=True)]
