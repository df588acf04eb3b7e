"""Prompts that a training asks again and again, ready on the model's device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fvlens.interventions import hooked, resid_hook, z_hook
from fvlens.models import model_device
from fvlens.prompts import PAD_ANSWER, Prompts, Template, build_prompts, with_answers
from fvlens.suffix import (
    Added,
    Route,
    SteeredPrompts,
    Weights,
    check_compute,
    choose_route,
    open_reader,
    plan_slices,
    portions,
    power_above,
)
from fvlens.training._settings import Task
from fvlens.training._trainable import frozen

Edit = Callable[[Tensor], Tensor | None]
"""The activation at a hook -> a new one, or None to leave it."""

_MOST_ROWS = 256
"""What a batch costs at most, in answer tokens of kept prompts or in whole prompts: more is no faster."""


def prompts_of(model: Any, tasks: Sequence[Task], template: Template | str) -> Prompts:
    """The bare queries of all pairs of all relations: of each its training pairs, then its validation pairs."""
    pairs = [pair for task in tasks for pair in (*task.train, *task.valid)]
    return build_prompts(model, (), queries=pairs, n_shots=0, template=template, generator=torch.Generator())


class PreparedPrompts:
    """Prompts with their answers on the model's device, and how many of them go through together.

    Args:
        model: the model.
        prompts: the prompts, with their answers.
        max_memory: bytes for activations; by default as by :func:`fvlens.suffix.plan_slices`.
        n_more: tokens that a change adds to each prompt.

    Attributes:
        tokens, mask: prompts and all of their answers but the last tokens, left-padded.
        targets: the answers' tokens, -1 behind their end.
        n_suffix: positions at which the answer is read; the first of them is the prompt's last token.
        costs: what each prompt counts in a batch.
        most_at_once: what the prompts of a batch count together at most.
        path: how they are run.
        weights: on the path ``"weights"``, how those are held; None on others.
    """

    path: Route = "naive"
    weights: Weights | None = None

    def __init__(self, model: Any, prompts: Prompts, max_memory: int | None = None, *, n_more: int = 0) -> None:
        self.model, self.prompts = model, prompts
        tokens, mask, _ = with_answers(prompts)
        device = model_device(model)
        self.tokens, self.mask = tokens.to(device), mask.to(device)
        self.targets = prompts.answer_tokens.to(device)
        self.n_suffix = self.targets.shape[1]
        self.costs, self.most_at_once = self._batching(max_memory, n_more)

    @classmethod
    def of(cls, model: Any, tasks: Sequence[Task], template: Template | str = "qa", **options: Any) -> Any:
        """Those of :func:`prompts_of`."""
        return cls(model, prompts_of(model, tasks, template), **options)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.tokens)

    @property
    def last(self) -> int:
        """Position of the prompts' last token, counted from the end."""
        return -self.n_suffix

    def portions(self, rows: Int[Tensor, " row"]) -> list[slice]:
        """Slices of ``rows`` that go through together."""
        return portions(self.costs[rows.cpu()].tolist(), self.most_at_once)

    def _batching(self, max_memory: int | None, n_more: int) -> tuple[Int[Tensor, " prompt"], int]:
        """Costs of the prompts, and their sum in a batch at most: each counts once where they go through whole."""
        n_pos = self.tokens.shape[1] + n_more
        plan = plan_slices(
            self.model, n_pos=n_pos, n_suffix=n_pos, n_variants=1, path="naive", max_memory=max_memory, gradients=True,
            n_prompts=power_above(len(self.tokens)),
        )  # fmt: skip
        return torch.ones(len(self.tokens), dtype=torch.long), min(_MOST_ROWS, 1 << (plan.prompts.bit_length() - 1))

    def targets_of(self, rows: Int[Tensor, " row"]) -> Int[Tensor, "row answer_pos"]:
        """The answers' tokens of some prompts."""
        return self.targets[rows.to(self.targets.device)]

    def of_answers(
        self, logits: Float[Tensor, "row answer_pos d_vocab"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "row answer_pos"]:
        """Log-probability of each answer token in nats under such logits, 0 behind the answer's end."""
        targets = self.targets_of(rows)
        logs = -F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD_ANSWER, reduction="none"
        )
        return logs.view(targets.shape)

    @contextmanager
    def under(
        self, edits: Mapping[str, Edit], rows: Int[Tensor, " row"]
    ) -> Iterator[tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]]:
        """The model under edits (hook name -> new activation), and tokens and mask of some prompts to give it."""
        rows = rows.to(self.tokens.device)
        with hooked(self.model, edits):
            yield self.tokens[rows], self.mask[rows]

    def read(
        self, tokens: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        """Logits of whole passes at the prompts' last tokens and behind the answers' tokens."""
        return open_reader(self.model, len(tokens), keep=False).read(tokens, mask, n_read=self.n_suffix)

    def whole_passes(
        self, rows: Int[Tensor, " row"], edits: Mapping[str, Edit]
    ) -> Float[Tensor, "row answer_pos d_vocab"]:
        """Logits of whole forward passes under edits."""
        with self.under(edits, rows) as (tokens, mask):
            return self.read(tokens, mask)

    def found_at(self, hooks: Sequence[str], rows: Int[Tensor, " row"]) -> dict[str, Float[Tensor, "row ..."]]:
        """Activations at the last token of some prompts in the model as it is, without gradient."""
        parts: dict[str, list[Tensor]] = {name: [] for name in hooks}

        def keep(name: str) -> Edit:
            return lambda x: parts[name].append(x[:, self.last].clone())

        with torch.no_grad():
            for part in self.portions(rows):
                self.whole_passes(rows[part], {name: keep(name) for name in hooks})
        return {name: torch.cat(own) for name, own in parts.items()}

    def at_last_token(self, value: Float[Tensor, "..."]) -> Edit:
        """An edit that adds ``value`` at the query's last token."""

        def add(activation: Tensor) -> Tensor:
            result = activation.clone()
            # the sum is made in the wider of the two precisions and rounded once
            total = result[:, self.last] + value.to(activation.device)
            result[:, self.last] = total.to(activation.dtype)
            return result

        return add


class SteerablePrompts(PreparedPrompts):
    """Prompts that are scored with vectors added after one layer at their last token, kept where a path is exact.

    Vectors are one for all rows, or one for each; everything is differentiable in them. In their place may stand edits
    of heads in layers above, one a layer, for all rows alike.

    Args:
        model: the model.
        prompts: the prompts, with their answers.
        layer: vectors are added after this layer; -1 for edits of heads from the first layer on.
        path: ``"weights"``, ``"kv"`` or ``"naive"``; by default the fastest exact one.
        max_memory: as for :class:`PreparedPrompts`.
        compute: precision of products, such as ``torch.bfloat16`` for a float32 model, whose residual stream and sums
            stay float32; None for the model's own.

    Attributes:
        why_slow: what stands against a faster path, where there is one.
    """

    def __init__(
        self, model: Any, prompts: Prompts, layer: int, *, path: Route | None = None, max_memory: int | None = None,
        compute: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.compute = layer, compute
        with frozen(model):
            self.path, self.why_slow = choose_route(model, path)
            check_compute("training", model, self.path, compute)
        self.kept: SteeredPrompts | None = None
        if self.path != "naive":
            self.kept = SteeredPrompts(
                model, prompts.tokens, prompts.attention_mask, prompts.answer_tokens, layer, path=self.path,
                max_memory=max_memory, most=_MOST_ROWS, compute=compute,
            )  # fmt: skip
            self.weights = self.kept.weights
        super().__init__(model, prompts, max_memory)

    def _batching(self, max_memory: int | None, n_more: int) -> tuple[Int[Tensor, " prompt"], int]:
        if self.kept is None:
            return super()._batching(max_memory, n_more)
        return self.kept.n_tokens, self.kept.tokens_at_once

    def size(self, rows: Int[Tensor, " row"]) -> float:
        """Root mean square of the residual stream where vectors are added."""
        if self.kept is not None:
            there = self.kept.after(rows)
        else:
            (there,) = self.found_at([resid_hook(self.layer)], rows).values()
        return float(there.float().square().mean().sqrt())

    def edits(self, vectors: Added) -> dict[str, Edit]:
        """What adding the vectors, or to the heads, does to whole passes."""
        if isinstance(vectors, tuple):
            return {z_hook(edit.layer): self.at_last_token(edit.value) for edit in vectors}
        return {resid_hook(self.layer): self.at_last_token(vectors)}

    def logits(self, rows: Int[Tensor, " row"], vectors: Added) -> Float[Tensor, "row answer_pos d_vocab"]:
        """Logits at the prompts' last tokens and behind the answers' tokens."""
        if self.kept is None:
            return self.whole_passes(rows, self.edits(vectors))
        return self.kept.logits(rows, vectors)

    def log_probs(self, rows: Int[Tensor, " row"], vectors: Added) -> Float[Tensor, "row answer_pos"]:
        """Log-probability of each answer token in nats, 0 behind the answer's end."""
        if self.kept is None:
            return self.of_answers(self.logits(rows, vectors), rows)
        return self.kept.read(rows, vectors)[0]

    def scores(
        self, rows: Int[Tensor, " row"], vectors: Added
    ) -> tuple[Float[Tensor, "row answer_pos"], Float[Tensor, "row d_vocab"]]:
        """The same, and the logits at the prompts' last tokens."""
        if self.kept is None:
            logits = self.logits(rows, vectors)
            return self.of_answers(logits, rows), logits[:, 0]
        logs, first = self.kept.read(rows, vectors, first=True)
        assert first is not None
        return logs, first

    def first_logits(self, rows: Int[Tensor, " row"], vectors: Added) -> Float[Tensor, "row d_vocab"]:
        """Logits at the prompts' last tokens."""
        if self.kept is None:
            return self.logits(rows, vectors)[:, 0]
        return self.kept.first_logits(rows, vectors)
