"""What a prompt's one run leaves behind, and what every way of running its suffix again has in common."""

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fvlens.suffix._paths import Path
from fvlens.types import Head

if TYPE_CHECKING:
    from fvlens.suffix._steps import SteeredSuffix

_LOGIT_SLICE = 16 * 1024 * 1024
"""Numbers in one slice of logits, where no memory bound says otherwise."""

_WEIGHT_SLICE = 4 * 1024 * 1024
"""Numbers of an unembedding that are copied to single precision at once."""


def wide_logits(
    resid: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None = None,
) -> Float[Tensor, "*rows d_vocab"]:
    """``resid @ weight + bias`` in float32 or wider, so that the logits of a model in half precision are not rounded.

    bfloat16 would round a logit between 16 and 32 to a multiple of 1/8: up to 6% of a probability, and ties for the
    best token.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    resid = resid.to(weight.device, dtype)
    columns = max(1, _WEIGHT_SLICE // weight.shape[0])
    logits = torch.cat([resid @ some.to(dtype) for some in weight.split(columns, dim=1)], dim=-1)
    return logits if bias is None else logits + bias.to(dtype)


def is_half(dtype: torch.dtype) -> bool:
    """Whether logits of this precision would be rounded."""
    return dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class SuffixRun(abc.ABC):
    """Prompts that were run once, ready for patched suffixes.

    Attributes:
        model: the model.
        path: ``"weights"`` or ``"kv"``.
        keys, values: a tensor a layer, of the prefix positions, as the path's own attention takes them.
        resid_pre: the residual stream before each layer at the suffix.
        z: every head's output at the suffix.
        resid_final: the residual stream after the last layer at the suffix.
        attention_mask: 1 for real tokens of prefix and suffix, 0 for padding.
        suffix_tokens: the tokens of the suffix.
    """

    model: Any
    path: Path
    keys: tuple[Float[Tensor, "prompt *cache d_head"], ...]
    values: tuple[Float[Tensor, "prompt *cache d_head"], ...]
    resid_pre: Float[Tensor, "layer prompt suffix d_model"]
    z: Float[Tensor, "layer prompt suffix head d_head"]
    resid_final: Float[Tensor, "prompt suffix d_model"]
    attention_mask: Int[Tensor, "prompt pos"]
    suffix_tokens: Int[Tensor, "prompt suffix"]

    @property
    def n_suffix(self) -> int:
        """Number of suffix positions."""
        return self.resid_pre.shape[2]

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return self.resid_pre.shape[1]

    def select(self, rows: Int[Tensor, " row"]) -> "SuffixRun":
        """Some of the prompts, in this order; a prompt may come more than once."""
        rows = rows.to(self.attention_mask.device)
        return dataclasses.replace(
            self,
            keys=tuple(keys[rows.to(keys.device)] for keys in self.keys),
            values=tuple(values[rows.to(values.device)] for values in self.values),
            resid_pre=self.resid_pre[:, rows],
            z=self.z[:, rows],
            resid_final=self.resid_final[rows],
            attention_mask=self.attention_mask[rows],
            suffix_tokens=self.suffix_tokens[rows],
        )

    @classmethod
    def joined(cls, runs: "Sequence[SuffixRun]") -> "SuffixRun":
        """Runs of the same length one after another, as if their prompts had been run together."""
        if len(runs) == 1:
            return runs[0]
        return dataclasses.replace(
            runs[0],
            keys=tuple(torch.cat(layer) for layer in zip(*(run.keys for run in runs), strict=True)),
            values=tuple(torch.cat(layer) for layer in zip(*(run.values for run in runs), strict=True)),
            resid_pre=torch.cat([run.resid_pre for run in runs], dim=1),
            z=torch.cat([run.z for run in runs], dim=1),
            resid_final=torch.cat([run.resid_final for run in runs]),
            attention_mask=torch.cat([run.attention_mask for run in runs]),
            suffix_tokens=torch.cat([run.suffix_tokens for run in runs]),
        )

    def steps(self, layer: int) -> "SteeredSuffix":
        """The same prompts, for many runs with a vector added after ``layer`` and weights that do not change meanwhile.

        A path that can gain by it keeps a rearranged copy of some weights of the layers above.
        """
        from fvlens.suffix._steps import GeneralSteps

        return GeneralSteps(self, layer)

    def resid_after(self, layer: int) -> Float[Tensor, "prompt suffix d_model"]:
        """The residual stream after a layer at the suffix, as it was kept."""
        return self.resid_final if layer + 1 == self.model.cfg.n_layers else self.resid_pre[layer + 1]

    def patched(
        self,
        heads: Sequence[Head],
        values: Float[Tensor, "variant d_head"],
        where: Bool[Tensor, "prompt suffix"],
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """Residual stream after the last layer, one variant a head, with that head's z replaced.

        Args:
            heads: the patched heads, sorted by layer; variant i has only ``heads[i]`` patched.
            values: the new z of each head.
            where: the suffix positions at which z is replaced.
        """
        if list(heads) != sorted(heads):
            raise ValueError(f"patched: expected heads sorted by layer, got {[str(head) for head in heads]}.")
        return self._patched(heads, values, where)

    def _patched(self, heads: Sequence[Head], values: Tensor, where: Tensor) -> Tensor:
        """One batch a layer: its variants start at that layer."""
        parts = []
        for layer in sorted({head.layer for head in heads}):
            rows = [i for i, head in enumerate(heads) if head.layer == layer]
            index = torch.tensor([heads[i].head for i in rows], device=values.device)
            resid = self.resid_pre[layer][:, None].expand(-1, len(rows), -1, -1)
            parts.append(self._run_from(layer, resid, Patch(index, values[rows], where)))
        return torch.cat(parts, dim=1)

    def continue_from(
        self, layer: int, resid: Float[Tensor, "prompt variant suffix d_model"]
    ) -> Float[Tensor, "prompt variant suffix d_model"]:
        """Run suffix variants whose residual stream BEFORE ``layer`` is given through the rest of the model."""
        if layer == self.model.cfg.n_layers:
            return resid
        return self._run_from(layer, resid, None)

    @abc.abstractmethod
    def _run_from(self, layer: int, resid: Tensor, patch: "Patch | None") -> Tensor:
        """The suffix variants through the blocks from ``layer`` on, heads of that layer patched."""

    @abc.abstractmethod
    def logits(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm and unembedding of residual streams after the last layer."""

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
        found = torch.zeros(scored.shape, device=targets.device)
        if not bool(scored.any()):
            return found
        rows = at_once or max(1, _LOGIT_SLICE // self.model.cfg.d_vocab)
        parts = []
        for some, ids in zip(resid[scored].split(rows), wanted[scored].split(rows), strict=True):
            logits = self.logits(some).float()
            ids = ids.to(logits.device)
            chosen = logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(dim=-1)
            parts.append(chosen.to(targets.device))
            del logits  # not beside those of the next slice
        return found.masked_scatter(scored.to(targets.device), torch.cat(parts))


@dataclass(frozen=True, slots=True)
class Patch:
    """Which heads of a layer get which z: variant i has head ``index[i]`` replaced by ``values[i]``."""

    index: Int[Tensor, " variant"]
    values: Float[Tensor, "variant d_head"]
    where: Bool[Tensor, "prompt suffix"]

    def apply(self, z: Float[Tensor, "rows suffix head d_head"]) -> Float[Tensor, "rows suffix head d_head"]:
        """The z of prompts times variants with the patch in it, as a new tensor."""
        n_prompts, n_variants = self.where.shape[0], len(self.index)
        z = z.unflatten(0, (n_prompts, n_variants)).clone()
        index, where = self.index.to(z.device), self.where.to(z.device)
        variant = torch.arange(n_variants, device=z.device)
        old = z[:, variant, :, index]  # [variant prompt suffix d_head]
        z[:, variant, :, index] = torch.where(where[None, :, :, None], self.values[:, None, None].to(z), old)
        return z.flatten(0, 1)
