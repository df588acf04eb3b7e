"""Prompts that are kept while vectors change: what training and composition run over."""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fvlens.suffix._edits import Variant
from fvlens.suffix._estimate import Estimate
from fvlens.suffix._memory import Weights, plan_slices, portions, power_above, room_for_kept
from fvlens.suffix._prefix import run_prefix
from fvlens.suffix._routes import Route
from fvlens.suffix._run import SuffixRun, joined_runs
from fvlens.suffix._steps import LaidOutSteps, SteeredSuffix, packed, steered_resid

Added = Float[Tensor, "*row d_model"] | Variant
"""A vector for all rows or one for each, added after the layer; or edits of heads' z in layers above it."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Prompts whose answers have one length.

    Attributes:
        tokens: their tokens with all of the answer but the last, left-padded to the longest.
        mask: 1 for real tokens.
        n_answer: tokens of an answer.
    """

    tokens: Int[Tensor, "own pos"]
    mask: Int[Tensor, "own pos"]
    n_answer: int

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor, answers: Tensor, index: Int[Tensor, " own"], n_answer: int) -> "_Group":
        """Of all prompts those at ``index``."""
        width = int(mask[index].sum(dim=1).max())
        given = answers[index, : n_answer - 1]
        whole = torch.cat([tokens[index, -width:], given], dim=1)
        return cls(whole, torch.cat([mask[index, -width:], torch.ones_like(given)], dim=1), n_answer)

    def select(self, part: Int[Tensor, " part"]) -> "_Group":
        """Some of them, as wide as before."""
        return _Group(self.tokens[part], self.mask[part], self.n_answer)


class SteeredPrompts:
    """Prompts with answers, kept for many runs with a vector added after one layer at their last token.

    Instead of a vector, runs may take edits of heads in the layers above, which are made for all rows alike.

    Prompts whose answers have the same length lie together, so that none is padded to the longest: all of them in one
    slice, for a step takes rows from anywhere. Where that is more than may be kept, they lie in small slices: those
    that do not fit go when others are needed, and are run again when they are.

    Args:
        model: the model.
        tokens, mask: the prompts, left-padded.
        answers: the tokens of their answers, -1 behind the end.
        layer: vectors are added after this layer; -1 for edits of heads from the first layer on.
        path: ``"weights"`` or ``"kv"``.
        max_memory: bytes for activations and what is kept; by default as :func:`plan_slices` for the former, and a
            third of what is free for the latter, which changes the order of rows, and so no more than their rounding.
        most: answer tokens that go through together at most.
        compute: precision of products on the path ``"weights"``; None for the model's own.

    Attributes:
        n_tokens: tokens of each prompt's answer.
        tokens_at_once: answer tokens that go through together at most, with gradients.
        weights: on the path ``"weights"``, how they are held; None on the other.
    """

    def __init__(
        self,
        model: Any,
        tokens: Int[Tensor, "prompt pos"],
        mask: Int[Tensor, "prompt pos"],
        answers: Int[Tensor, "prompt answer_pos"],
        layer: int,
        *,
        path: Route,
        max_memory: int | None = None,
        most: int = 256,
        compute: torch.dtype | None = None,
    ) -> None:
        self.model, self.layer, self.compute = model, layer, compute
        self.path: Route = path
        self.answers = answers.to(next(model.parameters()).device)
        self.n_tokens = (answers >= 0).sum(dim=1).cpu()
        self.n_answers = sorted(set(self.n_tokens.tolist()))
        plan = plan_slices(
            model, n_pos=tokens.shape[1] + self.n_answers[-1] - 1, n_suffix=1, n_variants=1, path=path, gradients=True,
            max_memory=max_memory, shares=2, n_prompts=power_above(int(self.n_tokens.sum())), **self._kept_part(),
        )  # fmt: skip
        self.tokens_at_once = min(most, _round(plan.prompts))
        self.is_copied = plan.copied
        self.weights: Weights | None = plan.weights if path == "weights" else None
        self._room = room_for_kept(model) if max_memory is None else max_memory // 2
        lengths = mask.sum(dim=1)
        groups = [
            (index, _Group.of(tokens, mask, answers, index, n))
            for n in self.n_answers
            for index in _short_and_long((self.n_tokens == n).nonzero().flatten(), lengths)
        ]
        self._all_fit = sum(self._bytes(group) for _, group in groups) <= self._room
        self._slices: list[_Group] = []
        self._slice_of = torch.zeros(len(tokens), dtype=torch.long)
        self._place_in = torch.zeros(len(tokens), dtype=torch.long)
        for index, group in groups:
            size = len(index) if self._all_fit else self._prompts_at_once(group.n_answer)
            for part in torch.arange(len(index)).split(size):
                self._slice_of[index[part]] = len(self._slices)
                self._place_in[index[part]] = torch.arange(len(part))
                self._slices.append(group.select(part))
        self._steps: OrderedDict[int, tuple[SteeredSuffix, int]] = OrderedDict()

    def portions(self, rows: Int[Tensor, " row"]) -> list[slice]:
        """Slices of ``rows`` that go through together."""
        return portions(self.n_tokens[rows.cpu()].tolist(), self.tokens_at_once)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._slice_of)

    def _kept_part(self) -> dict[str, Any]:
        """What is kept of a run: what a suffix above the layer needs."""
        return dict(from_layer=self.layer + 1, keep_z=False, compute=self.compute) if self.path == "weights" else {}

    def _prompts_at_once(self, n_answer: int) -> int:
        """Prompts that run whole together."""
        return max(1, self.tokens_at_once // n_answer)

    def _bytes(self, group: "_Group") -> int:
        """Bytes that are kept of these prompts."""
        estimate, (n, n_pos) = Estimate.of(self.model), group.tokens.shape
        if self.path == "weights":
            return n * estimate.steps(n_pos, group.n_answer, self.layer + 1)
        return n * estimate.kept(n_pos, group.n_answer)

    def _steps_of(self, i: int) -> SteeredSuffix:
        """The steps of a slice, kept or run again."""
        if i in self._steps:
            self._steps.move_to_end(i)
            return self._steps[i][0]
        group = self._slices[i]
        size = self._bytes(group)
        while self._steps and size + sum(own for _, own in self._steps.values()) > self._room:
            self._steps.popitem(last=False)  # before the new ones are made
        n = len(group.tokens)
        parts = torch.arange(n).split(self._prompts_at_once(group.n_answer))
        steps = joined_runs((self._run(group.select(part)) for part in parts), n).steps(self.layer)
        self._steps[i] = steps, size
        return steps

    def _run(self, group: "_Group") -> SuffixRun:
        """Prompts, run once."""
        given, n_suffix = (self.model, group.tokens, group.mask), group.n_answer
        if self.path != "weights":
            return run_prefix(*given, n_suffix=n_suffix, path=self.path)
        run = run_prefix(*given, n_suffix=n_suffix, path=self.path, copied=self.is_copied, **self._kept_part())
        # steps start from one layer: the residual streams before the others may go
        return dataclasses.replace(run, resid_pre=run.resid_pre[:1].clone())

    def _parts(self, rows: Int[Tensor, " row"]) -> list[tuple[SteeredSuffix, Tensor, Tensor]]:
        """Steps, places in them, and positions in ``rows``, slice by slice."""
        rows = rows.cpu()
        slices = self._slice_of[rows]
        found = []
        for i in sorted(set(slices.tolist())):
            where = (slices == i).nonzero().flatten()
            steps, place = self._steps_of(i), self._place_in[rows[where]]
            if not self._all_fit:  # the slice may go while others are fetched: hold on to these rows alone
                steps, place = steps.run.select(place).steps(self.layer), torch.arange(len(place))
            found.append((steps, place, where))
        return found

    def after(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """The residual stream after the layer at the prompts' last tokens."""
        parts = self._parts(rows)
        found = torch.cat([steps.after[place.to(steps.after.device), 0] for steps, place, _ in parts])
        return found[torch.cat([where for *_, where in parts]).argsort().to(found.device)]

    def _final(
        self, rows: Int[Tensor, " row"], vectors: Added
    ) -> tuple[SteeredSuffix, Float[Tensor, "token d_model"], list[tuple[Tensor, int]]]:
        """Final residual streams of all tokens, and for each part its positions in ``rows`` and its answers' length."""
        parts = self._parts(rows)
        order = [(where, steps.run.n_suffix) for steps, _, where in parts]
        if isinstance(vectors, tuple):
            ends = [steps.run.select(place).under([vectors], behind=self.layer) for steps, place, _ in parts]
            return parts[0][0], torch.cat([end.flatten(0, 2) for end in ends]), order
        vectors = vectors.to(self.answers.device)
        given = [vectors if vectors.ndim == 1 else vectors[where.to(vectors.device)] for *_, where in parts]
        laid_out = [(steps, place) for steps, place, _ in parts if isinstance(steps, LaidOutSteps)]
        if len(laid_out) == len(parts):
            final = packed([(*part, own) for part, own in zip(laid_out, given, strict=True)])
        else:
            runs = [steps.run.select(place) for steps, place, _ in parts]
            each = zip(runs, given, strict=True)
            final = torch.cat([steered_resid(run, self.layer, own).flatten(0, 2) for run, own in each])
        return parts[0][0], final, order

    def first_logits(self, rows: Int[Tensor, " row"], vectors: Added) -> Float[Tensor, "row d_vocab"]:
        """Logits at the prompts' last tokens, with one vector for all rows or one for each; differentiable."""
        steps, final, order = self._final(rows, vectors)
        return steps.run.logits(final[_firsts(order).to(final.device)])

    def logits(self, rows: Int[Tensor, " row"], vectors: Added) -> Float[Tensor, "row answer_pos d_vocab"]:
        """Logits at the last tokens and behind the answers' tokens, 0 behind an answer's end; differentiable."""
        steps, final, order = self._final(rows, vectors)
        logits = steps.run.logits(final)
        width = self.answers.shape[1]
        places = _places(order, width).to(logits.device)
        padded = torch.zeros(len(rows) * width, logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return padded.index_put((places,), logits).view(len(rows), width, -1)

    def read(
        self, rows: Int[Tensor, " row"], vectors: Added, *, first: bool = False
    ) -> tuple[Float[Tensor, "row answer_pos"], Float[Tensor, "row d_vocab"] | None]:
        """Log-probability of each answer token (nats, in float32, 0 behind the end), and logits at the last tokens.

        Args:
            rows: the prompts.
            vectors: one for all of them, or one for each; or edits of heads.
            first: give the logits, too; None otherwise.
        """
        steps, final, order = self._final(rows, vectors)
        logits = steps.run.logits(final)
        device = logits.device
        targets = [self.answers[rows[own].to(self.answers.device), :n].flatten() for own, n in order]
        logs = -F.cross_entropy(logits.float(), torch.cat(targets).to(device), reduction="none")
        width = self.answers.shape[1]
        if len(order) == 1 and order[0][1] == width:  # in order, and of the full length
            found = logs.view(len(rows), width)
        else:
            places = _places(order, width).to(device)
            found = torch.zeros(len(rows) * width, device=device).index_put((places,), logs)
            found = found.view(len(rows), width)
        if not first:
            return found, None
        return found, logits if len(order) == 1 and order[0][1] == 1 else logits[_firsts(order).to(device)]


def _round(n: int) -> int:
    """A round number that is not above ``n``: in eighths of the power of 2 below it."""
    eighth = max(1, (1 << (n.bit_length() - 1)) // 8)
    return n // eighth * eighth


_MANY = 64
"""Prompts of one length of answer from which on short and long ones may lie apart."""
_WORTHWHILE = 0.9
"""Share of the positions from which on it is not worth it: every slice costs each step its own attention."""


def _short_and_long(index: Int[Tensor, " own"], lengths: Int[Tensor, " prompt"]) -> list[Int[Tensor, " _own"]]:
    """Prompts cut in two at the length that spares most padding, or left together where that is little."""
    own = lengths[index].cpu()
    whole = len(index) * int(own.max())
    cuts = {int(cut): int((own <= cut).sum()) for cut in own.unique()[:-1]}
    sizes = {cut: n * cut + (len(index) - n) * int(own.max()) for cut, n in cuts.items()}
    if len(index) < _MANY or not sizes or min(sizes.values()) > _WORTHWHILE * whole:
        return [index]
    cut = min(sizes, key=sizes.__getitem__)
    return [index[own <= cut], index[own > cut]]


def _firsts(order: Sequence[tuple[Int[Tensor, " _row"], int]]) -> Int[Tensor, " total"]:
    """Where the first token of each row lies among the tokens of all parts."""
    starts, at = [], 0
    for own, n_answer in order:
        starts.append(at + n_answer * torch.arange(len(own)))
        at += n_answer * len(own)
    return torch.cat(starts)[torch.cat([own for own, _ in order]).argsort()]


def _places(order: Sequence[tuple[Int[Tensor, " _row"], int]], width: int) -> Int[Tensor, " token"]:
    """Where each token of all parts lies among the rows, were these padded to ``width`` tokens."""
    return torch.cat([(own[:, None] * width + torch.arange(n_answer)).flatten() for own, n_answer in order])
