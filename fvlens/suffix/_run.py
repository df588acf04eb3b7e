"""What a prompt's one run leaves behind, and what every way of running its suffix again has in common."""

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.interventions import z_hook
from fvlens.metrics import best_token, rank
from fvlens.suffix._edits import Edit, SiteEdits, Variant, check_variants, joining
from fvlens.suffix._routes import Route
from fvlens.suffix._scratch import Scratch
from fvlens.types import Head

if TYPE_CHECKING:
    from fvlens.suffix._steps import SteeredSuffix

_LOGIT_SLICE = 16 * 1024 * 1024
"""Numbers in one slice of logits, where no memory bound says otherwise."""


@dataclass(frozen=True, slots=True)
class SuffixRun(abc.ABC):
    """Prompts that were run once, ready for suffixes under edits.

    Attributes:
        model: the model.
        path: ``"weights"`` or ``"kv"``.
        from_layer: suffixes can start at this layer or above; nothing is kept of those below.
        resid_pre: the residual stream before each layer from there on, at the suffix; of the first of them alone where
            suffixes start nowhere else.
        z: every head's output in these layers at the suffix; None where it was not kept.
        resid_final: the residual stream after the last layer at the suffix.
        attention_mask: 1 for real tokens of prefix and suffix, 0 for padding.
        suffix_tokens: the tokens of the suffix.
    """

    model: Any
    path: Route
    from_layer: int
    resid_pre: Float[Tensor, "layer prompt suffix d_model"]
    z: Float[Tensor, "layer prompt suffix head d_head"] | None
    resid_final: Float[Tensor, "prompt suffix d_model"]
    attention_mask: Int[Tensor, "prompt pos"]
    suffix_tokens: Int[Tensor, "prompt suffix"]

    @property
    def n_suffix(self) -> int:
        """Number of suffix positions."""
        return self.resid_final.shape[1]

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return self.resid_final.shape[0]

    # -- prompts ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _cache(self, take: Any) -> dict[str, Any]:
        """Keys and values, by the name of their field, each tensor given to ``take``."""

    def select(self, rows: Int[Tensor, " row"]) -> "SuffixRun":
        """Some of the prompts, in this order; a prompt may come more than once."""
        rows = rows.to(self.attention_mask.device)
        return dataclasses.replace(
            self,
            resid_pre=self.resid_pre[:, rows],
            z=None if self.z is None else self.z[:, rows],
            resid_final=self.resid_final[rows],
            attention_mask=self.attention_mask[rows],
            suffix_tokens=self.suffix_tokens[rows],
            **self._cache(lambda tensor: tensor[rows.to(tensor.device)]),
        )

    # -- residual streams ---------------------------------------------------------------------------------------------

    def resid_before(self, layer: int) -> Float[Tensor, "prompt suffix d_model"]:
        """The residual stream before a layer at the suffix, as it was kept."""
        self._check_layer(layer)
        return self.resid_final if layer == self.model.cfg.n_layers else self.resid_pre[layer - self.from_layer]

    def resid_after(self, layer: int) -> Float[Tensor, "prompt suffix d_model"]:
        """The residual stream after a layer at the suffix, as it was kept."""
        return self.resid_before(layer + 1)

    def kept_z(self, layer: int) -> Float[Tensor, "prompt suffix head d_head"]:
        """Every head's output in a layer at the suffix, as it was kept."""
        self._check_layer(layer)
        assert self.z is not None, "this run kept no z"
        return self.z[layer - self.from_layer]

    def _check_layer(self, layer: int) -> None:
        assert layer >= self.from_layer, f"layer {layer} of a run that was kept from layer {self.from_layer} on"

    # -- suffixes -----------------------------------------------------------------------------------------------------

    def under(
        self, variants: Sequence[Variant], *, behind: int | None = None
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """Residual streams after the last layer, of every prompt under every variant; differentiable in the values.

        All variants go up together: each joins the batch at its first edited layer and gets its later edits on the way.

        Args:
            variants: the edits.
            behind: all variants join behind this layer instead, so that no z need be kept; no edit may lie below.

        Raises:
            ValueError: an edit does not fit the model or the prompts.
        """
        check_variants(self.model, variants, self.n_prompts, self.n_suffix)
        n_layers = self.model.cfg.n_layers
        places = [joining(variant, n_layers) if behind is None else (behind, 1) for variant in variants]
        assert behind is None or all(joining(variant, n_layers) >= (behind, 1) for variant in variants)
        order = sorted(range(len(variants)), key=places.__getitem__)
        ordered = [variants[i] for i in order]
        places = [places[i] for i in order]
        active: Tensor | None = None  # of the first variants in this order, those that have joined
        n_active = 0
        scratch = Scratch(self.n_prompts * len(variants) * self.n_suffix)
        for layer in range(places[0][0] if places else n_layers, n_layers):
            n_inside, n_behind = places.count((layer, 0)), places.count((layer, 1))
            n_active += n_inside
            if n_active:
                active = self._block(layer, active, n_inside, SiteEdits.of(ordered[:n_active], layer, "z"), scratch)
            if n_behind:
                active = _joined(active, self.resid_after(layer), n_behind)
                n_active += n_behind
            if active is not None:
                active = SiteEdits.of(ordered[:n_active], layer, "resid_post").apply(active)
        final = _joined(active, self.resid_final, len(variants) - n_active)
        if order == sorted(order):
            return final
        return final[:, torch.tensor(order, device=final.device).argsort()]

    def resid_in_block(
        self, layer: int, active: Float[Tensor, "prompt joined suffix d_model"] | None, n_fresh: int
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """What goes into a block: the variants on their way, and what was kept for those that join inside it."""
        return _joined(active, self.resid_before(layer), n_fresh)

    @abc.abstractmethod
    def _block(
        self,
        layer: int,
        active: Float[Tensor, "prompt joined suffix d_model"] | None,
        n_fresh: int,
        edits: SiteEdits,
        scratch: Scratch | None = None,
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """The residual stream after a block, of variants on their way and then of ``n_fresh`` that join inside it.

        Args:
            layer: the block.
            active: the residual stream before it, of variants that have joined below; None if there are none.
            n_fresh: variants that join here: their residual stream before the block, and their z before the edits, are
                the kept ones.
            edits: of z, for all these variants.
            scratch: memory to work in.
        """

    def continue_from(
        self, layer: int, resid: Float[Tensor, "prompt variant suffix d_model"]
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """Run suffix variants whose residual stream BEFORE ``layer`` is given through the rest of the model."""
        for i in range(layer, self.model.cfg.n_layers):
            resid = self._block(i, resid, 0, SiteEdits())
        return resid

    def patched(
        self, heads: Sequence[Head], values: Float[Tensor, "variant d_head"], where: Bool[Tensor, "prompt suffix"]
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """Residual stream after the last layer, one variant a head, with that head's z replaced.

        Args:
            heads: the patched heads; variant i has only ``heads[i]`` patched.
            values: the new z of each head.
            where: the suffix positions at which z is replaced.
        """
        edits = [
            Edit(head.layer, "z", value, head=head.head, op="replace", where=where)
            for head, value in zip(heads, values, strict=True)
        ]
        return self.under([(edit,) for edit in edits])

    def steps(self, layer: int) -> "SteeredSuffix":
        """The same prompts, for many runs with a vector added after ``layer``, as training takes them."""
        from fvlens.suffix._steps import GeneralSteps

        return GeneralSteps(self, layer)

    # -- outcomes -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def logits(
        self, resid: Float[Tensor, "*rows d_model"], scratch: Scratch | None = None
    ) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm and unembedding of residual streams after the last layer; from ``scratch`` till its next use."""

    def outcomes(
        self,
        resid: Float[Tensor, "prompt variant d_model"],
        targets: Int[Tensor, " prompt"],
        *,
        at_once: int | None = None,
    ) -> tuple[Int[Tensor, "prompt variant"], Float[Tensor, "prompt variant"], Int[Tensor, "prompt variant"]]:
        """Rank and log-probability (nats) of a next token at one position of each prompt, and the best token there.

        Args:
            resid: residual streams after the last layer, at that position.
            targets: the next tokens wanted.
            at_once: rows that are unembedded together.
        """
        n_variants = resid.shape[1]
        wanted = targets.repeat_interleave(n_variants)
        rows = at_once or max(1, _LOGIT_SLICE // self.model.cfg.d_vocab)
        ranks, logs, best = [], [], []
        scratch = Scratch()
        for some, ids in zip(resid.flatten(0, 1).split(rows), wanted.split(rows), strict=True):
            logits = self.logits(some, scratch)
            ids = ids.to(logits.device)
            ranks.append(rank(logits, ids).cpu())
            best.append(best_token(logits).cpu())
            logs.append(_log_probs(logits, ids).cpu())
            del logits  # not beside those of the next slice
        ours, chances, likeliest = (torch.cat(parts).view(-1, n_variants) for parts in (ranks, logs, best))
        return ours, chances, likeliest

    def log_probs(
        self,
        resid: Float[Tensor, "prompt variant suffix d_model"],
        targets: Int[Tensor, "prompt suffix"],
        *,
        at_once: int | None = None,
    ) -> Float[Tensor, "prompt variant suffix"]:
        """Log-probability of ``targets`` as next tokens of each suffix position, in nats; negative targets give 0.

        The unembedding runs in slices, so that the logits of all variants are never held at once. Positions without a
        target are not unembedded.

        Args:
            resid: residual streams after the last layer.
            targets: the next tokens wanted.
            at_once: rows that are unembedded together, such as :attr:`Slices.logits` of a plan.
        """
        wanted = targets.to(resid.device)[:, None].expand(-1, resid.shape[1], -1)
        scored = wanted >= 0
        wide = torch.promote_types(resid.dtype, torch.float32)
        found = torch.zeros(scored.shape, device=targets.device, dtype=wide)
        if not bool(scored.any()):
            return found
        rows = at_once or max(1, _LOGIT_SLICE // self.model.cfg.d_vocab)
        parts = []
        scratch = Scratch()
        for some, ids in zip(resid[scored].split(rows), wanted[scored].split(rows), strict=True):
            logits = self.logits(some, scratch)
            parts.append(_log_probs(logits, ids.to(logits.device)).to(targets.device))
            del logits  # not beside those of the next slice
        return found.masked_scatter(scored.to(targets.device), torch.cat(parts))


def _joined(active: Tensor | None, kept: Float[Tensor, "prompt suffix d_model"], n: int) -> Tensor:
    """The variants on their way, and ``n`` copies of what was kept behind them."""
    if n == 0 and active is not None:
        return active
    fresh = kept[:, None].expand(-1, n, -1, -1)
    return fresh if active is None else torch.cat([active, fresh.to(active.device)], dim=1)


def _log_probs(logits: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Log-probability of one token a row, in float32 or wider; without a gradient the logits are used up for it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = logits.gather(-1, tokens[:, None])[:, 0]
    if logits.requires_grad:
        return wanted - logits.logsumexp(dim=-1)
    largest = logits.amax(dim=-1, keepdim=True)
    largest = largest.where(largest.isfinite(), 0)
    return wanted - (logits.sub_(largest).exp_().sum(dim=-1).log() + largest[:, 0])


def row_edits(edits: SiteEdits, layer: int, n_prompts: int) -> dict[str, Any]:
    """The edits of z as hooks on a block that runs prompts times variants as rows."""
    if not edits:
        return {}

    def apply(z: Float[Tensor, "row suffix head d_head"]) -> Float[Tensor, "row suffix head d_head"]:
        return edits.apply(z.unflatten(0, (n_prompts, -1))).flatten(0, 1)

    return {z_hook(layer): apply}


def joined_runs(runs: Iterable[SuffixRun], n_prompts: int) -> SuffixRun:
    """Runs of the same length one after another, as if their prompts had been run together.

    Each is copied into its place and may go before the next one is made, so that nothing is held twice.

    Args:
        runs: the runs.
        n_prompts: their prompts together.
    """
    whole: dict[str, list[Tensor]] = {}
    last: SuffixRun | None = None
    start = 0
    for run in runs:
        if run.n_prompts == n_prompts:
            return run
        for name, parts, dim in _tensors(run):
            if name not in whole:
                shapes = [(*part.shape[:dim], n_prompts, *part.shape[dim + 1 :]) for part in parts]
                whole[name] = [part.new_empty(shape) for part, shape in zip(parts, shapes, strict=True)]
            for place, part in zip(whole[name], parts, strict=True):
                place.narrow(dim, start, run.n_prompts).copy_(part)
        start += run.n_prompts
        last = run
    assert last is not None, "no runs"
    assert start == n_prompts, f"runs of {start} prompts instead of {n_prompts}"
    several = {name for name in whole if isinstance(getattr(last, name), tuple)}
    return dataclasses.replace(last, **{k: tuple(v) if k in several else v[0] for k, v in whole.items()})


def _tensors(run: SuffixRun) -> Iterator[tuple[str, list[Tensor], int]]:
    """Name, tensors and axis of prompts of everything that a run holds of its prompts."""
    yield "resid_pre", [run.resid_pre], 1
    if run.z is not None:
        yield "z", [run.z], 1
    for name in ("resid_final", "attention_mask", "suffix_tokens"):
        yield name, [getattr(run, name)], 0
    for name, value in run._cache(lambda tensor: tensor).items():
        yield name, list(value) if isinstance(value, tuple) else [value], 0
